"""The user's optimizer over shards: it keeps its class, its groups and its settings, and steps other tensors.

Each rank's shard of each flat buffer is cut into *runs*: neighbouring parameters of one optimizer group, in pieces that
stay in cache. An optimizer that needs whole matrices gets, as its runs, the whole parameters that this rank owns.

A parameter that got no gradient on any rank is left out of the step, as plain torch leaves out a parameter without
``.grad``: its moments and its step count stay. A run that holds used and unused parameters is split there, for good.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from shardwise.errors import ConfigError, StateError
from shardwise.layout import NO_GROUP, Layout, Span
from shardwise.optim.probe import OptimizerTraits
from shardwise.zero.rest import InMemory, Rest
from shardwise.zero.unit import Segment, Unit

CPU_RUN_NUMEL = 1 << 18
"""Elements of a run on the CPU: parameter, gradient, two moments and a temporary of it stay in the cache."""


@dataclass(slots=True)
class Run:
    """A tensor that the optimizer steps: ``span`` of the flat buffer of ``segment``.

    Where the segment's states rest in a store it has memory only while they are brought in.
    """

    segment: Segment
    group: int
    span: Span
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class StatePiece:
    """The optimizer's state of a part of one parameter."""

    name: str
    within_parameter: Span
    elementwise: Mapping[str, Rest]
    """[part] with a number for each of the part's elements."""
    others: Mapping[str, Any]
    """One for the whole parameter, such as its step count."""


class SavedStates(Protocol):
    """The optimizer's state as a checkpoint holds it, parameter by parameter."""

    def signature(self, name: str) -> Hashable:
        """Equal for parameters that may share a run: same kinds of state, same step count."""

    def kinds(self, name: str) -> Mapping[str, torch.dtype | None]:
        """The elementwise kinds and their dtypes; None: the dtype of what is stepped."""

    def others(self, name: str) -> dict[str, Any]:
        """What there is one of for the whole parameter; a new copy."""

    def read_state(self, kind: str, name: str, within_parameter: Span, out: torch.Tensor) -> None:
        """Fill ``out`` [part] with those elements, before anything is installed."""

    def check_state(self, kind: str, name: str, within_parameter: Span) -> None:
        """See that those elements can be read, before anything is installed."""

    def read_state_now(self, kind: str, name: str, within_parameter: Span, out: torch.Tensor) -> None:
        """Fill ``out`` [part] with those elements at once."""


