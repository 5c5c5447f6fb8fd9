"""The DeepSpeed JSON as a typed, frozen, checked config.

The schema of the JSON is loaded with the first name that needs it: the schema of a run's YAML stands in this package,
too, and `shardwise launch --help` reads that alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwise.config.batch import BatchSizes
    from shardwise.config.load import load_config
    from shardwise.config.precision import Bf16Config, Fp16Config
    from shardwise.config.recipes import OptimizerConfig, SchedulerConfig, ShardwiseConfig
    from shardwise.config.schema import EngineConfig
    from shardwise.config.values import Dtype
    from shardwise.config.zero import LeafModuleConfig, ZeroConfig

__all__ = [
    "BatchSizes",
    "Bf16Config",
    "Dtype",
    "EngineConfig",
    "Fp16Config",
    "LeafModuleConfig",
    "OptimizerConfig",
    "SchedulerConfig",
    "ShardwiseConfig",
    "ZeroConfig",
    "load_config",
]

_HOMES = {
    "BatchSizes": "batch",
    "Bf16Config": "precision",
    "Dtype": "values",
    "EngineConfig": "schema",
    "Fp16Config": "precision",
    "LeafModuleConfig": "zero",
    "OptimizerConfig": "recipes",
    "SchedulerConfig": "recipes",
    "ShardwiseConfig": "recipes",
    "ZeroConfig": "zero",
    "load_config": "load",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'shardwise.config' has no attribute {name!r}")
    return getattr(import_module(f"shardwise.config.{home}"), name)
