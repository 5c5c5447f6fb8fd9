"""One parameter's fp32 value, gradient and optimizer state, to look at or to change while debugging, at every stage.

``full``   whole, on every rank; collective
``local``  the elements of this rank's shard, flattened; looking at them needs nobody else

Gradients are those of the step under way, between backward and step: averaged over ranks, without the loss scale,
before clipping. A setter is collective, and what rank 0 passes counts, but for ``local`` ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from shardwise import roll_call
from shardwise.comm.base import CollectiveId, mean_into
from shardwise.errors import ConfigError, StateError
from shardwise.layout import Span
from shardwise.zero.gradients import GradientHome, SoFar
from shardwise.zero.held import Held, held
from shardwise.zero.rest import Rest
from shardwise.zero.step import Step


def _held(parameter: torch.Tensor, caller: str) -> Held:
    found = held(parameter) if isinstance(parameter, torch.Tensor) else None
    if found is None:
        raise ConfigError(
            f"{caller}() got a {type(parameter).__name__} that no open engine holds. Expected a parameter of a model "
            "that was passed to initialize() or prepare()."
        )
    if found.in_backward:
        raise StateError(f"{caller}() of {found.name!r} was called inside a backward pass. Call it between passes.")
    return found


def _meet(parameter: torch.Tensor, caller: str) -> Held:
    own = _held(parameter, caller)
    roll_call.answer(f"{caller}()", own.name)
    return own


def _check_shape(value: torch.Tensor, wanted: torch.Size | tuple[int, ...], own: Held, caller: str) -> None:
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != tuple(wanted):
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ConfigError(f"{caller}() of {own.name!r} got {got}. Expected a tensor of shape {tuple(wanted)}.")


def _assemble(own: Held, mine: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole parameter-shaped tensor of which each rank holds the part that is in its shard. Collective."""
    whole = torch.zeros(own.slot.numel, dtype=dtype, device=own.comm.device)
    for rank in range(own.comm.size):
        part = own.part_of(rank)
        if part.numel:
            piece = whole[part.begin : part.end]
            if rank == own.comm.rank:
                piece.copy_(mine)
            own.ranks.share(piece, rank)
    return whole.view(own.slot.shape)