class ShardedOptimizer:
    """Steps ``inner`` over this rank's runs.

    Args:
        inner: the user's optimizer; its groups are re-pointed to the runs, everything else stays.
        traits: what ``probe_optimizer`` measured.
        units: all units; the groups of their layouts refer to ``inner.param_groups``.
        max_run_numel: elements that one run may hold.
        unit_by_unit: step each unit by a call of its own, so that its values travel while the next is stepped.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        traits: OptimizerTraits,
        units: Sequence[Unit],
        max_run_numel: int,
        unit_by_unit: bool,
    ) -> None:
        self.inner = inner
        self._traits = traits
        self._max_run_numel = max_run_numel
        self._runs: dict[Unit, list[Run]] = {
            unit: [run for segment in unit.segments for run in self._cut(segment)] for unit in units
        }
        self._batches = [[unit] for unit in units] if unit_by_unit and traits.streamable else [list(units)]
        self._stepping: int | None = None
        """The thread that is inside ``step``."""
        self._known_groups = len(inner.param_groups)
        self._take_over_state()
        self._point_groups(run for runs in self._runs.values() for run in runs)
        guard = weakref.ref(self)
        self._guard = inner.register_step_pre_hook(lambda *_: _refuse_foreign_step(guard()))

    # ----------------------------------------------------------------------------------------------------- runs

    def _cut(self, segment: Segment) -> list[Run]:
        if segment.gradients is None:
            return []
        if self._traits.elementwise:
            pieces = list(segment.layout.runs(segment.parameters.master_span, self._max_run_numel))
            return [self._run(segment, group, span) for group, span in pieces]
        return [
            self._run(segment, slot.group, slot.span, slot.shape)
            for slot in segment.layout.slots
            if slot.group != NO_GROUP and slot.span.intersect(segment.parameters.master_span).numel
        ]

    @staticmethod
    def _run(segment: Segment, group: int, span: Span, shape: tuple[int, ...] | None = None) -> Run:
        assert segment.gradients is not None
        local = span.shift(-segment.parameters.master_span.begin)
        tensor = segment.parameters.master[local.begin : local.end].detach()
        gradient = segment.gradients.for_optimizer[local.begin : local.end]
        if shape is not None:
            tensor, gradient = tensor.view(shape), gradient.view(shape)
        tensor.grad = gradient
        return Run(segment, group, span, tensor)

    def _point_groups(self, runs: Iterable[Run]) -> None:
        for group in self.inner.param_groups[: self._known_groups]:
            group["params"] = []
        for run in runs:
            self.inner.param_groups[run.group]["params"].append(run.tensor)

    def _take_over_state(self) -> None:
        """State that was made for the user's parameters (Adagrad makes it at once) moves to the runs."""
        former = dict(self.inner.state)
        self.inner.state.clear()
        for runs in self._runs.values():
            for run in runs:
                state = _state_of_run(run, former)
                if state:
                    self.inner.state[run.tensor] = state

    # ----------------------------------------------------------------------------------------------------- step

    def step(self, unused: frozenset[str], stepped: frozenset[Unit]) -> Iterator[list[Unit]]:
        """Step everything but the parameters named in ``unused``; yields units as they are done.

        ``stepped``: units whose states off the device were stepped before; they are yielded, too.
        """
        if unused:
            self._split_runs(unused)
        self._stepping = threading.get_ident()
        try:
            for batch in self._batches:
                used = [run for unit in batch for run in self._runs[unit] if not unused or not is_unused(run, unused)]
                self._point_groups(used)
                if used:
                    self.inner.step()
                yield batch
        finally:
            self._stepping = None
            self._point_groups(run for runs in self._runs.values() for run in runs)

    @property
    def stepping(self) -> bool:
        """Whether the engine steps in the calling thread: anybody else must not step the inner optimizer."""
        return self._stepping == threading.get_ident()

    def _split_runs(self, unused: frozenset[str]) -> None:
        """Cut runs in which used and unused parameters meet, so that each has its own state from now on."""
        for unit, runs in self._runs.items():
            if any(_is_mixed(run, unused) for run in runs):
                self._runs[unit] = [part for run in runs for part in self._split(run, unused)]

    def _split(self, run: Run, unused: frozenset[str]) -> list[Run]:
        if not _is_mixed(run, unused):
            return [run]
        state: dict[str, Any] = self.inner.state.pop(run.tensor, {})
        parts = []
        for span in _spans_of_one_kind(run, unused.__contains__):
            part = self._run(run.segment, run.group, span)
            parts.append(part)
            if state:
                begin = span.begin - run.span.begin
                self.inner.state[part.tensor] = {
                    key: _part_of_state(value, run.tensor, begin, span.numel) for key, value in state.items()
                }
        return parts

    # --------------------------------------------------------------------------------------------------- groups

    def adopt_new_groups(self, owners: Mapping[torch.Tensor, tuple[Unit, int, int]]) -> None:
        """Take in groups that the user added after construction.

        Args:
            owners: unit, number of the segment in it, and slot of every parameter of the model.

        Raises:
            ConfigError: a parameter is foreign, frozen when the engine was built, or in another group already.
        """
        groups = self.inner.param_groups
        for number in range(self._known_groups, len(groups)):
            members = [parameter for parameter in groups[number]["params"] if isinstance(parameter, torch.Tensor)]
            for parameter in members:
                if parameter not in owners:
                    raise ConfigError(f"{describe(parameter)} of the added group {number} is not in the model.")
                unit, segment_number, slot_index = owners[parameter]
                self._assign_group(unit, segment_number, slot_index, number)
            self._known_groups = number + 1
        self._point_groups(run for runs in self._runs.values() for run in runs)

    @property
    def has_new_groups(self) -> bool:
        """Whether the user added a group since the last step."""
        return len(self.inner.param_groups) > self._known_groups

    def _assign_group(self, unit: Unit, segment_number: int, slot_index: int, group: int) -> None:
        segment = unit.segments[segment_number]
        slot = segment.layout.slots[slot_index]
        if segment.gradients is None:
            raise ConfigError(
                f"parameter {slot.name!r} of the added group {group} was frozen when the engine was built, so it has "
                "no room for gradients. Expected a parameter that was trainable then: initialize again."
            )
        if slot.group != NO_GROUP:
            raise ConfigError(f"parameter {slot.name!r} of the added group {group} is in group {slot.group} already.")
        slots = list(segment.layout.slots)
        slots[slot_index] = replace(slot, group=group)
        alone = replace(segment, layout=Layout((slots[slot_index],), segment.layout.cuts))
        self._runs[unit] += self._cut(alone)
        changed = replace(segment, layout=Layout(tuple(slots), segment.layout.cuts))
        segments = list(unit.segments)
        segments[segment_number] = changed
        unit.replace_segments(segments)
        for run in self._runs[unit]:
            if run.segment in (segment, alone):
                run.segment = changed

    # ---------------------------------------------------------------------------------------------- checkpoints

    def states(self, rank: int) -> Iterator[StatePiece]:
        """This rank's state of what is ``rank``'s shard; its own is what it keeps in a checkpoint.

        It is the state of the moment of the call, whenever before the next step it is iterated.
        """
        held = [
            (run, self._elementwise_of(run), split_state(self.inner.state[run.tensor], run.tensor)[1])
            for runs in self._runs.values()
            for run in runs
            if self._has_state(run)
        ]
        return (piece for each in held for piece in _pieces_of(*each, rank))

    def _has_state(self, run: Run) -> bool:
        return bool(self.inner.state.get(run.tensor))

    def _elementwise_of(self, run: Run) -> Mapping[str, Rest]:
        """[run] the state with a number for each element."""
        elementwise, _ = split_state(self.inner.state[run.tensor], run.tensor)
        return {key: InMemory(value.reshape(-1)) for key, value in elementwise.items()}

    def read_states(self, saved: SavedStates) -> Callable[[], None]:
        """Read the state of this rank's runs; what is returned puts it in the place of the present one."""
        new_runs = {
            unit: [part for run in runs for part in self._split_by(run, saved.signature)]
            for unit, runs in self._runs.items()
        }
        installs = [
            self._read_state(run, saved)
            for runs in new_runs.values()
            for run in runs
            if saved.signature(run.segment.names[next(run.segment.layout.pieces(run.span)).slot])
        ]

        def install() -> None:
            self._runs = new_runs
            self._forget_states()
            for put in installs:
                put()
            self._point_groups(run for runs in new_runs.values() for run in runs)

        return install

    def _forget_states(self) -> None:
        self.inner.state.clear()

    def _split_by(self, run: Run, kind_of: Callable[[str], Hashable]) -> list[Run]:
        spans = _spans_of_one_kind(run, kind_of)
        return [run] if len(spans) == 1 else [self._run(run.segment, run.group, span) for span in spans]

    def _read_state(self, run: Run, saved: SavedStates) -> Callable[[], None]:
        pieces = list(run.segment.layout.pieces(run.span))
        name = run.segment.names[pieces[0].slot]
        state = others_beside(saved.others(name), run.tensor, self.inner.param_groups[run.group])
        for kind, dtype in saved.kinds(name).items():
            whole = torch.zeros(run.span.numel, dtype=dtype or run.tensor.dtype, device=run.tensor.device)
            for piece in pieces:
                place = piece.within_buffer.shift(-run.span.begin)
                out = whole[place.begin : place.end]
                saved.read_state(kind, run.segment.names[piece.slot], piece.within_parameter, out)
            state[kind] = whole.view(run.tensor.shape)
        return partial(self.inner.state.__setitem__, run.tensor, state)

    # --------------------------------------------------------------------------------------------------- memory

    def state_bytes(self) -> int:
        """Bytes of the optimizer's own tensors on this rank (Adam's two moments), 0 before the first step."""
        return sum(
            value.nbytes
            for state in self.inner.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.numel() > 1
        )

    def predicted_state_bytes(self) -> int:
        """The same by arithmetic: elements that this rank steps, times the state tensors that each of them has."""
        every_run = [run for runs in self._runs.values() for run in runs]
        per_element: dict[int, int] = {}  # of each group, since groups may follow different rules
        for run in every_run:
            kept = _elementwise_state(self.inner.state.get(run.tensor, {}))
            per_element[run.group] = max(kept, per_element.get(run.group, 0))
        return sum(run.span.numel * run.tensor.itemsize * per_element[run.group] for run in every_run)

    def close(self) -> None:
        """Let the inner optimizer go."""
        self._guard.remove()
        for group in self.inner.param_groups:
            group["params"] = []
        self.inner.state.clear()
        self._runs.clear()


