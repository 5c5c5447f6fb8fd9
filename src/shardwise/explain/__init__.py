"""What a run's settings come to: every value in force, who said it, and what it costs.

`read` finds the files and flags, `rows` resolves them into rows, `states` puts numbers to model states, `show` prints.
Nothing here loads torch, so a laptop can explain a cluster's config.
"""
