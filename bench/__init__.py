"""Side-by-side runs of shardwise and its peers: time, memory and last loss, always measured in one launch.

Not part of the installed package: run from the repository root, for example ``python -m bench.training``.
"""