def _elementwise_state(state: dict[str, Any]) -> int:
    return sum(1 for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1)


def _state_of_run(run: Run, former: Mapping[torch.Tensor, dict[str, Any]]) -> dict[str, Any]:
    """Join what the parameters of a run had: elementwise tensors piece by piece, everything else must be alike.

    Raises:
        ConfigError: parameters of one run were stepped differently often.
    """
    pieces = list(run.segment.layout.pieces(run.span))
    parameters = [run.segment.parameters.parameters[piece.slot] for piece in pieces]
    states = [former.get(parameter, {}) for parameter in parameters]
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for state in states for key in state):
        values: list[Any] = [state.get(key) for state in states]
        if key != "step" and all(
            isinstance(value, torch.Tensor) and value.shape == parameter.shape
            for value, parameter in zip(values, parameters, strict=True)
        ):
            whole = torch.zeros(run.span.numel, dtype=run.tensor.dtype, device=run.tensor.device)
            for piece, value in zip(pieces, values, strict=True):
                source, place = piece.within_parameter, piece.within_buffer.shift(-run.span.begin)
                whole[place.begin : place.end] = value.reshape(-1)[source.begin : source.end]
            joined[key] = whole.view(run.tensor.shape)
        elif all(_alike(value, values[0]) for value in values):
            joined[key] = copy.deepcopy(values[0])
        else:
            names = [run.segment.names[piece.slot] for piece in pieces]
            raise ConfigError(
                f"the optimizer's state {key!r} differs between {names[0]!r} and its neighbours up to {names[-1]!r}. "
                "Expected a new optimizer, or one that has stepped all its parameters alike."
            )
    return joined


