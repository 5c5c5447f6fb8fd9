"""The short job of `shardwise test`: can these ranks, under this configuration, train together?

``python -m shardwise.selftest DIRECTORY`` is one rank of it. `job` goes through the checks in order; `settings` makes a
config for a small model of the user's; `collectives` and `training` are the checks; `book` writes down what each rank
found, line by line, so that a rank that dies has said how far it came; `report` reads all books.
"""
