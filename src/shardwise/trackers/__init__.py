"""Trackers of a script: where the numbers go that it logs. Scripts import these names from `shardwise.tracking`."""
