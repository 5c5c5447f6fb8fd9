"""shardwise: train models larger than one device's memory; ZeRO on ``torch.distributed``, nothing to compile.

``import shardwise`` loads nothing heavy: torch comes in with the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwise.errors import CollectiveError, ConfigError, ShardwiseError, StateError

if TYPE_CHECKING:
    from shardwise.mesh import init_distributed
    from shardwise.zero.engine import Engine
    from shardwise.zero.init import initialize

__version__ = "0.1.0"

__all__ = [
    "CollectiveError",
    "ConfigError",
    "Engine",
    "ShardwiseError",
    "StateError",
    "init_distributed",
    "initialize",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "initialize":
        from shardwise.zero.init import initialize

        return initialize
    if name == "init_distributed":
        from shardwise.mesh import init_distributed

        return init_distributed
    if name == "Engine":
        from shardwise.zero.engine import Engine

        return Engine
    raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
