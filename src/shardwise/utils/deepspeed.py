"""Names alone: what scripts import about ZeRO."""

from shardwise.dummies import (
    DummyOptim,
    DummyScheduler,
)
from shardwise.plugin import (
    HfDeepSpeedConfig,
)
from shardwise.state import (
    get_active_deepspeed_plugin,
)

__all__ = [
    "DummyOptim",
    "DummyScheduler",
    "HfDeepSpeedConfig",
    "get_active_deepspeed_plugin",
]
