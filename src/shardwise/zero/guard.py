"""What a parameter shows while its values rest elsewhere."""

from __future__ import annotations

import math

import torch


def guard_like(view: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape without memory of its own, full of NaN (or of the least integer).

    A read outside of the schedule must not touch freed memory, and must not look like a weight.
    """
    if view.is_floating_point() or view.is_complex():
        value: float = float("nan")
    else:
        value = 0 if view.dtype == torch.bool else torch.iinfo(view.dtype).min
    return torch.full((), value, dtype=view.dtype, device=view.device).expand(view.shape)


def is_guard(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a guard, or a copy that kept its memory of one element."""
    if tensor.numel() < 2 or not tensor.is_floating_point() or any(tensor.stride()):
        return False
    return math.isnan(tensor.reshape(-1)[0].item())
