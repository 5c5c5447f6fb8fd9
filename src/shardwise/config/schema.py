"""The whole config: every top-level key of the JSON.

A field's mark says what becomes of the key (`effects.py`); a field without a mark is a block whose keys are marked.
"""

from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from shardwise.config.batch import BatchSizes, resolve_batch
from shardwise.config.effects import Acts, Alias, DeepSpeedDefault, NoEffect, Unsupported, switched_off
from shardwise.config.precision import Bf16Config, DataTypesConfig, Fp16Config, TorchAutocastConfig
from shardwise.config.recipes import OptimizerConfig, SchedulerConfig, ShardwiseConfig
from shardwise.config.tools import (
    ActivationCheckpointingConfig,
    AioConfig,
    CheckpointConfig,
    CometConfig,
    CommsLoggerConfig,
    CompileConfig,
    FileTrackerConfig,
    FlopsProfilerConfig,
    TensorParallelConfig,
    TimersConfig,
    WandbConfig,
)
from shardwise.config.values import (
    Block,
    Count,
    Dtype,
    Foreign,
    Interval,
    LogLevel,
    NonNegative,
    Positive,
    PositiveCount,
)
from shardwise.config.zero import ZeroConfig

Foreigner = Annotated[Foreign | None, Unsupported("this part of DeepSpeed does not exist here", neutral=switched_off)]

_ALL_DATA_PARALLEL = "every rank is data-parallel"


