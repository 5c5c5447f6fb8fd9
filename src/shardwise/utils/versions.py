"""Names alone: comparing versions lives in `shardwise.versions`."""

from shardwise.versions import (
    compare_versions,
    is_torch_version,
)

__all__ = [
    "compare_versions",
    "is_torch_version",
]
