"""The loss scale for a plain ``loss.backward()``: applied where gradients enter the model's outputs."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.precision import LossScaler
from shardwise.zero.hooks import map_tensors


class ScaleBoundary:
    """Between the model and the user's loss.

    All outputs pass through one autograd node: a model may compute one output from another, and a gradient must be
    scaled once however it comes in. Where the loss itself was scaled (``engine.backward``), the node does nothing.
    """

    def __init__(self, scaler: LossScaler) -> None:
        self._scaler = scaler
        self._wraps = scaler.skips_overflows
        self.scaled_already = False

    def wrap(self, output: Any) -> Any:
        """The same output behind the boundary; untouched where there is no loss scale to apply."""
        if not self._wraps or not torch.is_grad_enabled():
            return output
        tensors: list[torch.Tensor] = []

        def collect(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.requires_grad:
                tensors.append(tensor)
            return tensor

        map_tensors(output, collect)
        if not tensors:
            return output
        wrapped = iter(_Scale.apply(self, *tensors))  # type: ignore[no-untyped-call]
        return map_tensors(output, lambda tensor: next(wrapped) if tensor.requires_grad else tensor)

    def reset(self) -> None:
        """The backward pass is over."""
        self.scaled_already = False

    @property
    def factor(self) -> float:
        """What gradients that enter now are multiplied by."""
        return 1.0 if self.scaled_already else self._scaler.scale


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, boundary: ScaleBoundary, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.boundary = boundary
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        factor = ctx.boundary.factor
        if factor == 1.0:
            return (None, *gradients)
        return (None, *(None if gradient is None else gradient * factor for gradient in gradients))
