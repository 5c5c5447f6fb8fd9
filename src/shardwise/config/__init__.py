"""The DeepSpeed JSON as a typed, frozen, checked config."""

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
