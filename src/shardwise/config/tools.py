"""Blocks of tools around training: what they do is seen in logs and files, never in a result."""

from typing import Annotated, Any

from pydantic import Field

from shardwise.config.effects import Acts, NoEffect, Unsupported
from shardwise.config.values import Block, Count, Foreign, Name, Names, NonNegative, PositiveCount, SignedCount

_NO_FILES = NoEffect(
    "it steers DeepSpeed's files; the engine's own load in any world, and its ranks always agree on tags"
)
_RECOMPUTE = NoEffect(
    "it acts on calls of DeepSpeed's own checkpoint function; torch.utils.checkpoint is told by its caller"
)
_COMPILE_DETAIL = NoEffect("read only with compile.deepcompile", warns=False)


class FileTrackerConfig(Block):
    """CSV files or TensorBoard: loss, learning rate and loss scale of each step, by samples seen."""

    enabled: Annotated[bool, Acts("rank 0 writes the events of each step")] = False
    output_path: Annotated[str, Acts("directory of the job's directory; empty is the working directory")] = ""
    job_name: Annotated[Name, Acts("name of the directory that holds the files")] = "DeepSpeedJobName"


class WandbConfig(Block):
    """Weights & Biases: the same events."""

    enabled: Annotated[bool, Acts("rank 0 logs the events of each step, to the script's own run if it began one")] = (
        False
    )
    group: Annotated[str | None, Acts("group of the run")] = None
    team: Annotated[str | None, Acts("the entity that owns the run")] = None
    project: Annotated[str, Acts("project of the run")] = "deepspeed"


class CometConfig(Block):
    """Comet: the same events."""

    enabled: Annotated[bool, Acts("rank 0 logs the events of each step")] = False
    samples_log_interval: Annotated[PositiveCount, Acts("samples between two values of one metric")] = 100
    project: Annotated[str | None, Acts("project of the experiment")] = None
    workspace: Annotated[str | None, Acts("workspace of the experiment")] = None
    api_key: Annotated[str | None, Acts("passed to Comet; no log of ours shows it")] = None
    experiment_name: Annotated[str | None, Acts("name of the experiment")] = None
    experiment_key: Annotated[str | None, Acts("the experiment to create or to go on with")] = None
    online: Annotated[bool | None, Acts("false writes to disk; null is Comet's choice")] = None
    mode: Annotated[str | None, Acts('"get", "create" or "get_or_create"; null is Comet\'s choice')] = None


class FlopsProfilerConfig(Block):
    """Counting of floating-point operations, in one step."""

    enabled: Annotated[bool, Acts("rank 0 profiles one micro-batch of one step, by torch's counter")] = False
    recompute_fwd_factor: Annotated[
        NonNegative, NoEffect("backward is counted as it runs, with what it recomputes; nothing is estimated")
    ] = 0.0
    profile_step: Annotated[Count, Acts("the step that is profiled, counted from 0")] = 1
    module_depth: Annotated[SignedCount, Acts("modules are listed down to this depth; -1 is all")] = -1
    top_modules: Annotated[Count, Acts("classes of modules named for each depth")] = 1
    detailed: Annotated[bool, Acts("print the table of modules too, not the totals alone")] = True
    output_file: Annotated[str | None, Acts("the file that the profile goes to; null is the log")] = None


class CommsLoggerConfig(Block):
    """Log of collectives."""

    enabled: Annotated[
        bool, Acts("count and time collectives for engine.comms_summary(), which is logged when the engine is closed")
    ] = False
    verbose: Annotated[bool, Acts("rank 0 logs each of its collectives as it ends")] = False
    prof_all: Annotated[bool, Acts("log all operations, not those of prof_ops alone")] = True
    debug: Annotated[bool, Acts("tell the collectives of each unit apart")] = False
    prof_ops: Annotated[Names, Acts("what is logged without prof_all: all_gather, reduce_scatter, exchange")] = ()


class ThroughputTimerConfig(Block):
    """The timer of samples a second."""

    enabled: Annotated[bool, Acts("lines of steps_per_print hold samples a second")] = True
    synchronized: Annotated[
        bool, NoEffect("the rate is taken between two lines by the host's clock; the device is not waited for")
    ] = True


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
    """How files of offloaded states are read and written; `shardwise bench-storage` measures what a disk likes."""

    block_size: Annotated[PositiveCount, Acts("bytes that one system call moves, in whole pages")] = 1_048_576
    queue_depth: Annotated[
        PositiveCount,
        Acts("blocks under way in each direction, times intra_op_parallelism", cost="a thread each, up to 64"),
    ] = 8
    intra_op_parallelism: Annotated[PositiveCount, Acts("multiplies queue_depth")] = 1
    thread_count: Annotated[
        PositiveCount, Acts("the documented name of intra_op_parallelism; the larger one counts")
    ] = 1
    single_submit: Annotated[bool, Acts("one block of a transfer at a time: gentle to a disk that others use too")] = (
        False
    )
    overlap_events: Annotated[
        bool, Acts("false: a transfer's next blocks start when all of its earlier ones have ended")
    ] = True
    use_gds: Annotated[bool, NoEffect("bytes pass through host memory, whose slabs are pinned")] = False


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
