"""The block zero_optimization."""

import sys
from typing import Annotated, Any, Literal

from pydantic import Field

from shardwise.config.effects import Acts, Alias, DeepSpeedDefault, NoEffect, Unsupported, switched_off
from shardwise.config.values import Block, Count, Foreign, Names, NonNegative, PositiveCount, Ratio, SignedCount, Stage

_NO_CHECKPOINT = "checkpoints load alike whatever it says: fp32 masters, at any number of ranks, byte ranges alone"
_WHOLE_UNITS = "units are gathered whole; name their classes in shardwise.unit_classes or leaf_module"

_UNIT_SIZE = "a larger unit takes larger whole-parameter and gradient buffers, and fewer collectives"

_Device = Literal["none", "cpu", "nvme"]


def _no_cap(value: Any) -> bool:
    return isinstance(value, int) and value >= sys.maxsize


_NVME_PATH = Acts("directory for this rank's files, on a local disk; made where it is missing")
_PIN = Acts(
    "host memory that a GPU copies from and to is pinned; without a GPU nothing is",
    cost="true: pages that cannot be swapped out; false: copies do not run beside compute",
)


class OffloadParamConfig(Block):
    """Where parameters rest, at stage 3."""

    device: Annotated[
        _Device | None,
        Acts(
            "none: the training device; cpu: host memory, which for a model on the CPU is the same; nvme: a file",
            cost="off the device nothing of the shards rests there; each pass brings them in, b P/W bytes",
        ),
    ] = "none"
    nvme_path: Annotated[str | None, _NVME_PATH] = None
    buffer_count: Annotated[
        PositiveCount,
        Acts(
            "shards that may be in host memory on their way from a file: read-ahead",
            cost="so many times the largest unit's shard; at least 2",
        ),
    ] = 5
    buffer_size: Annotated[
        PositiveCount,
        Acts("elements; times buffer_count a bound on read-ahead, which a unit of any size passes all the same"),
    ] = 100_000_000
    max_in_cpu: Annotated[
        Count,
        Acts("with nvme: elements of this rank's shards that stay in memory all the same, in whole units"),
        DeepSpeedDefault(1_000_000_000, "there a smaller model stays in memory altogether"),
    ] = 0
    pin_memory: Annotated[bool, _PIN] = True


class OffloadOptimizerConfig(Block):
    """Where optimizer state rests: moments, masters, and gradients where they are sharded."""

    device: Annotated[
        _Device | None,
        Acts(
            "none: the training device; cpu: host memory, which for a model on the CPU is the same; nvme: a file, "
            "through which the step streams",
            cost="nvme: with Adam 16 B/parameter read and 12 to 14 written a step, and 4 written a backward pass",
        ),
    ] = "none"
    nvme_path: Annotated[str | None, _NVME_PATH] = None
    buffer_count: Annotated[
        PositiveCount,
        Acts(
            "windows of at most 2^20 elements in host memory: one is stepped, one is written, the others are read",
            cost="so many times 16 to 20 MiB with Adam; at least 3",
        ),
    ] = 4
    pin_memory: Annotated[bool, _PIN] = True
    pipeline_read: Annotated[bool, NoEffect("reads always run beside the step", warns=False)] = False
    pipeline_write: Annotated[bool, NoEffect("writes always run beside the step", warns=False)] = False
    pipeline: Annotated[bool, NoEffect("reads and writes always run beside the step", warns=False)] = False
    fast_init: Annotated[bool, NoEffect("files are allocated, not filled, in any case", warns=False)] = False
    ratio: Annotated[
        Ratio,
        Acts("part of the elements whose state leaves the device, in whole units", cost="the rest costs device memory"),
    ] = 1.0
    super_offload: Annotated[
        bool, NoEffect("the step on the host streams in any case, and nothing is stepped before the norm is known")
    ] = False
    cpuadam_cores_perc: Annotated[
        NonNegative, NoEffect("torch's own threads step; torch.set_num_threads sets their number", warns=False)
    ] = 0.8


