"""The `shardwise` command: one file a sub-command, each a thin reader of options over the room that does the work."""
