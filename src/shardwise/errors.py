"""What can go wrong: the user's mistake, a wrong state of the run, and a disk that fails under it.

Every message says what was found, what was expected, and what to do.
"""


class ShardwiseError(Exception):
    """Root of all errors that shardwise raises on purpose."""


class ConfigError(ShardwiseError, ValueError):
    """A setting, an argument or a model that cannot work as given: the user can mend it."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read: the message names the file and what is wrong with it."""


class StateError(ShardwiseError, RuntimeError):
    """The run is in a state that must not be: the message names the unit, the operation and the ranks."""


class CollectiveError(StateError):
    """Ranks do not meet in the same collective, or one of them did not come in time."""


class StorageError(ShardwiseError, RuntimeError):
    """Offloaded state cannot be read or written, or was changed by another process: the message names the file."""