def _from_rank_0(own: Held, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rank 0's value, on the engine's device. Collective."""
    value = value.detach().to(own.comm.device, dtype, copy=True).contiguous()
    own.ranks.share(value, 0)
    return value


def _of_first_replica(own: Held, value: torch.Tensor) -> torch.Tensor:
    """[part] what the rank of the first replica gave that holds the same part as this one. Collective."""
    if own.comm.world.size == own.comm.size:
        return value
    value = value.detach().to(own.comm.device, torch.float32, copy=True).contiguous()
    for rank in range(own.comm.size):
        part = own.part_of(rank)
        given = value if rank == own.comm.rank else torch.empty(part.numel, device=own.comm.device)
        own.ranks.share(given, rank)  # a shard's place in the first replica is its rank in the world
    return value


@contextmanager
def _nobody_reads(own: Held) -> Iterator[None]:
    """Between two meetings of all ranks, so that no rank reads memory of another that changes."""
    own.comm.exchange(CollectiveId("begin of a write", own.unit.name, own.global_step), b"")
    yield
    own.comm.publish()
    own.comm.exchange(CollectiveId("end of a write", own.unit.name, own.global_step), b"")


def _any_rank(own: Held, flag: bool) -> bool:
    return any(map(any, own.comm.exchange(CollectiveId("access", own.unit.name, own.global_step), bytes([flag]))))


# --- values -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def safe_get_full_fp32_param(param: torch.Tensor) -> torch.Tensor:
    """The whole value in fp32, of the master where there is one; a copy. Collective."""
    own = _meet(param, "safe_get_full_fp32_param")
    return _assemble(own, own.resting(own.part_of(own.comm.rank)).load(), torch.float32)


@torch.no_grad()
def safe_get_local_fp32_param(param: torch.Tensor) -> torch.Tensor:
    """[part] This rank's part of it; empty where the shard holds none of the parameter; a copy."""
    own = _held(param, "safe_get_local_fp32_param")
    return own.resting(own.part_of(own.comm.rank)).load().to(torch.float32, copy=True)


@torch.no_grad()
def safe_set_full_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Replace the value on all ranks, and the master. Collective; rank 0's ``value`` counts."""
    own = _meet(param, "safe_set_full_fp32_param")
    _check_shape(value, own.slot.shape, own, "safe_set_full_fp32_param")
    value = _from_rank_0(own, value, own.home.resting.dtype)
    with _nobody_reads(own):
        own.home.load(own.index, value)
        if own.unit.is_sharded and own.unit.is_whole:
            param.data.copy_(value)


@torch.no_grad()
def safe_set_local_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """[part] Replace this rank's part of the value, at stage 3. Every rank calls it, each with its part.

    Where several ranks hold one part the first one's counts.

    Raises:
        ConfigError: the parameter is whole on every rank; ``safe_set_full_fp32_param`` keeps these alike.
    """
    own = _meet(param, "safe_set_local_fp32_param")
    part = own.part_of(own.comm.rank)
    if not own.segment.sharding.parameter and own.comm.world.size > 1:
        raise ConfigError(
            f"safe_set_local_fp32_param() of {own.name!r}: it is whole on every rank, which would differ then. Use "
            "safe_set_full_fp32_param()."
        )
    _check_shape(value, (part.numel,), own, "safe_set_local_fp32_param")
    value = _of_first_replica(own, value)
    with _nobody_reads(own):
        own.resting(part).save(value)
        if own.comm.size == 1:
            own.home.load(own.index, own.resting(part).load().clone().view(own.slot.shape))
    if own.unit.is_sharded and own.unit.is_whole:
        param.data.copy_(_assemble(own, own.resting(part).load(), own.home.resting.dtype))


# --- gradients --------------------------------------------------------------------------------------------------------


def _gradients(own: Held) -> GradientHome | None:
    return own.segment.gradients


def _local_gradient(own: Held) -> torch.Tensor | None:
    """Of a rank that steps its own tensors."""
    return None if own.step is None else own.step.local_gradients().get(own.name)


def _part_of_shard(own: Held, shard: Rest) -> Rest:
    part = own.part_of(own.comm.rank)
    return shard.part(part.shift(own.slot.offset - own.layout.shard(own.comm.rank).begin))


def _used(own: Held) -> bytearray | None:
    """The unit's flags of parameters that got a gradient, of this parameter's buffer."""
    for number, (segment, _) in enumerate(own.unit.trainable):
        if segment is own.segment:
            return own.unit.used[number]
    return None


@torch.no_grad()
def safe_get_full_grad(param: torch.Tensor) -> torch.Tensor | None:
    """The whole gradient so far, in fp32, averaged over ranks; None where no rank has one. Collective.

    Looking does not average anything for the step: what is not averaged yet is averaged here in a copy.
    """
    own = _meet(param, "safe_get_full_grad")
    if own.comm.size == 1 and (local := _local_gradient(own)) is not None:
        return local.to(torch.float32, copy=True).div_(own.loss_scale)
    gradients, used = _gradients(own), _used(own)
    if gradients is None or used is None or not _any_rank(own, bool(used[own.index])):
        return None
    so_far = gradients.so_far()
    total = torch.zeros(own.slot.shape, dtype=torch.float32, device=own.comm.device)
    if _any_rank(own, so_far.reduced is not None):
        part = own.part_of(own.comm.rank)
        reduced = so_far.reduced
        mine = torch.zeros(part.numel) if reduced is None else _part_of_shard(own, reduced).load()
        total = _assemble(own, mine, torch.float32)
    if _any_rank(own, own.index in so_far.unreduced):
        total += _mean_of_unreduced(own, so_far)
    return total.div_(own.loss_scale)


def _mean_of_unreduced(own: Held, so_far: SoFar) -> torch.Tensor:
    """In rank order, group by group, as the ordered reduction does it."""
    mine = so_far.unreduced.get(own.index)
    addends = []
    for rank in range(own.comm.world.size):
        addend = torch.zeros(own.slot.shape, dtype=torch.float32, device=own.comm.device)
        if rank == own.comm.world.rank and mine is not None:
            addend.copy_(mine)
        own.ranks.share(addend, rank)
        addends.append(addend)
    sums = []
    for first in range(0, len(addends), own.comm.size):
        sums.append(torch.empty_like(addends[0]))
        mean_into(sums[-1], addends[first : first + own.comm.size], accumulate=False, factor=1.0)
    total = torch.empty_like(addends[0])
    mean_into(total, sums, accumulate=False, factor=1.0)
    return total.mul_(1.0 / len(addends))


@torch.no_grad()
def safe_get_local_grad(param: torch.Tensor) -> torch.Tensor | None:
    """[part] This rank's part of the gradient, as far as it is averaged; None where nothing is yet."""
    own = _held(param, "safe_get_local_grad")
    if own.comm.size == 1 and (local := _local_gradient(own)) is not None:
        return local.reshape(-1).to(torch.float32, copy=True).div_(own.loss_scale)
    gradients, used = _gradients(own), _used(own)
    if gradients is None or used is None:
        return None
    reduced = gradients.so_far().reduced
    if reduced is None:
        return None
    return _part_of_shard(own, reduced).load().to(torch.float32, copy=True).div_(own.loss_scale)


@torch.no_grad()
def safe_set_full_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Replace the gradient that the next step uses. Collective; rank 0's ``value`` counts.

    What is not averaged yet is averaged first, so call it between the last backward pass and ``step``.
    """
    own = _meet(param, "safe_set_full_grad")
    _check_shape(value, own.slot.shape, own, "safe_set_full_grad")
    value = _from_rank_0(own, value, torch.float32)
    part = own.part_of(own.comm.rank)
    _set_grad(own, value, value.reshape(-1)[part.begin : part.end])


@torch.no_grad()
def safe_set_local_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """[part] Replace this rank's part of the gradient that the next step uses. Collective, each with its part.

    Where several ranks hold one part the first one's counts.
    """
    own = _meet(param, "safe_set_local_grad")
    part = own.part_of(own.comm.rank)
    _check_shape(value, (part.numel,), own, "safe_set_local_grad")
    value = _of_first_replica(own, value)
    _set_grad(own, value.reshape(own.slot.shape) if own.comm.size == 1 else None, value)


def _set_grad(own: Held, whole: torch.Tensor | None, mine: torch.Tensor) -> None:
    step = own.step
    if step is None or not own.segment.trainable:
        raise StateError(f"the gradient of {own.name!r} was to be set, but no optimizer steps it.")
    own.schedule.reshard_all()
    step.settle(own.global_step)
    gradients, used = _gradients(own), _used(own)
    local = _local_gradient(own) if own.comm.size == 1 else None
    if local is not None and whole is not None:
        local.copy_(whole).mul_(own.loss_scale)
        return
    reduced = None if gradients is None else gradients.so_far().reduced
    if used is None or not _any_rank(own, reduced is not None):
        raise StateError(
            f"the gradient of {own.name!r} was to be set, but there is none: set it between backward and step."
        )
    if reduced is not None:
        _part_of_shard(own, reduced).save(mine * own.loss_scale)
    used[own.index] = 1
    step.clamp(float("inf"))  # limits nothing, and makes the norm be found anew


# --- the optimizer's state --------------------------------------------------------------------------------------------


def _states(own: Held, key: str, ranks: Iterable[int]) -> list[tuple[Span, Rest]]:
    """What is here of the state ``key`` of those ranks' shards."""
    step = _step_of(own)
    return [
        (piece.within_parameter, piece.elementwise[key])
        for rank in ranks
        for piece in step.states(rank)
        if piece.name == own.name and key in piece.elementwise
    ]


def _step_of(own: Held) -> Step:
    if own.step is None:
        raise StateError(f"the optimizer's state of {own.name!r} was asked for, but the engine has no optimizer.")
    return own.step


def _known_kinds(own: Held) -> set[str]:
    return {key for piece in _step_of(own).states() if piece.name == own.name for key in piece.elementwise}


@torch.no_grad()
def safe_get_full_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """The whole of a state that has a number for each element (``exp_avg``, ``exp_avg_sq`` …), in fp32; a copy.

    None where the optimizer keeps no such state for it, or none yet. Collective.
    """
    own = _meet(param, "safe_get_full_optimizer_state")
    parts = _states(own, optim_state_key, [own.comm.rank])
    if not _any_rank(own, bool(parts)):
        return None
    return _assemble(own, _joined(own, parts), torch.float32)


def _joined(own: Held, parts: list[tuple[Span, Rest]]) -> torch.Tensor:
    if not parts:
        return torch.zeros(0, device=own.comm.device)
    return torch.cat([values.load() for _, values in sorted(parts, key=lambda part: part[0].begin)])


@torch.no_grad()
def safe_get_local_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """[part] This rank's part of it; None where this rank has none."""
    own = _held(param, "safe_get_local_optimizer_state")
    parts = _states(own, optim_state_key, [own.comm.rank])
    return _joined(own, parts).to(torch.float32, copy=True) if parts else None


@torch.no_grad()
def safe_set_full_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Replace such a state on all ranks that keep it. Collective; rank 0's ``value`` counts.

    Raises:
        StateError: there is no such state, or none yet.
    """
    own = _meet(param, "safe_set_full_optimizer_state")
    _check_shape(value, own.slot.shape, own, "safe_set_full_optimizer_state")
    flat = _from_rank_0(own, value, torch.float32).view(-1)
    parts = _states(own, optim_state_key, range(own.comm.size) if own.comm.size > 1 else [0])
    _set_state(own, optim_state_key, parts, lambda span: flat[span.begin : span.end])


@torch.no_grad()
def safe_set_local_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """[part] Replace this rank's part of such a state, where it is sharded. Every rank calls it, each with its part.

    Where several ranks hold one part the first one's counts.

    Raises:
        ConfigError: every rank keeps the whole state; ``safe_set_full_optimizer_state`` keeps these alike.
        StateError: there is no such state, or none yet.
    """
    own = _meet(param, "safe_set_local_optimizer_state")
    if not own.segment.sharding.optimizer and own.comm.world.size > 1:
        raise ConfigError(
            f"safe_set_local_optimizer_state() of {own.name!r}: every rank keeps all of it: they would differ then. "
            "Use safe_set_full_optimizer_state()."
        )
    mine = own.part_of(own.comm.rank)
    _check_shape(value, (mine.numel,), own, "safe_set_local_optimizer_state")
    value = _of_first_replica(own, value)
    parts = _states(own, optim_state_key, [own.comm.rank])
    _set_state(own, optim_state_key, parts, lambda span: value[span.begin - mine.begin : span.end - mine.begin])


def _set_state(own: Held, key: str, parts: list[tuple[Span, Rest]], value_of: Callable[[Span], torch.Tensor]) -> None:
    if not _any_rank(own, bool(parts)):
        kinds = ", ".join(sorted(_known_kinds(own))) or "nothing yet"
        raise StateError(f"the optimizer keeps no {key!r} of {own.name!r} that could be set: it keeps {kinds}.")
    _step_of(own).readers.wait()
    for span, values in parts:
        values.save(value_of(span))
