"""The blocks that choose dtypes: fp16, bf16, torch_autocast, data_types."""

from typing import Annotated, Literal

from shardwise.config.effects import Acts, DeepSpeedDefault, NoEffect, Unsupported
from shardwise.config.values import Block, Dtype, Names, NonNegative, Positive, PositiveCount, ScalePower

_SIXTEEN_BITS = (
    "bytes at rest with Adam at stages 0 to 3: 18 P, 6 P + 12 P/W, 2 P + 16 P/W, 16 P/W; parameters and gradients "
    "travel with b = 2"
)


class Fp16Config(Block):
    """Train in fp16 with a loss scale and fp32 master weights."""

    enabled: Annotated[bool, Acts("parameters compute and travel in fp16, masters stay fp32", cost=_SIXTEEN_BITS)] = (
        False
    )
    auto_cast: Annotated[
        bool | None,
        Acts("false leaves floating inputs of the model as they are; else they are cast to fp16"),
        DeepSpeedDefault(False),
    ] = None
    loss_scale: Annotated[
        NonNegative, Acts("0 is a dynamic scale, any other number a static one", auto="0, the dynamic scale")
    ] = 0.0
    initial_scale_power: Annotated[ScalePower, Acts("the dynamic scale starts at 2 to this power")] = 16
    loss_scale_window: Annotated[PositiveCount, Acts("steps without overflow before the dynamic scale doubles")] = 1000
    hysteresis: Annotated[PositiveCount, Acts("the dynamic scale halves at this overflow, not before")] = 2
    consecutive_hysteresis: Annotated[
        bool, Acts("refill the allowance of hysteresis after each good step, not only when the scale grows")
    ] = False
    min_loss_scale: Annotated[Positive, Acts("the dynamic scale never falls below this")] = 1.0
    fp16_master_weights_and_grads: Annotated[bool, Unsupported("master weights and gradients are kept in fp32")] = False


class Bf16Config(Block):
    """Train in bf16 with fp32 master weights and no loss scale."""

    enabled: Annotated[bool, Acts("parameters compute and travel in bf16, masters stay fp32", cost=_SIXTEEN_BITS)] = (
        False
    )
    immediate_grad_update: Annotated[bool, NoEffect("gradients are added into fp32 as soon as they arrive, always")] = (
        False
    )
    check_grad_overflow: Annotated[
        bool,
        Unsupported("steps in bf16 run without an overflow check, as in fp32"),
        DeepSpeedDefault(True, "there a step with NaN or inf is skipped; here it shows in the weights"),
    ] = False
    bf16_master_weights_and_grads: Annotated[bool, Unsupported("master weights and gradients are kept in fp32")] = False
    bf16_optimizer_states: Annotated[bool, Unsupported("optimizer states are kept in fp32")] = False


class TorchAutocastConfig(Block):
    """Parameters stay as they are, and each operation computes in the dtype that torch.autocast chooses for it."""

    enabled: Annotated[
        bool,
        Acts(
            "forward runs under torch.autocast, and its outputs are cast to fp32; fp16 has a dynamic loss scale",
            cost="parameters stay in fp32: 16P bytes of model states; activations of matrix products in 16 bits",
        ),
    ] = False
    dtype: Annotated[
        Literal["bf16", "fp16", "bfloat16", "float16"] | None, Acts("what autocast computes in; null is bf16")
    ] = None
    lower_precision_safe_modules: Annotated[
        Names | None, NoEffect("torch chooses by operation, not by class of module", warns=False)
    ] = None


class DataTypesConfig(Block):
    """Dtypes apart from the compute dtype."""

    grad_accum_dtype: Annotated[
        Literal["fp32"] | None,
        Acts("gradients accumulate in fp32: no other dtype is offered", cost="4 P bytes at stages 0 and 1, else 4 P/W"),
        DeepSpeedDefault(None, "null is the compute dtype: bf16 gradients are then added in bf16"),
    ] = None
    param_dtype: Annotated[Dtype | None, Unsupported("fp16.enabled or bf16.enabled chooses the parameters' dtype")] = (
        None
    )
    buffer_dtype: Annotated[
        Dtype | None, Unsupported("buffers follow the compute dtype of fp16.enabled or bf16.enabled")
    ] = None
    keep_in_fp32_modules: Annotated[
        Names | None,
        Unsupported("no module is left out of fp16.enabled or bf16.enabled"),
        DeepSpeedDefault("auto", "buffers that a transformers model lists stay in fp32"),
    ] = None
