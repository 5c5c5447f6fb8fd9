"""Small objects that scripts pass to ``Accelerator``: how processes meet, how data is loaded, where files go."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from shardwise.errors import ConfigError

if TYPE_CHECKING:
    from torch.profiler import profile


PROFILE_PATTERN_NAME = "profile_{suffix}.json"


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


class DDPCommunicationHookType(StrEnum):
    """What a script may ask to be done with gradients on their way between ranks."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"


_IN_16_BITS = (DDPCommunicationHookType.FP16, DDPCommunicationHookType.BF16)


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """Settings of torch's own data parallelism, which shardwise does not need: all but the last three change nothing.

    Unused parameters, divergent branches and static graphs need no setting here, gradients lie in buckets anyway.

    Attributes:
        comm_hook: "fp16" or "bf16" lets gradients travel in 16 bits, in a run without ZeRO (with it the JSON's
            "communication_data_type" says so).
        comm_wrapper: acts on a hook that is none of these two, and there is none here.
        comm_state_option: of such a hook.
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType | str = DDPCommunicationHookType.NO
    comm_wrapper: DDPCommunicationHookType | str = DDPCommunicationHookType.NO
    comm_state_option: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        hook, wrapper = (_hook_type(given) for given in (self.comm_hook, self.comm_wrapper))
        self.comm_hook, self.comm_wrapper = hook, wrapper
        if hook not in (DDPCommunicationHookType.NO, *_IN_16_BITS):
            raise ConfigError(
                f"DistributedDataParallelKwargs(comm_hook={hook.value!r}): there is no low-rank form of "
                "gradients here. Use 'fp16' or 'bf16' for gradients in 16 bits."
            )
        if hook in _IN_16_BITS and wrapper not in (DDPCommunicationHookType.NO, hook):
            raise ConfigError(
                f"DistributedDataParallelKwargs(comm_hook={hook.value!r}, comm_wrapper={wrapper.value!r}): gradients "
                "travel in one dtype. Leave comm_wrapper out."
            )

    @property
    def communication_dtype(self) -> str | None:
        """ "fp16" or "bf16" where a hook asks for it; None: gradients travel as they are."""
        return str(self.comm_hook) if self.comm_hook in _IN_16_BITS else None


def _hook_type(given: DDPCommunicationHookType | str) -> DDPCommunicationHookType:
    try:
        return DDPCommunicationHookType(given)
    except ValueError:
        known = ", ".join(DDPCommunicationHookType)
        raise ConfigError(f"DistributedDataParallelKwargs got a hook {given!r}: expected one of {known}.") from None


@dataclass
class ProfileKwargs(KwargsHandler):
    """What ``Accelerator.profile`` records, and where it puts it.

    Attributes:
        activities: "cpu" and "cuda"; None: what there is.
        schedule_option: ``wait``, ``warmup``, ``active``, ``repeat`` and ``skip_first``, counted in calls of the
            profiler's ``step()``; None records all of the block.
        on_trace_ready: called with the profiler at the end of each ``active`` part.
        record_shapes: record the shapes of operators' inputs.
        profile_memory: record what is allocated and freed.
        with_stack: record file and line of operators.
        with_flops: estimate the operations of matrix products and convolutions.
        with_modules: record the modules that operators belong to.
        output_trace_dir: write ``profile_RANK.json`` there, as Chrome's tracing view reads it; of a schedule the last
            ``active`` part.
    """

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.activities or () if name not in ("cpu", "cuda")]
        if unknown:
            raise ConfigError(f"ProfileKwargs(activities={self.activities}): expected 'cpu' and 'cuda'.")

    def build(self) -> profile:
        """A profiler of torch that records as said."""
        from torch import profiler

        activities = None
        if self.activities is not None:
            known = {"cpu": profiler.ProfilerActivity.CPU, "cuda": profiler.ProfilerActivity.CUDA}
            activities = [known[name] for name in self.activities]
        schedule = None if self.schedule_option is None else profiler.schedule(**self.schedule_option)
        return profiler.profile(
            activities=activities,
            schedule=schedule,
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
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
