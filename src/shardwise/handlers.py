"""Small objects that scripts pass to ``Accelerator``: how processes meet, how data is loaded, where files go."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

from shardwise.errors import ConfigError


@dataclass
class KwargsHandler:
    """Arguments for something that ``Accelerator`` makes."""

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return copy.deepcopy(self.__dict__)

    def to_kwargs(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        default = {field.name: getattr(type(self)(), field.name) for field in fields(self)}
        return {name: value for name, value in self.to_dict().items() if value != default[name]}


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """How processes meet.

    Attributes:
        backend: "gloo", "nccl", or None for what the device needs.
        init_method: refused: processes meet where their launcher says.
        timeout: how long one waits for the others; None is 30 minutes.
    """

    backend: str | None = None
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.init_method is not None:
            raise ConfigError(
                f"InitProcessGroupKwargs(init_method={self.init_method!r}): processes meet where their launcher says. "
                "Leave it out, or call torch.distributed.init_process_group() before Accelerator()."
            )


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """Settings of torch's own data parallelism, which shardwise does not need: each is accepted without effect.

    Unused parameters, divergent branches and static graphs need no setting here, gradients lie in buckets anyway.
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: Any = "no"
    comm_wrapper: Any = "no"
    comm_state_option: Any = None

    def __post_init__(self) -> None:
        if self.comm_hook not in ("no", None) or self.comm_wrapper not in ("no", None):
            raise ConfigError(
                "DistributedDataParallelKwargs(comm_hook=...) changes how gradients travel, and there is no such hook "
                'here. Set "communication_data_type" in the DeepSpeed JSON for gradients in 16 bits.'
            )


@dataclass
class GradScalerKwargs(KwargsHandler):
    """The dynamic loss scale of fp16 in a run without a DeepSpeed JSON."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True

    def __post_init__(self) -> None:
        if (self.growth_factor, self.backoff_factor, self.enabled) != (2.0, 0.5, True):
            raise ConfigError(
                f"GradScalerKwargs(growth_factor={self.growth_factor}, backoff_factor={self.backoff_factor}, "
                f"enabled={self.enabled}): the loss scale doubles and halves, and is always on in fp16. "
                "Leave these three at their defaults."
            )
        if math.frexp(self.init_scale)[0] != 0.5:
            raise ConfigError(f"GradScalerKwargs(init_scale={self.init_scale}): expected a power of 2.")


@dataclass
class AutocastKwargs(KwargsHandler):
    """Whether ``Accelerator.autocast`` acts, and whether it caches casts."""

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class DataLoaderConfiguration:
    """How ``prepare`` loads data.

    Attributes:
        split_batches: a loader's ``batch_size`` is that of all ranks together, not of one.
        dispatch_batches: rank 0 reads and hands out; None: for iterable datasets.
        even_batches: ranks get equally many full batches, filled up from the beginning of the dataset.
        use_seedable_sampler: shuffle by a seed and the number of the epoch alone.
        data_seed: that seed.
        non_blocking: copy to the device without waiting.
        use_stateful_dataloader: accepted: every loader knows where it stands.
        custom_sp_dataloader_config_handler: refused: there is no sequence parallelism.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False
    custom_sp_dataloader_config_handler: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.custom_sp_dataloader_config_handler is not None:
            raise ConfigError("custom_sp_dataloader_config_handler is for sequence parallelism, which is not here.")


@dataclass
class ProjectConfiguration:
    """Where a run's files go.

    Attributes:
        project_dir: directory of checkpoints.
        logging_dir: directory of trackers; default: ``project_dir``.
        automatic_checkpoint_naming: ``save_state()`` without a name writes ``checkpoints/checkpoint_N``.
        total_limit: how many of those are kept; None is all.
        iteration: N of the next one.
        save_on_each_node: each machine writes, for directories that are not shared.
    """

    project_dir: str | None = None
    logging_dir: str | None = None
    automatic_checkpoint_naming: bool = False
    total_limit: int | None = None
    iteration: int = 0
    save_on_each_node: bool = False

    def __post_init__(self) -> None:
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: str | os.PathLike[str] | None = None) -> None:
        """Set ``project_dir``, and ``logging_dir`` where it has none."""
        self.project_dir = None if project_dir is None else os.fspath(project_dir)
        if self.logging_dir is None:
            self.logging_dir = self.project_dir
