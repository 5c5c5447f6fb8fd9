"""What may be done to an optimizer's tensors without changing its result: measured, not listed.

Sharding hands an optimizer flat slices instead of matrices, and steps them a few at a time. That is exact for Adam and
wrong for Muon, and no attribute of an optimizer says so. The probe steps a copy of it on small tensors, once whole and
once cut, and compares the bits.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardwise.errors import ConfigError

# Sizes and cuts are multiples of a vector register: fused CPU kernels round the last few elements of a tensor in
# another way than those before, and shards are cut at full registers for the same reason.
_MATRICES = ((12, 32), (8, 16), (16, 8))
_MIXED = ((12, 32), (8, 16), (128,))
_CUTS = (192, 448)
_STEPS = 3
_RATE = 1e-2


@dataclass(frozen=True, slots=True)
class OptimizerTraits:
    """How an optimizer may be given its parameters."""

    elementwise: bool
    """Flat slices, cut anywhere, give the bits of whole parameters."""
    streamable: bool
    """Several ``step`` calls, each over a part of the parameters, give the bits of one call over all."""
    states: tuple[tuple[str, torch.dtype], ...] = field(default=(), compare=False)
    """What it keeps for each element of a parameter, and in which dtype if the parameter is fp32: ``exp_avg``."""


def probe_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerTraits:
    """Measure the traits of ``optimizer`` on the CPU, with the hyper-parameters of each of its groups.

    The optimizer itself is not changed.

    Raises:
        ConfigError: it cannot be stepped on other tensors than its own (it needs a closure, or keeps them elsewhere).
    """
    traits = [_probe_group(optimizer, group) for group in _distinct_groups(optimizer)]
    states = dict(state for t in traits for state in t.states)
    return OptimizerTraits(all(t.elementwise for t in traits), all(t.streamable for t in traits), tuple(states.items()))


def _distinct_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Groups that differ in more than their parameters and rate; they may even follow different rules."""
    distinct: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        only_matrices = all(parameter.dim() >= 2 for parameter in group["params"])
        rest = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
        distinct.setdefault(f"{only_matrices} {rest}", group)
    return list(distinct.values())


def _probe_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> OptimizerTraits:
    only_matrices = all(parameter.dim() >= 2 for parameter in group["params"])
    whole = [_tensor(index, shape) for index, shape in enumerate(_MATRICES if only_matrices else _MIXED)]
    try:
        reference, states = _run_and_look(optimizer, group, whole, [[0, 1, 2]])
    except Exception as error:
        raise _cannot_move(optimizer, f"stepping a copy of it raised {type(error).__name__}: {error}") from error
    if all(torch.equal(before, after) for before, after in zip(whole, reference, strict=True)):
        raise _cannot_move(optimizer, "stepping a copy of it changed nothing")
    streamable = _equal(reference, _try(optimizer, group, whole, [[0], [1, 2]]))
    flat = torch.cat([tensor.reshape(-1) for tensor in whole])
    pieces = [flat[: _CUTS[0]], flat[_CUTS[0] : _CUTS[1]], flat[_CUTS[1] :]]
    sliced = _try(optimizer, group, pieces, [[0, 1, 2]])
    elementwise = sliced is not None and torch.equal(
        torch.cat(sliced), torch.cat([tensor.reshape(-1) for tensor in reference])
    )
    return OptimizerTraits(elementwise, streamable, states)


def _clone_over(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: Sequence[torch.Tensor]
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """A copy of ``optimizer``, with all its attributes, over other tensors in one group like ``group``."""
    # Not copy.copy: a torch optimizer pickles its groups and state only, and loses what else a subclass keeps.
    clone = object.__new__(type(optimizer))
    for name, value in optimizer.__dict__.items():
        # Schedulers put a counting step() on the instance, and hooks watch the real one: neither may notice.
        if not hasattr(type(optimizer), name):
            clone.__dict__[name] = OrderedDict() if name.endswith("_hooks") else copy.copy(value)
    cloned = {**group, "params": list(parameters)}
    for key, value in cloned.items():
        if isinstance(value, torch.Tensor):
            cloned[key] = value.detach().cpu().clone()
    # A rate that a schedule has lowered to nothing would hide every difference.
    cloned["lr"] = torch.tensor(_RATE) if isinstance(group.get("lr"), torch.Tensor) else _RATE
    if cloned.get("capturable"):
        cloned["capturable"] = False  # it exists for CUDA tensors only and does not change the rule
    clone.param_groups = [cloned]
    clone.state = defaultdict(dict)
    return clone, cloned


def _tensor(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def _gradient(numel: int, step: int) -> torch.Tensor:
    # Rows of very different size tell a norm over the tensor from a rule for each element.
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(numel, generator=generator) * torch.logspace(-2, 2, numel)


def _run(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    values: Sequence[torch.Tensor],
    calls: Sequence[Sequence[int]],
) -> list[torch.Tensor]:
    return _run_and_look(optimizer, group, values, calls)[0]


def _run_and_look(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    values: Sequence[torch.Tensor],
    calls: Sequence[Sequence[int]],
) -> tuple[list[torch.Tensor], tuple[tuple[str, torch.dtype], ...]]:
    """Step copies of ``values``; each step makes one optimizer call per list of indices in ``calls``.

    Returns:
        The stepped values, and the kinds of state with a number for each element.
    """
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    clone, cloned = _clone_over(optimizer, group, parameters)
    for step in range(_STEPS):
        gradients = _gradient(sum(p.numel() for p in parameters), step).split([p.numel() for p in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone().view_as(parameter)
        for call in calls:
            cloned["params"] = [parameters[index] for index in call]
            clone.step()
    states = {
        key: value.dtype
        for parameter in parameters
        for key, value in clone.state.get(parameter, {}).items()
        if key != "step" and isinstance(value, torch.Tensor) and value.shape == parameter.shape
    }
    return [parameter.detach() for parameter in parameters], tuple(states.items())


def _try(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    values: Sequence[torch.Tensor],
    calls: Sequence[Sequence[int]],
) -> list[torch.Tensor] | None:
    """``_run``, or None where the optimizer refuses tensors that are cut (Muon takes matrices only)."""
    try:
        return _run(optimizer, group, values, calls)
    except Exception:
        return None


def _equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor] | None) -> bool:
    return right is not None and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _cannot_move(optimizer: torch.optim.Optimizer, why: str) -> ConfigError:
    return ConfigError(
        f"{type(optimizer).__name__} cannot be moved onto shards: {why}. Expected an optimizer whose step() needs no "
        "closure and updates the tensors of its param_groups: choose such a one."
    )
