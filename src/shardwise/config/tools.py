"""Blocks of tools around training: none of them acts, and none of them can change a result."""

from typing import Annotated, Any

from pydantic import Field

from shardwise.config.effects import NoEffect, Unsupported
from shardwise.config.values import Block, Count, Foreign, Name, Names, NonNegative, PositiveCount, SignedCount

_TRACKER = NoEffect("the engine writes no logs of its own; log engine.get_lr() and the loss from the script")
_TRACKER_DETAIL = NoEffect("read only by a tracker that is enabled", warns=False)
_PROFILE = NoEffect("the engine has no profiler of its own; torch.profiler shows its collectives by name")
_PROFILE_DETAIL = NoEffect("read only by a profiler that is enabled", warns=False)
_NO_NVME = NoEffect("nothing is read from or written to NVMe")
_NO_FILES = NoEffect("the engine writes no checkpoint files; the script saves engine.state_dict()")
_RECOMPUTE = NoEffect(
    "it acts on calls of DeepSpeed's own checkpoint function; torch.utils.checkpoint is told by its caller"
)
_COMPILE_DETAIL = NoEffect("read only with compile.deepcompile", warns=False)


class TrackerConfig(Block):
    """TensorBoard, CSV files, Weights & Biases or Comet."""

    enabled: Annotated[bool, _TRACKER] = False
    output_path: Annotated[str | None, _TRACKER_DETAIL] = None
    job_name: Annotated[str | None, _TRACKER_DETAIL] = None
    group: Annotated[str | None, _TRACKER_DETAIL] = None
    team: Annotated[str | None, _TRACKER_DETAIL] = None
    project: Annotated[str | None, _TRACKER_DETAIL] = None
    workspace: Annotated[str | None, _TRACKER_DETAIL] = None
    api_key: Annotated[str | None, _TRACKER_DETAIL] = None
    experiment_name: Annotated[str | None, _TRACKER_DETAIL] = None
    experiment_key: Annotated[str | None, _TRACKER_DETAIL] = None
    online: Annotated[bool | None, _TRACKER_DETAIL] = None
    mode: Annotated[str | None, _TRACKER_DETAIL] = None
    samples_log_interval: Annotated[PositiveCount, _TRACKER_DETAIL] = 100


class FlopsProfilerConfig(Block):
    """Counting of floating-point operations."""

    enabled: Annotated[bool, _PROFILE] = False
    recompute_fwd_factor: Annotated[NonNegative, _PROFILE_DETAIL] = 0.0
    profile_step: Annotated[Count, _PROFILE_DETAIL] = 1
    module_depth: Annotated[SignedCount, _PROFILE_DETAIL] = -1
    top_modules: Annotated[Count, _PROFILE_DETAIL] = 1
    detailed: Annotated[bool, _PROFILE_DETAIL] = True
    output_file: Annotated[str | None, _PROFILE_DETAIL] = None


class CommsLoggerConfig(Block):
    """Log of collectives."""

    enabled: Annotated[bool, _PROFILE] = False
    verbose: Annotated[bool, _PROFILE_DETAIL] = False
    prof_all: Annotated[bool, _PROFILE_DETAIL] = True
    debug: Annotated[bool, _PROFILE_DETAIL] = False
    prof_ops: Annotated[Names, _PROFILE_DETAIL] = ()


class ThroughputTimerConfig(Block):
    """The timer of samples a second."""

    enabled: Annotated[bool, _PROFILE] = True
    synchronized: Annotated[bool, _PROFILE_DETAIL] = True


class TimersConfig(Block):
    """Timers that print."""

    throughput: ThroughputTimerConfig = Field(default_factory=ThroughputTimerConfig)


class ActivationCheckpointingConfig(Block):
    """Recomputation of activations."""

    partition_activations: Annotated[bool, _RECOMPUTE] = False
    number_checkpoints: Annotated[Count | None, _RECOMPUTE] = None
    contiguous_memory_optimization: Annotated[bool, _RECOMPUTE] = False
    cpu_checkpointing: Annotated[bool, _RECOMPUTE] = False
    synchronize_checkpoint_boundary: Annotated[bool, _RECOMPUTE] = False
    profile: Annotated[bool, _RECOMPUTE] = False


class AioConfig(Block):
    """Asynchronous reads and writes of NVMe."""

    block_size: Annotated[PositiveCount, _NO_NVME] = 1_048_576  # bytes
    queue_depth: Annotated[PositiveCount, _NO_NVME] = 8
    intra_op_parallelism: Annotated[PositiveCount, _NO_NVME] = 1
    thread_count: Annotated[PositiveCount, _NO_NVME] = 1
    single_submit: Annotated[bool, _NO_NVME] = False
    overlap_events: Annotated[bool, _NO_NVME] = True
    use_gds: Annotated[bool, _NO_NVME] = False


class CheckpointConfig(Block):
    """How checkpoint files are written."""

    tag_validation: Annotated[Name, _NO_FILES] = "Warn"
    load_universal: Annotated[bool, _NO_FILES] = False
    use_node_local_storage: Annotated[bool, _NO_FILES] = False
    parallel_write: Annotated[Foreign, _NO_FILES] = Field(default_factory=dict)
    checkpoint_serialization: Annotated[bool, _NO_FILES] = True
    writer: Annotated[Foreign | None, _NO_FILES] = None


class CompileConfig(Block):
    """DeepSpeed's compiler passes."""

    deepcompile: Annotated[
        bool, Unsupported("there are no compiler passes here; torch.compile the model's blocks before wrapping")
    ] = False
    free_activation: Annotated[bool, _COMPILE_DETAIL] = False
    free_activation_threshold: Annotated[Count, _COMPILE_DETAIL] = 10 * 1024 * 1024
    offload_activation: Annotated[bool, _COMPILE_DETAIL] = False
    offload_activation_pin_memory: Annotated[bool, _COMPILE_DETAIL] = True
    offload_opt_states: Annotated[bool, _COMPILE_DETAIL] = False
    double_buffer: Annotated[bool, _COMPILE_DETAIL] = True
    symmetric_memory: Annotated[bool, _COMPILE_DETAIL] = False
    debug_log: Annotated[bool, _COMPILE_DETAIL] = False
    offload_parameters: Annotated[bool, _COMPILE_DETAIL] = False
    sync_before_reduce: Annotated[bool, _COMPILE_DETAIL] = False
    sync_after_reduce: Annotated[bool, _COMPILE_DETAIL] = False
    sync_before_allgather: Annotated[bool, _COMPILE_DETAIL] = False
    sync_after_allgather: Annotated[bool, _COMPILE_DETAIL] = False
    keep_int_input_tensors: Annotated[bool, _COMPILE_DETAIL] = True
    keep_all_input_tensors: Annotated[bool, _COMPILE_DETAIL] = False
    passes: Annotated[list[Any] | None, _COMPILE_DETAIL] = None


def _one_rank_wide(value: Any) -> bool:
    return isinstance(value, int) and value <= 1


class TensorParallelConfig(Block):
    """Sharding inside layers."""

    autotp_size: Annotated[
        Count, Unsupported("ranks share no layer: all ranks are data-parallel", neutral=_one_rank_wide)
    ] = 0
    tp_size: Annotated[
        Count, Unsupported("ranks share no layer: all ranks are data-parallel", neutral=_one_rank_wide)
    ] = 1
    tp_grain_size: Annotated[Count, NoEffect("read only with tensor parallelism", warns=False)] = 1
