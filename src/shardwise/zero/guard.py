"""What a parameter shows while its values rest elsewhere."""

from __future__ import annotations

import math

import torch


def guard(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of that shape without memory of its own, full of NaN (or of the least integer).

    A read outside of the schedule must not touch freed memory, and must not look like a weight.
    """
    if dtype.is_floating_point or dtype.is_complex:
        value: float = float("nan")
    else:
        value = 0 if dtype == torch.bool else torch.iinfo(dtype).min
    return torch.full((), value, dtype=dtype, device=device).expand(shape)


def guard_like(view: torch.Tensor) -> torch.Tensor:
    """The guard of the same shape, dtype and device."""
    return guard(view.shape, view.dtype, view.device)


def is_guard(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a guard, or a copy that kept its memory of one element."""
    if tensor.numel() < 2 or not tensor.is_floating_point() or any(tensor.stride()):
        return False
    return math.isnan(tensor.reshape(-1)[0].item())
