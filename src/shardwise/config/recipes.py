"""The blocks that name an optimizer and a scheduler, and shardwise's own block."""

from typing import Annotated, Any, Literal

from pydantic import Field

from shardwise.config.effects import Acts, NoEffect
from shardwise.config.values import Block, BlockLength, Name, Names, PositiveCount


class OptimizerConfig(Block):
    """The optimizer that the engine builds when the script passes none."""

    type: Annotated[
        Name,
        Acts(
            "Adam, AdamW, Lamb, Lion, Muon or the name of any optimizer of torch.optim; Adam is AdamW unless "
            "adam_w_mode is false; Lamb and Muon need whole tensors: stages 0 to 2; Muon steps matrices and AdamW the "
            "rest, embeddings too",
            cost="bytes of its state: Adam, AdamW and Lamb 8 P, Lion and SGD with momentum 4 P, SGD 0, Muon 4 P of the "
            "matrices and 8 P of the rest; from stage 1 on 1/W of it",
        ),
    ]
    params: Annotated[
        dict[str, Any],
        Acts(
            "keyword arguments of that optimizer. Lamb: Adam's, and max_coeff and min_coeff, the bounds of its trust "
            "ratio. Muon: lr, or muon_lr for matrices and adam_lr for the rest, momentum, weight_decay, betas, eps, "
            "ns_steps. A parameter is a matrix for Muon as use_muon says, in its group or as its attribute; else if it "
            'is 2-D, no weight of nn.Embedding, and its name has neither "embed" nor "lm_head"'
        ),
    ] = Field(default_factory=dict)
    legacy_fusion: Annotated[bool, NoEffect("fused steps come from torch and need no choice")] = False


class SchedulerConfig(Block):
    """The learning-rate scheduler that the engine builds when the script passes none."""

    type: Annotated[
        Name,
        Acts("WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest, OneCycle or a name of torch.optim.lr_scheduler"),
    ]
    params: Annotated[dict[str, Any], Acts("keyword arguments of that scheduler")] = Field(default_factory=dict)


class ShardwiseConfig(Block):
    """What only shardwise knows; no other program reads this block."""

    reduction: Annotated[
        Literal["auto", "ordered", "native"],
        Acts(
            "order in which gradients of ranks are added: ordered is by rank and has the same bits at every layout, "
            "native is the backend's own, auto is native on NCCL and ordered on gloo",
            cost="the same bytes; ordered on a GPU holds a second buffer of the unit while it is reduced",
        ),
    ] = "auto"
    check_collectives: Annotated[
        bool,
        Acts(
            "compare a tag of unit, operation and step across ranks at every collective, not only once a step",
            cost="a short message, waited for, before every collective: for finding a fault, not for training",
        ),
    ] = False
    transport: Annotated[
        Literal["auto", "process_group", "shared_memory"],
        Acts(
            "how bytes move between ranks on CPU; auto is shared memory where all ranks are on one machine, else the "
            "process group",
            cost="shared memory: one copy instead of a trip through the network stack, no received slices; at stage 3 "
            "it reads fp32 masters, 4 bytes an element in every dtype",
        ),
    ] = "auto"
    quantized_weights: Annotated[
        Literal["int8", "int4", "fp8"],
        Acts(
            "the format of zero_quantized_weights",
            cost="int8 and fp8 P bytes a gather, int4 P/2; of each value's block the largest magnitude times 1/254, "
            "1/28 and 1/14 is the error at most",
        ),
    ] = "int8"
    quantized_gradients: Annotated[
        Literal["int4", "int8", "fp8"],
        Acts("the format of zero_quantized_gradients", cost="int8 and fp8: twice int4's bytes"),
    ] = "int4"
    quantization_block: Annotated[
        BlockLength,
        Acts(
            "values that share a scale: a multiple of 32 up to 4096",
            cost="4 bytes a block, 1.6 % of int8 and 3.1 % of int4 at 256; parameters begin at a block's begin",
        ),
    ] = 256
    step_in_backward: Annotated[
        bool,
        Acts(
            "step each unit whose optimizer states rest off the device as soon as its gradient is reduced, beside the "
            "rest of the backward pass that ends a step. The script promises that step() follows that pass with "
            "nothing in between: no clipping, no other learning rate, no other pass, no look at parameters or "
            "gradients. Not with gradient_clipping, fp16 or zero_quantized_gradients, which need all gradients first",
            cost="with states in files 4 bytes less read and 4 less written per parameter and step; host memory for "
            "twice the largest unit's gradient shard",
        ),
    ] = False
    frozen_weights: Annotated[
        Literal["int8", "int4", "fp8"] | None,
        Acts(
            "at stage 3, the format in which parameters rest, on the device or off it, and travel that no optimizer "
            "steps; null: as values, or as zero_quantized_nontrainable_weights says",
            cost="1 byte a parameter (int4: half) instead of b; a block's largest magnitude times 1/254 for int8, 1/14 "
            "for int4 and 1/28 for fp8 is the error at most",
        ),
    ] = None
    error_feedback: Annotated[
        bool,
        Acts(
            "what quantisation takes from a gradient is added to the next one before that is quantised; not with fp16, "
            "whose loss scale changes between the two, and not kept in checkpoints",
            cost="b P + 4 P over the ranks of a node bytes on the device",
        ),
    ] = False
    simulated_nodes: Annotated[
        PositiveCount | None,
        Acts("treat the ranks as if they were on so many nodes, neighbours together: for tests of ZeRO++ on one host"),
    ] = None
    unit_classes: Annotated[
        Names | None,
        Acts(
            "class names of the modules that become units; null lets the engine find repeated blocks",
            cost="larger units take larger whole-parameter and gradient buffers, and fewer collectives",
        ),
    ] = None
