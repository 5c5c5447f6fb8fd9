"""What may be done to an optimizer's tensors without changing its result: measured, not listed.

Sharding hands an optimizer flat slices instead of matrices, and steps them a few at a time. That is exact for Adam and
wrong for Muon, and no attribute of an optimizer says so. The probe steps a copy of it on small tensors, once whole and
once cut, and compares the bits.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardwise.errors import ConfigError

_MATRICES = ((6, 8), (5, 3), (4, 4))
_MIXED = ((6, 8), (5, 3), (7,))
_STEPS = 3


@dataclass(frozen=True, slots=True)
class OptimizerTraits:
    """How an optimizer may be given its parameters."""

    elementwise: bool
    """Flat slices, cut anywhere, give the bits of whole parameters."""
    streamable: bool
    """Several ``step`` calls, each over a part of the parameters, give the bits of one call over all."""


def probe_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerTraits:
    """Measure the traits of ``optimizer`` on the CPU, with its own hyper-parameters; it is not changed.

    Raises:
        ConfigError: it cannot be stepped on other tensors than its own (it needs a closure, or keeps them elsewhere).
    """
    only_matrices = all(p.dim() >= 2 for group in optimizer.param_groups for p in group["params"])
    shapes = _MATRICES if only_matrices else _MIXED
    whole = [_tensor(index, shape) for index, shape in enumerate(shapes)]
    try:
        reference = _run(optimizer, whole, [[0, 1, 2]])
    except Exception as error:
        raise _cannot_move(optimizer, f"stepping a copy of it raised {type(error).__name__}: {error}") from error
    if all(torch.equal(before, after) for before, after in zip(whole, reference, strict=True)):
        raise _cannot_move(optimizer, "stepping a copy of it changed nothing")
    streamable = _equal(reference, _try(optimizer, whole, [[0], [1, 2]]))
    flat = torch.cat([tensor.reshape(-1) for tensor in whole])
    sliced = _try(optimizer, [flat[:13], flat[13:50], flat[50:]], [[0, 1, 2]])
    elementwise = sliced is not None and torch.equal(
        torch.cat(sliced), torch.cat([tensor.reshape(-1) for tensor in reference])
    )
    return OptimizerTraits(elementwise, streamable)


def _clone_over(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """A copy of ``optimizer`` with one group, of the first group's hyper-parameters, over other tensors."""
    clone = copy.copy(optimizer)
    group = {**optimizer.param_groups[0], "params": list(parameters)}
    for key, value in group.items():
        if isinstance(value, torch.Tensor):
            group[key] = value.detach().cpu().clone()
    if group.get("capturable"):
        group["capturable"] = False  # it exists for CUDA tensors only and does not change the rule
    clone.param_groups = [group]
    clone.state = defaultdict(dict)
    return clone, group


def _tensor(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def _gradient(numel: int, step: int) -> torch.Tensor:
    # Rows of very different size tell a norm over the tensor from a rule for each element.
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(numel, generator=generator) * torch.logspace(-2, 2, numel)


def _run(
    optimizer: torch.optim.Optimizer, values: Sequence[torch.Tensor], calls: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Step copies of ``values``; each step makes one optimizer call per list of indices in ``calls``."""
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    clone, group = _clone_over(optimizer, parameters)
    if not isinstance(group.get("lr"), torch.Tensor) and group.get("lr", 1.0) == 0:
        group["lr"] = 1e-2  # a schedule that warms up from zero would hide every difference
    for step in range(_STEPS):
        gradients = _gradient(sum(p.numel() for p in parameters), step).split([p.numel() for p in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone().view_as(parameter)
        for call in calls:
            group["params"] = [parameters[index] for index in call]
            clone.step()
    return [parameter.detach() for parameter in parameters]


def _try(
    optimizer: torch.optim.Optimizer, values: Sequence[torch.Tensor], calls: Sequence[Sequence[int]]
) -> list[torch.Tensor] | None:
    """``_run``, or None where the optimizer refuses tensors that are cut (Muon takes matrices only)."""
    try:
        return _run(optimizer, values, calls)
    except Exception:
        return None


def _equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor] | None) -> bool:
    return right is not None and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _cannot_move(optimizer: torch.optim.Optimizer, why: str) -> ConfigError:
    return ConfigError(
        f"{type(optimizer).__name__} cannot be moved onto shards: {why}. Expected an optimizer whose step() needs no "
        "closure and updates the tensors of its param_groups: choose such a one."
    )
