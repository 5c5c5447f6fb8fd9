"""Starting a program as one process per rank on this machine, and ending every one of them with the run.

The phases of a run: `job` resolves what the user asked for against the machine; `environment` says which variables the
ranks get; `guard` watches over the run from outside; `runner` starts the ranks with torch's elastic agent, each through
`bootstrap`; `failure` says which rank ended the run and why.
"""