def _alike(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)


def _refuse_foreign_step(optimizer: ShardedOptimizer | None) -> None:
    if optimizer is not None and not optimizer.stepping:
        raise StateError(
            "step() was called on the optimizer that was passed to initialize(): it would step shards whose gradients "
            "are not averaged. Call engine.step(), or step() of the optimizer that initialize() returned."
        )


def _pieces_of(run: Run, elementwise: Mapping[str, Rest], others: Mapping[str, Any], rank: int) -> Iterator[StatePiece]:
    layout = run.segment.layout
    for piece in layout.pieces(run.span.intersect(layout.shard(rank))):
        part = piece.within_buffer.shift(-run.span.begin)
        values = {key: value.part(part) for key, value in elementwise.items()}
        yield StatePiece(run.segment.names[piece.slot], piece.within_parameter, values, others)


def is_unused(run: Run, unused: frozenset[str]) -> bool:
    """Whether all parameters of the run are among ``unused``."""
    return all(run.segment.names[piece.slot] in unused for piece in run.segment.layout.pieces(run.span))


def _is_mixed(run: Run, unused: frozenset[str]) -> bool:
    kinds = {run.segment.names[piece.slot] in unused for piece in run.segment.layout.pieces(run.span)}
    return len(kinds) == 2


def _spans_of_one_kind(run: Run, kind_of: Callable[[str], Hashable]) -> list[Span]:
    spans: list[tuple[Hashable, Span]] = []
    for piece in run.segment.layout.pieces(run.span):
        kind = kind_of(run.segment.names[piece.slot])
        if spans and spans[-1][0] == kind:
            spans[-1] = (kind, Span(spans[-1][1].begin, piece.within_buffer.end))
        else:
            spans.append((kind, piece.within_buffer))
    return [span for _, span in spans]


def _part_of_state(value: Any, tensor: torch.Tensor, begin: int, numel: int) -> Any:
    """What a part of a run takes over: its slice of elementwise state, a copy of everything else."""
    if not isinstance(value, torch.Tensor):
        return value
    return value[begin : begin + numel] if value.shape == tensor.shape else value.clone()


def split_state(state: Mapping[str, Any], tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The entries with a number for each element of ``tensor``, and the rest; "step" is always one for all."""
    elementwise = {
        key: value
        for key, value in state.items()
        if key != "step" and isinstance(value, torch.Tensor) and value.shape == tensor.shape
    }
    return elementwise, {key: value for key, value in state.items() if key not in elementwise}


def others_beside(others: dict[str, Any], tensor: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a checkpoint where torch keeps them: step counts on the CPU, unless a kernel reads them."""
    on_device = group.get("capturable") or group.get("fused")
    return {
        key: value.to(tensor.device) if isinstance(value, torch.Tensor) and (on_device or value.dim()) else value
        for key, value in others.items()
    }


def describe(parameter: torch.Tensor) -> str:
    """A parameter without a name, for messages."""
    return f"a parameter of shape {tuple(parameter.shape)} and dtype {parameter.dtype}"