class EngineConfig(Block):
    """A checked config. Build it with `load_config`, which also refuses what is not supported."""

    train_batch_size: Annotated[
        PositiveCount | None, Acts("samples a step, over all ranks", auto="from the other two batch sizes")
    ] = None
    train_micro_batch_size_per_gpu: Annotated[
        PositiveCount | None,
        Acts(
            "samples of one forward on one rank",
            auto="from the other two batch sizes",
            cost="activations grow with it, model states do not",
        ),
    ] = None
    gradient_accumulation_steps: Annotated[
        PositiveCount | None,
        Acts(
            "micro-batches a step",
            auto="from the other two batch sizes, else 1",
            cost="stages 0 and 1 reduce gradients once a step; stage 2 reduces them, and stage 3 also gathers "
            "parameters, for every micro-batch",
        ),
    ] = None
    gradient_clipping: Annotated[
        NonNegative,
        Acts(
            "clip gradients to this global norm; 0 is no clipping",
            cost="no traffic: the norm travels in each step's message anyway; one multiplication of the gradients",
        ),
        DeepSpeedDefault(1.0, "it was 0 until 2026; write the value that you mean"),
    ] = 0.0
    communication_data_type: Annotated[
        Dtype | None,
        Acts(
            "dtype of reduced gradients; null is the compute dtype",
            auto="the compute dtype",
            cost="b of the gradients' traffic and of the buffers they travel in",
        ),
    ] = None
    steps_per_print: Annotated[Interval, Acts("log progress each so many steps; null or Infinity is never")] = None
    wall_clock_breakdown: Annotated[
        bool, Acts("log the times of forward, backward and step, each steps_per_print steps, or 10 where it is null")
    ] = False
    memory_breakdown: Annotated[
        bool, Acts("log engine.memory_report() after the first step and each steps_per_print steps, or 10")
    ] = False
    dump_state: Annotated[bool, Acts("log the configuration as understood, and what was built from it, once")] = False
    log_level: Annotated[LogLevel | None, Acts("level of what shardwise logs; null leaves it to the script")] = None
    dataloader_drop_last: Annotated[bool, Acts("the data loader that initialize builds drops a short last batch")] = (
        False
    )
    prescale_gradients: Annotated[bool, Acts("divide gradients by the ranks before their sum, not after it")] = False
    gradient_predivide_factor: Annotated[
        Positive,
        Acts(
            "divide gradients by it before their sum and multiply by factor / ranks after it; prescale_gradients reads "
            "no factor"
        ),
    ] = 1.0
    gradient_allreduce_op: Annotated[
        Literal["mean", "sum"], Acts('gradients over ranks: "mean" averages them, "sum" adds them')
    ] = "mean"
    optimizer: OptimizerConfig | None = None
    scheduler: SchedulerConfig | None = None
    fp16: Fp16Config = Field(default_factory=Fp16Config)
    bf16: Annotated[Bf16Config, Alias("bfloat16")] = Field(default_factory=Bf16Config)
    data_types: DataTypesConfig = Field(default_factory=DataTypesConfig)
    zero_optimization: ZeroConfig = Field(default_factory=ZeroConfig)
    shardwise: ShardwiseConfig = Field(default_factory=ShardwiseConfig)

    torch_autocast: TorchAutocastConfig = Field(default_factory=TorchAutocastConfig)
    sparse_gradients: Annotated[bool, Unsupported("gradients are reduced as dense tensors")] = False
    managed_gradient_accumulation: Annotated[
        bool, Unsupported("the engine counts micro-batches; engine.no_sync() opens a window by hand")
    ] = True
    sequence_parallel_size: Annotated[Count, Unsupported(_ALL_DATA_PARALLEL, neutral=lambda value: value == 0)] = 1
    data_parallel_size: Annotated[PositiveCount | None, Unsupported(_ALL_DATA_PARALLEL)] = None
    tensor_parallel: TensorParallelConfig = Field(default_factory=TensorParallelConfig)
    amp: Foreigner = None
    autotuning: Foreigner = None
    compression_training: Foreigner = None
    curriculum_learning: Foreigner = None
    data_efficiency: Foreigner = None
    eigenvalue: Foreigner = None
    elasticity: Foreigner = None
    expert_parallel: Foreigner = None
    hybrid_engine: Foreigner = None
    nebula: Foreigner = None
    progressive_layer_drop: Foreigner = None
    quantize_training: Foreigner = None
    sparse_attention: Foreigner = None
    weight_quantization: Foreigner = None

    seq_parallel_communication_data_type: Annotated[
        Dtype | None, NoEffect("read only with sequence parallelism", warns=False)
    ] = None
    use_data_before_expert_parallelism: Annotated[
        bool, NoEffect("read only with expert and tensor parallelism", warns=False)
    ] = False
    disable_allgather: Annotated[bool, NoEffect("it has no meaning under ZeRO")] = False
    zero_allow_untested_optimizer: Annotated[
        bool, NoEffect("any optimizer is accepted: it is tested when it is passed")
    ] = False
    zero_force_ds_cpu_optimizer: Annotated[bool, NoEffect("no place of a state asks for an optimizer of its own")] = (
        True
    )
    vocabulary_size: Annotated[Count | None, NoEffect("no part of training asks for it")] = None
    graph_harvesting: Annotated[bool, NoEffect("no CUDA graphs are captured; results are the same")] = False
    pipeline: Annotated[Foreign | None, NoEffect("only pipeline engines read it, and there is none")] = None
    datastates_ckpt: Annotated[Foreign | None, NoEffect("save_checkpoint(async_save=True) writes beside training")] = (
        None
    )
    activation_checkpointing: ActivationCheckpointingConfig = Field(default_factory=ActivationCheckpointingConfig)
    aio: AioConfig = Field(default_factory=AioConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    compile: CompileConfig = Field(default_factory=CompileConfig)
    flops_profiler: FlopsProfilerConfig = Field(default_factory=FlopsProfilerConfig)
    comms_logger: CommsLoggerConfig = Field(default_factory=CommsLoggerConfig)
    timers: TimersConfig = Field(default_factory=TimersConfig)
    tensorboard: FileTrackerConfig = Field(default_factory=FileTrackerConfig)
    csv_monitor: FileTrackerConfig = Field(default_factory=FileTrackerConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    comet: CometConfig = Field(default_factory=CometConfig)

    _auto_keys: tuple[str, ...] = PrivateAttr(default=())

    @property
    def auto_keys(self) -> tuple[str, ...]:
        """Dotted keys that the user set to "auto": each holds its default, from which the engine chooses."""
        return self._auto_keys

    @property
    def compute_dtype(self) -> Dtype:
        """The dtype in which parameters compute."""
        if self.fp16.enabled:
            return "fp16"
        return "bf16" if self.bf16.enabled else "fp32"

    @property
    def autocast_dtype(self) -> Dtype | None:
        """The dtype of torch.autocast around forward; None is no autocast."""
        if not self.torch_autocast.enabled:
            return None
        return "fp16" if self.torch_autocast.dtype in ("fp16", "float16") else "bf16"

    @property
    def scales_loss(self) -> bool:
        """Whether gradients pass through fp16, which needs a loss scale."""
        return "fp16" in (self.compute_dtype, self.autocast_dtype)

    @property
    def gradient_communication_dtype(self) -> Dtype:
        """The dtype in which gradients are reduced."""
        return self.communication_data_type or self.compute_dtype

    def resolve_batch(self, world_size: int) -> BatchSizes:
        """Complete the three batch sizes for `world_size` data-parallel ranks; ConfigError if they do not fit."""
        return resolve_batch(
            self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps, world_size
        )
