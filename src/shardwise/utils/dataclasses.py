"""Names alone: what scripts pass to Accelerator, under the module that they import it from."""

from shardwise.accumulation import (
    GradientAccumulationPlugin,
)
from shardwise.handlers import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProfileKwargs,
    ProjectConfiguration,
)
from shardwise.operations import (
    TensorInformation,
)
from shardwise.plugin import (
    DeepSpeedPlugin,
)
from shardwise.process import (
    DistributedType,
)
from shardwise.random import (
    RNGType,
)
from shardwise.trackers.choose import (
    LoggerType,
)

__all__ = [
    "AutocastKwargs",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "GradScalerKwargs",
    "GradientAccumulationPlugin",
    "InitProcessGroupKwargs",
    "KwargsHandler",
    "LoggerType",
    "ProfileKwargs",
    "ProjectConfiguration",
    "RNGType",
    "TensorInformation",
]
