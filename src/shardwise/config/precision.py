"""The blocks that choose dtypes: fp16, bf16, torch_autocast, data_types."""

from typing import Annotated, Literal

from shardwise.config.effects import Acts, NoEffect, Unsupported
from shardwise.config.values import Block, Dtype, Names, NonNegative, Positive, PositiveCount, ScalePower


class Fp16Config(Block):
    """Train in fp16 with a loss scale and fp32 master weights."""

    enabled: Annotated[bool, Acts("parameters compute and travel in fp16, masters stay fp32")] = False
    auto_cast: Annotated[
        bool | None, Acts("false leaves floating inputs of the model as they are; else they are cast to fp16")
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

    enabled: Annotated[bool, Acts("parameters compute and travel in bf16, masters stay fp32")] = False
    immediate_grad_update: Annotated[bool, NoEffect("gradients are added into fp32 as soon as they arrive, always")] = (
        False
    )
    check_grad_overflow: Annotated[bool, Unsupported("steps in bf16 run without an overflow check, as in fp32")] = False
    bf16_master_weights_and_grads: Annotated[bool, Unsupported("master weights and gradients are kept in fp32")] = False
    bf16_optimizer_states: Annotated[bool, Unsupported("optimizer states are kept in fp32")] = False


class TorchAutocastConfig(Block):
    """Autocast driven by the config."""

    enabled: Annotated[
        bool, Unsupported("the engine does not enter autocast; use bf16 or fp16, or torch.autocast in the script")
    ] = False
    dtype: Annotated[str | None, NoEffect("read only with torch_autocast.enabled", warns=False)] = None
    lower_precision_safe_modules: Annotated[
        Names | None, NoEffect("read only with torch_autocast.enabled", warns=False)
    ] = None


class DataTypesConfig(Block):
    """Dtypes apart from the compute dtype."""

    grad_accum_dtype: Annotated[
        Literal["fp32"] | None, Acts("gradients accumulate in fp32: no other dtype is offered")
    ] = None
    param_dtype: Annotated[Dtype | None, Unsupported("fp16.enabled or bf16.enabled chooses the parameters' dtype")] = (
        None
    )
    buffer_dtype: Annotated[
        Dtype | None, Unsupported("buffers follow the compute dtype of fp16.enabled or bf16.enabled")
    ] = None
    keep_in_fp32_modules: Annotated[
        Names | None, Unsupported("no module is left out of fp16.enabled or bf16.enabled")
    ] = None
