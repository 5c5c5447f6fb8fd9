"""shardwise: train models larger than one device's memory; ZeRO on ``torch.distributed``, nothing to compile.

``import shardwise`` loads nothing heavy: torch comes in with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardwise.errors import CollectiveError, ConfigError, ShardwiseError, StateError

if TYPE_CHECKING:
    from shardwise.accelerator import Accelerator
    from shardwise.availability import is_rich_available
    from shardwise.checkpoint.pretrained import load_pretrained
    from shardwise.data.prepare import skip_first_batches
    from shardwise.handlers import (
        AutocastKwargs,
        DataLoaderConfiguration,
        DDPCommunicationHookType,
        DistributedDataParallelKwargs,
        GradScalerKwargs,
        InitProcessGroupKwargs,
        ProfileKwargs,
    )
    from shardwise.launchers import debug_launcher, notebook_launcher
    from shardwise.memory import find_executable_batch_size
    from shardwise.mesh import init_distributed
    from shardwise.plugin import DeepSpeedPlugin
    from shardwise.process import DistributedType, PartialState
    from shardwise.random import synchronize_rng_states
    from shardwise.zero.engine import Engine
    from shardwise.zero.init import initialize

__version__ = "0.1.0"

_HOMES = {
    "Accelerator": "accelerator",
    "AutocastKwargs": "handlers",
    "DDPCommunicationHookType": "handlers",
    "DataLoaderConfiguration": "handlers",
    "DeepSpeedPlugin": "plugin",
    "DistributedDataParallelKwargs": "handlers",
    "DistributedType": "process",
    "Engine": "zero.engine",
    "GradScalerKwargs": "handlers",
    "InitProcessGroupKwargs": "handlers",
    "PartialState": "process",
    "ProfileKwargs": "handlers",
    "debug_launcher": "launchers",
    "find_executable_batch_size": "memory",
    "init_distributed": "mesh",
    "initialize": "zero.init",
    "is_rich_available": "availability",
    "load_pretrained": "checkpoint.pretrained",
    "notebook_launcher": "launchers",
    "skip_first_batches": "data.prepare",
    "synchronize_rng_states": "random",
}

_MODULES = ("utils", "zero")
"""Scripts reach these through the package: ``shardwise.zero.Init``."""

__all__ = [
    "Accelerator",
    "AutocastKwargs",
    "CollectiveError",
    "ConfigError",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "Engine",
    "GradScalerKwargs",
    "InitProcessGroupKwargs",
    "PartialState",
    "ProfileKwargs",
    "ShardwiseError",
    "StateError",
    "debug_launcher",
    "find_executable_batch_size",
    "init_distributed",
    "initialize",
    "is_rich_available",
    "load_pretrained",
    "notebook_launcher",
    "skip_first_batches",
    "synchronize_rng_states",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"shardwise.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"shardwise.{name}")
    raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
