"""The questions of `shardwise config`: asked in a terminal or answered by a file, and the config file they make."""