class LeafModuleConfig(Block):
    """Modules that are gathered as one unit, with all that is inside them."""

    classes: Annotated[
        Names,
        Acts("class names, bare or with their module path", cost=_UNIT_SIZE),
        DeepSpeedDefault(
            ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock"),
            "ranks that take different experts need no such setting here",
        ),
    ] = ()
    names: Annotated[Names, Acts("names of modules as in named_modules()", cost=_UNIT_SIZE)] = ()
    name_suffixes: Annotated[Names, Acts("ends of such names", cost=_UNIT_SIZE)] = ()


class ZeroConfig(Block):
    """What is sharded, and how the shards travel. Sizes are elements, not bytes."""

    stage: Annotated[
        Stage,
        Acts(
            "sharded over ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters",
            cost="bytes at rest in fp32 with Adam at stages 0 to 3: 16 P, 8 P + 8 P/W, 4 P + 12 P/W, 16 P/W; bytes "
            "received a step at stage 0: b P + 4 P, 1: 2 b P, 2: (g + 1) b P, 3: at most 3 g b P",
        ),
    ] = 0
    reduce_bucket_size: Annotated[
        PositiveCount,
        Acts(
            "most elements that are reduced at a time; a larger unit takes several rounds",
            auto="5e8",
            cost="received slices of a unit between gloo messages: at most b size (W - 1)/W bytes; nothing of this "
            "size is allocated in advance",
        ),
    ] = 500_000_000
    allgather_bucket_size: Annotated[
        PositiveCount,
        Acts(
            "most elements of stepped parameters that are gathered at a time",
            auto="5e8",
            cost="gathers land in place, so no memory; a smaller size takes more messages",
        ),
    ] = 500_000_000
    overlap_comm: Annotated[
        bool | None,
        Acts(
            "reduce while backward goes on; null lets the engine choose",
            auto="on where it can help",
            cost="on, at stages 2 and 3: while a unit's gradients travel, the next unit's fill a second buffer",
        ),
        DeepSpeedDefault(None, "null is true at stage 3 and false below it"),
    ] = None
    contiguous_gradients: Annotated[
        bool,
        Acts(
            "gradients lie in one flat buffer a unit",
            cost="false, at stages 2 and 3: a unit's gradients stand twice while they are copied for their reduction",
        ),
    ] = True
    reduce_scatter: Annotated[
        bool,
        Acts(
            "reduce each slice to its owner; false reduces whole units to all ranks",
            cost="false: 2 b P bytes of gradients a reduction instead of b P",
        ),
    ] = True
    allgather_partitions: Annotated[
        bool,
        Acts(
            "publish stepped parameters by all-gather; false broadcasts them from each owner",
            cost="false: the same bytes in W messages instead of one",
        ),
    ] = True
    stage3_prefetch_bucket_size: Annotated[
        Count | None,
        Acts(
            "elements gathered ahead of use; null is one unit ahead",
            auto="one unit ahead",
            cost="at most b size bytes of whole parameters beyond the running unit; nothing over shared memory, which "
            "gathers no sooner than needed",
        ),
        Alias("prefetch_bucket_size"),
        DeepSpeedDefault(50_000_000),
    ] = None
    stage3_param_persistence_threshold: Annotated[
        Count | None,
        Acts(
            "parameters with fewer elements stay whole on every rank; null is 0",
            auto="0",
            cost="each of them rests and travels as at stage 2: b bytes an element on every rank, no gather in passes",
        ),
        Alias("param_persistence_threshold"),
        DeepSpeedDefault(100_000),
    ] = None
    stage3_max_live_parameters: Annotated[
        Count | None,
        Acts(
            "prefetch stops where gathered elements would pass this; null is no bound",
            auto="no bound",
            cost="at most b size bytes of whole parameters, or what the root and the running unit take",
        ),
        Alias("max_live_parameters"),
        DeepSpeedDefault(1_000_000_000),
    ] = None
    stage3_max_reuse_distance: Annotated[
        Count | None,
        Acts(
            "a unit used again within this many elements stays gathered; null is only the last unit of forward",
            auto="the last unit of forward",
            cost="about b size/2 bytes of whole parameters from forward to backward, each saved one of its two gathers",
        ),
        Alias("max_reuse_distance"),
        DeepSpeedDefault(1_000_000_000, "it keeps every unit of a smaller model whole from forward to backward"),
    ] = None
    sub_group_size: Annotated[
        PositiveCount,
        Acts(
            "most elements of one tensor that the optimizer steps",
            auto="1e9",
            cost="bounds the temporaries of an optimizer that steps tensor by tensor; fused steps have none; on the "
            "CPU pieces never exceed 2^18 elements",
        ),
    ] = 1_000_000_000
    zero_leaf_modules: Annotated[Names, Acts("class names, as leaf_module.classes", cost=_UNIT_SIZE)] = ()
    leaf_module: LeafModuleConfig = Field(default_factory=LeafModuleConfig)

    offload_param: OffloadParamConfig = Field(default_factory=OffloadParamConfig)
    offload_optimizer: OffloadOptimizerConfig = Field(default_factory=OffloadOptimizerConfig)
    cpu_offload: Annotated[
        bool | None, Unsupported("it is an old name; set offload_optimizer.device to cpu", lambda value: value is False)
    ] = None
    cpu_offload_param: Annotated[
        bool | None, Unsupported("it is an old name; set offload_param.device to cpu", lambda value: value is False)
    ] = None
    cpu_offload_use_pin_memory: Annotated[
        bool | None, NoEffect("read only with cpu_offload or cpu_offload_param", warns=False)
    ] = None
    zenflow: Annotated[
        Foreign | None, Unsupported("gradients are never applied late or in part", neutral=switched_off)
    ] = None

    zero_hpz_partition_size: Annotated[
        Count,
        Acts(
            "hpZ, at stage 3: ranks that keep a secondary shard of the parameters among themselves, neighbours by "
            "rank: those of a node. From the first gather of a step to the next step all gathers stay inside",
            cost="b P/size bytes on the device (P/size with zero_quantized_weights); b P a step from other nodes "
            "instead of 2 b P for every micro-batch",
        ),
    ] = 1
    zero_quantized_weights: Annotated[
        bool,
        Acts(
            "qwZ, at stage 3: parameters travel in the format of shardwise.quantized_weights, and every rank computes "
            "with what it gets that way; masters stay exact",
            cost="gathers of P bytes instead of b P; rounds parameters",
        ),
    ] = False
    zero_quantized_nontrainable_weights: Annotated[
        bool,
        Acts(
            "at stage 3, parameters that no optimizer steps rest and travel as int8, or in the format of "
            "shardwise.frozen_weights: the base of LoRA, or the whole model where there is no optimizer",
            cost="P/W bytes at rest and P a gather, instead of b P; rounds those parameters once",
        ),
    ] = False
    zero_quantized_gradients: Annotated[
        bool,
        Acts(
            "qgZ, at stage 3: gradients travel in the format of shardwise.quantized_gradients, summed inside nodes "
            "first and then across them; a step whose gradients are not finite is skipped in every dtype",
            cost="P/2 bytes inside the node and P/2 over the ranks of a node from others, instead of b P; rounds "
            "gradients twice",
        ),
    ] = False
    zeropp_loco_param: Annotated[
        Foreign | None,
        Unsupported("it is LoCo's error feedback; set shardwise.error_feedback to true for ours", neutral=switched_off),
    ] = None
    mics_shard_size: Annotated[
        SignedCount,
        Acts(
            "MiCS (hybrid sharding), at stage 3: states are sharded over groups of so many ranks, neighbours by rank, "
            "and every group holds all of them; 0 and below: over all ranks",
            cost="16 P/size bytes at rest instead of 16 P/W; gathers and reductions stay inside the group, and each "
            "reduction adds 8 P/size (R - 1)/R bytes from the R = W/size ranks that hold the same shard",
        ),
    ] = -1
    mics_hierarchical_params_gather: Annotated[
        bool,
        Acts(
            "with mics_shard_size: parameters are gathered across nodes first and then inside each; a group inside one "
            "node gathers as without it",
            cost="true: each shard enters a node once instead of once for each of its ranks",
        ),
    ] = False

    stage3_model_persistence_threshold: Annotated[
        Count | None,
        Unsupported("persistent parameters have no common bound; lower stage3_param_persistence_threshold", _no_cap),
        Alias("model_persistence_threshold"),
    ] = None
    ignore_unused_parameters: Annotated[
        bool, Unsupported("a parameter without a gradient is always allowed, on every rank")
    ] = True

    stage3_gather_16bit_weights_on_model_save: Annotated[
        bool,
        Acts(
            "at stage 3 Accelerator.get_state_dict and engine.save_16bit_model gather whole weights; "
            "engine.state_dict() does so unasked",
            cost="the main process holds the whole model in host memory",
        ),
        Alias("gather_16bit_weights_on_model_save"),
        Alias("stage3_gather_fp16_weights_on_model_save"),
    ] = False
    stage3_module_granularity_threshold: Annotated[
        Count, NoEffect(_WHOLE_UNITS), Alias("module_granularity_threshold")
    ] = 0
    stage3_use_all_reduce_for_fetch_params: Annotated[
        bool,
        NoEffect("parameters are fetched by all-gather: the same values for fewer bytes"),
        Alias("use_all_reduce_for_fetch_params"),
    ] = False
    stage3_allgather_sequential: Annotated[
        bool, NoEffect("a unit is one all-gather already"), Alias("allgather_sequential")
    ] = False
    use_multi_rank_bucket_allreduce: Annotated[
        bool, NoEffect("one reduction serves all ranks, each gets its slice")
    ] = True
    load_from_fp32_weights: Annotated[bool, NoEffect(_NO_CHECKPOINT)] = True
    elastic_checkpoint: Annotated[bool, NoEffect(_NO_CHECKPOINT)] = False
    pipeline_loading_checkpoint: Annotated[bool, NoEffect(_NO_CHECKPOINT)] = False
    legacy_stage1: Annotated[bool, NoEffect("there is one implementation of stage 1")] = False
    override_module_apply: Annotated[
        bool, NoEffect("Module.apply is never replaced; use engine.gathered_parameters() around it")
    ] = True
    round_robin_gradients: Annotated[
        bool, NoEffect("every unit is spread evenly over all ranks, so reductions have no single target")
    ] = False
    memory_efficient_linear: Annotated[
        bool, NoEffect("no linear layer keeps gathered weights alive, so none is replaced")
    ] = True
    log_trace_cache_warnings: Annotated[bool, NoEffect("there is no trace cache")] = False
    enable_sanity_checks: Annotated[
        bool, NoEffect("ranks compare their schedule at every step; shardwise.check_collectives checks each collective")
    ] = False
    save_muon_momentum_buffer_in_memory: Annotated[
        bool, NoEffect("the momentum of Muon rests where all optimizer state rests")
    ] = False
    compute_grad_norm: Annotated[bool, NoEffect("the norm is one number; its absence would change no result")] = True
    parameter_alignment: Annotated[bool, NoEffect("offsets inside a unit are chosen by the layout")] = False
    grad_hooks: Annotated[bool, NoEffect("gradients are always reduced from hooks")] = True

    @classmethod
    def expand(cls, value: object) -> object:
        """Read the old form of the block, where true is stage 1 and false is stage 0."""
        return {"stage": int(value)} if isinstance(value, bool) else value

    @property
    def leaf_classes(self) -> tuple[str, ...]:
        """Class names of leaf modules from both places that can hold them, without repeats."""
        return tuple(dict.fromkeys(self.zero_leaf_modules + self.leaf_module.classes))
