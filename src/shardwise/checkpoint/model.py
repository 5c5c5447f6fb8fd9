"""One model in a checkpoint: what a rank writes of it, what the ranks' parts make together, and how it is read back.

Everything is cut by parameter: a rank writes the elements of its shard, a reader asks for the elements that it will
hold, and where both meet is interval overlap. Neither knows the other's world or stage.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from shardwise.checkpoint.manifest import ModelRecord, ParameterRecord
from shardwise.checkpoint.shard_file import Entry, bytes_of
from shardwise.checkpoint.tree import DTYPE_NAMES, DTYPES, Put, decode, encode
from shardwise.comm.base import CollectiveId, Communicator
from shardwise.errors import CheckpointError
from shardwise.layout import Span
from shardwise.precision import LossScaler, master_dtype
from shardwise.zero.gradients import SoFar
from shardwise.zero.rest import InMemory, Rest
from shardwise.zero.step import Step
from shardwise.zero.unit import Segment, Unit

WEIGHT = "weight"
BUFFER = "buffer"
HOW_IT_WORKS = frozenset({"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"})
"""Settings of an optimizer's groups that say how it works, not how it learns."""
REDUCED = "gradient"
UNREDUCED = "gradient of rank"


def state_kind(key: str) -> str:
    """The kind under which files hold an optimizer's elementwise state."""
    return f"state.{key}"


def key_of(model: int, kind: str, name: str, begin: int = 0) -> str:
    """The name of a tensor in a file."""
    return f"{model}/{kind}/{name}/{begin}"


@dataclass(frozen=True)
class Trained:
    """A model and its training as an engine holds them."""

    name: str
    comm: Communicator
    units: Sequence[Unit]
    references: Mapping[str, Any]
    """The state dict with the model's own parameters and buffers as values."""
    optimizer: torch.optim.Optimizer | None
    step: Step | None
    scheduler: Any
    scaler: LossScaler
    counters: Mapping[str, int]
    stage: int


class Slice(NamedTuple):
    """The part of one parameter that rests on this rank."""

    name: str
    within_parameter: Span
    values: Rest  # [part]


class IncompatibleKeys(NamedTuple):
    """Names that a load did not find, and names that it did not want."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def slices_of(segment: Segment, span: Span) -> Iterator[Slice]:
    """The parts of parameters that lie in ``span``, which this rank holds."""
    home = segment.parameters
    for piece in segment.layout.pieces(span):
        part = piece.within_buffer.shift(-home.master_span.begin)
        name = segment.names[piece.slot]
        yield Slice(name, piece.within_parameter, home.resting.part(part))


# --- saving -----------------------------------------------------------------------------------------------------------


class Part:
    """What this rank writes of a model: entries of its file, and its words for the manifest.

    What several replicas hold the first one writes; of the others there is what only they know. The optimizer's state
    of this moment comes in with ``plan_states``, which may be called beside training where ``can_wait``.

    Args:
        index: of the model in the checkpoint.
        trained: the model.
        put: where tensors of trees go.
        exclude_frozen: leave frozen parameters out.
    """

    def __init__(self, index: int, trained: Trained, put: Put, exclude_frozen: bool) -> None:
        self._index = index
        self._trained = trained
        self._put = put
        self._writes_states = trained.comm.replica == 0
        self.entries: list[Entry] = []
        """What training may change at once."""
        self._states = trained.step.states() if trained.step is not None and self._writes_states else iter(())
        self.excluded = [
            name
            for unit in trained.units
            for segment in unit.segments
            if exclude_frozen and not segment.trainable
            for name in segment.names
        ]
        self._words: dict[str, dict[str, Any]] = {}
        if self._writes_states:
            self._weights()
        self._gradients()
        self.buffers = self._buffers()
        self.rest = self._rest()

    def describe(self) -> dict[str, dict[str, Any]]:
        """What all ranks know alike of each parameter."""
        excluded = frozenset(self.excluded)
        return {
            slot.name: {
                "shape": tuple(slot.shape),
                "dtype": DTYPE_NAMES[segment.parameters.resting.dtype],
                "compute": DTYPE_NAMES[segment.dtype],
                "trainable": segment.trainable,
                "group": slot.group,
            }
            for unit in self._trained.units
            for segment in unit.segments
            for slot in segment.layout.slots
            if slot.name not in excluded
        }

    def _of(self, name: str) -> dict[str, Any]:
        """The words of one parameter."""
        return self._words.setdefault(name, {})

    def _weights(self) -> None:
        excluded = frozenset(self.excluded)
        for unit in self._trained.units:
            for segment in unit.segments:
                for name, span, values in slices_of(segment, segment.layout.shard(self._trained.comm.rank)):
                    if name not in excluded:
                        self._of(name).setdefault("pieces", []).append([span.begin, span.end])
                        self._add(WEIGHT, name, span.begin, [values])

    def plan_states(self) -> list[Entry]:
        """What only steps change, and they wait for ``StateReaders``. To be called once, before the next step."""
        parts: dict[tuple[str, str], list[Rest]] = {}
        begins: dict[str, int] = {}
        for piece in self._states:
            if piece.name not in begins:
                begins[piece.name] = piece.within_parameter.begin
                said = self._of(piece.name)
                said["others"] = encode(dict(piece.others), self._put, f"optimizer.{piece.name}")
                said["state"] = {k: DTYPE_NAMES[v.dtype] for k, v in piece.elementwise.items()}
            for key, values in piece.elementwise.items():
                parts.setdefault((key, piece.name), []).append(values)
        # Runs cut finer than shards: what they hold of a piece is joined.
        return [self._entry(state_kind(key), name, begins[name], joined) for (key, name), joined in parts.items()]

    @property
    def can_wait(self) -> bool:
        """Whether ``plan_states`` can be called beside training: the state is in plain host memory, or there is none.

        What is on a device is copied in the order of its stream, and stores move what they hold.
        """
        units = self._trained.units
        is_in_store = any(segment.states is not None for unit in units for segment in unit.segments)
        return self._trained.comm.device.type == "cpu" and not is_in_store

    def watched(self) -> list[tuple[str, torch.Tensor]]:
        """The optimizer's tensors, with the names of their kinds."""
        optimizer = self._trained.optimizer
        states = () if optimizer is None else optimizer.state.values()
        return [(key, v) for state in states for key, v in state.items() if isinstance(v, torch.Tensor)]

    def _gradients(self) -> None:
        """Of a step under way."""
        rank = self._trained.comm.rank
        for unit in self._trained.units:
            for segment, gradients in unit.trainable:
                so_far = gradients.so_far()
                if so_far.reduced is not None and self._writes_states:
                    shard = segment.layout.shard(rank)
                    for piece in segment.layout.pieces(shard):
                        part = piece.within_buffer.shift(-shard.begin)
                        values = so_far.reduced.part(part)
                        self._add_gradient(REDUCED, segment.names[piece.slot], values, piece.within_parameter)
                for slot, whole in so_far.unreduced.items():
                    rest = InMemory(whole.reshape(-1))
                    self._add_gradient(UNREDUCED, segment.names[slot], rest, Span(0, whole.numel()))
        if self._trained.step is not None:
            for name, whole in self._trained.step.local_gradients().items():
                self._add_gradient(REDUCED, name, InMemory(whole.reshape(-1)), Span(0, whole.numel()))

    def _add_gradient(self, kind: str, name: str, values: Rest, span: Span) -> None:
        said = self._of(name).setdefault("gradient", {})
        said["reduced" if kind == REDUCED else "unreduced"] = DTYPE_NAMES[values.dtype]
        self._add(kind, name, span.begin, [values])

    def _add(self, kind: str, name: str, begin: int, parts: list[Rest]) -> None:
        self.entries.append(self._entry(kind, name, begin, parts))

    def _entry(self, kind: str, name: str, begin: int, parts: list[Rest]) -> Entry:
        numel = sum(part.numel for part in parts)
        return Entry(key_of(self._index, kind, name, begin), parts[0].dtype, (numel,), tuple(parts))

    def _buffers(self) -> dict[str, str]:
        """Digests of the buffers: ranks whose buffers are rank 0's need not write them."""
        digests = {}
        for name, value in self._trained.references.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                digests[name] = _digest(value.detach().cpu().contiguous())
        return digests

    @property
    def is_in_files(self) -> bool:
        """Whether some of it is in no memory; known before ``plan_states``."""
        states = (segment.states for unit in self._trained.units for segment in unit.segments)
        return any(each is not None and not each.in_memory for each in states) or any(
            rest.memory() is None for entry in self.entries for rest in entry.parts
        )

    def forget_entries(self) -> None:
        """They are in other hands; what was said of them stays."""
        self.entries = []

    def buffer_entries(self, wanted: Collection[str]) -> list[Entry]:
        """Those, for they are this rank's own to write."""
        references = self._trained.references
        return [Entry.of(key_of(self._index, BUFFER, name), references[name].detach()) for name in wanted]

    def _rest(self) -> dict[str, Any]:
        trained = self._trained
        names = {id(p): name for name, p in _parameters_of(trained.units)}
        optimizer = None
        if trained.optimizer is not None:
            groups = [{k: v for k, v in group.items() if k != "params"} for group in trained.optimizer.param_groups]
            optimizer = {
                "class": type(trained.optimizer).__name__,
                "groups": encode(groups, self._put, "optimizer.param_groups"),
            }
        scheduler = trained.scheduler.state_dict() if hasattr(trained.scheduler, "state_dict") else None
        return {
            "name": trained.name,
            "stage": trained.stage,
            "names": {name: names[id(v)] for name, v in trained.references.items() if id(v) in names},
            "excluded": self.excluded,
            "optimizer": optimizer,
            "scheduler": encode(scheduler, self._put, "lr_scheduler"),
            "scaler": encode(trained.scaler.state_dict(), self._put, "loss_scaler"),
            "counters": dict(trained.counters),
        }

    def words(self) -> dict[str, Any]:
        """For rank 0: what the manifest needs of this rank, after ``plan_states``; the rest all ranks know alike."""
        return self._words


def owners_of_buffers(digests: Sequence[Mapping[str, str]]) -> dict[str, tuple[int, ...]]:
    """The ranks that write each buffer: rank 0, and those whose values differ from its; of each rank's ``buffers``."""
    return {
        name: (0, *(rank for rank, said in enumerate(digests) if rank and said.get(name) != digest))
        for name, digest in digests[0].items()
    }


def merge(part: Part, words: Sequence[Mapping[str, Any]], owners: Mapping[str, tuple[int, ...]]) -> ModelRecord:
    """The model's record: this rank's description, and where each rank's file holds what.

    Args:
        part: of this rank.
        words: of each rank's part.
        owners: of the buffers.
    """
    parameters = {}
    for name, described in part.describe().items():
        said = [word.get(name, {}) for word in words]
        pieces = sorted(
            (begin, end, rank) for rank, record in enumerate(said) for begin, end in record.get("pieces", ())
        )
        parameters[name] = ParameterRecord(
            **described,
            pieces=tuple((rank, begin, end) for begin, end, rank in pieces),
            state=next((record["state"] for record in said if record.get("state")), {}),
            others=next((record["others"] for record in said if record.get("others")), None),
            gradient=_merge_gradient([record.get("gradient", {}) for record in said]),
        )
    return ModelRecord(parameters=parameters, buffers=dict(owners), **part.rest)


def _merge_gradient(said: Sequence[Mapping[str, str]]) -> dict[str, Any] | None:
    reduced = next((words["reduced"] for words in said if "reduced" in words), None)
    ranks = [rank for rank, words in enumerate(said) if "unreduced" in words]
    if reduced is None and not ranks:
        return None
    unreduced = said[ranks[0]]["unreduced"] if ranks else None
    return {"reduced": reduced, "unreduced": unreduced, "ranks": ranks}


# --- loading ----------------------------------------------------------------------------------------------------------


class Reads(Protocol):
    """The files of a checkpoint."""

    @property
    def world(self) -> int:
        """Ranks that wrote them."""

    def check(self, file: int, key: str, begin: int, end: int) -> None:
        """Note that the bytes of these elements are to be checked."""

    def read_later(self, file: int, key: str, begin: int, out: torch.Tensor) -> None:
        """Note that ``out`` is to be filled with the elements from ``begin`` on."""

    def settle(self) -> None:
        """Do what was noted."""

    def read_into(self, file: int, key: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` with the elements from ``begin`` on, now."""

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of a tree."""

    def entry(self, file: int, key: str) -> torch.Tensor:
        """A whole tensor of a file."""


class SavedModel:
    """One model of a checkpoint, to be read into another engine than the one that wrote it.

    It is what ``Step.read_states`` reads from.
    """

    def __init__(self, index: int, record: ModelRecord, files: Reads) -> None:
        self.index = index
        self.record = record
        self.files = files

    def check_weight(self, name: str, span: Span) -> None:
        """Note that the bytes which ``read_weight`` will read are to be checked."""
        for file, key, common, begin in self._overlaps(WEIGHT, name, span):
            self.files.check(file, key, common.begin - begin, common.end - begin)

    def read_weight(self, name: str, span: Span, out: torch.Tensor) -> None:
        """Note that ``out`` [span] is to be filled with those elements of a parameter."""
        self._read_later(WEIGHT, name, span, out)

    def read_weight_now(self, name: str, span: Span, out: torch.Tensor) -> None:
        """Fill ``out`` [span], at once."""
        self._read(WEIGHT, name, span, out)

    def _read_later(self, kind: str, name: str, span: Span, out: torch.Tensor) -> None:
        for file, key, common, begin in self._overlaps(kind, name, span):
            place = common.shift(-span.begin)
            self.files.read_later(file, key, common.begin - begin, out[place.begin : place.end])

    def _read(self, kind: str, name: str, span: Span, out: torch.Tensor) -> None:
        for file, key, common, begin in self._overlaps(kind, name, span):
            place = common.shift(-span.begin)
            self.files.read_into(file, key, common.begin - begin, out[place.begin : place.end])

    def _overlaps(self, kind: str, name: str, span: Span) -> Iterator[tuple[int, str, Span, int]]:
        for file, begin, end in self.record.parameters[name].pieces:
            common = span.intersect(Span(begin, end))
            if common.numel:
                yield file, key_of(self.index, kind, name, begin), common, begin

    def reduced_gradient(self, name: str, span: Span, dtype: torch.dtype, mean: bool) -> torch.Tensor | None:
        """The averaged gradient so far; None where there is none.

        Args:
            name: of the parameter.
            span: which elements.
            dtype: of the result.
            mean: add the mean over ranks of what was not averaged yet, for a world of another size.
        """
        if not self.has_reduced_gradient(name, mean):
            return None
        said = self.record.parameters[name].gradient
        total = torch.zeros(span.numel, dtype=dtype)
        if mean:
            part = torch.empty_like(total)
            for rank in said["ranks"]:
                self.files.read_into(rank, key_of(self.index, UNREDUCED, name), span.begin, part)
                total.add_(part)
            total.mul_(1.0 / self.files.world)
        if said["reduced"] is not None:
            part = torch.empty_like(total)
            self._read(REDUCED, name, span, part)
            total.add_(part)
        return total

    def unreduced_gradient(self, name: str, rank: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What ``rank`` had not averaged yet, whole and flat; None where there is nothing."""
        record = self.record.parameters[name]
        if record.gradient is None or rank not in record.gradient["ranks"]:
            return None
        whole = torch.empty(math.prod(record.shape), dtype=dtype)
        self.files.read_into(rank, key_of(self.index, UNREDUCED, name), 0, whole)
        return whole

    def buffer(self, name: str, rank: int | None) -> torch.Tensor:
        """A buffer as ``rank`` had it; None: as rank 0 had it."""
        owners = self.record.buffers[name]
        return self.files.entry(rank if rank in owners else owners[0], key_of(self.index, BUFFER, name))

    def tree(self, value: Any, place: str) -> Any:
        """A tree of the record, with its tensors."""
        return decode(value, self.files.tensor, place)

    def has_gradient(self, name: str) -> bool:
        """Whether the parameter had a gradient in the step that was under way."""
        record = self.record.parameters.get(name)
        return record is not None and record.gradient is not None

    def has_reduced_gradient(self, name: str, mean: bool) -> bool:
        """Whether ``reduced_gradient`` gives one."""
        return self.has_gradient(name) and (mean or self.record.parameters[name].gradient["reduced"] is not None)

    # As ``SavedStates``.

    def signature(self, name: str) -> Hashable:
        """Equal for parameters that may share a run; None where there is no state."""
        record = self.record.parameters.get(name)
        if record is None or (not record.state and record.others is None):
            return None
        return json.dumps([sorted(record.state), record.others], sort_keys=True)

    def kinds(self, name: str) -> Mapping[str, torch.dtype | None]:
        """State in the master's dtype follows the master to another one."""
        record = self.record.parameters[name]
        return {key: None if dtype == record.dtype else DTYPES[dtype] for key, dtype in record.state.items()}

    def others(self, name: str) -> dict[str, Any]:
        """What there is one of for the whole parameter."""
        others = self.tree(self.record.parameters[name].others, f"optimizer.{name}")
        return others if isinstance(others, dict) else {}

    def read_state(self, kind: str, name: str, within_parameter: Span, out: torch.Tensor) -> None:
        """Note that ``out`` is to be filled with those elements; it is, at the end of a ``Loading``'s first phase."""
        self._read_later(state_kind(kind), name, within_parameter, out)

    def check_state(self, kind: str, name: str, within_parameter: Span) -> None:
        """Note that the bytes of those elements are to be checked."""
        for file, key, common, begin in self._overlaps(state_kind(kind), name, within_parameter):
            self.files.check(file, key, common.begin - begin, common.end - begin)

    def read_state_now(self, kind: str, name: str, within_parameter: Span, out: torch.Tensor) -> None:
        """Fill ``out``, at once."""
        self._read(state_kind(kind), name, within_parameter, out)


@dataclass(frozen=True)
class Wishes:
    """What of a model is to be loaded."""

    optimizer: bool = True
    scheduler: bool = True
    strict: bool = True


class Loading:
    """Reads a model in two phases: ``__init__`` finds all faults and changes nothing; what follows changes the engine.

    ``begin``, ``read_weights`` and ``install`` follow, in this order.

    Args:
        saved: where from.
        trained: where to.
        wishes: what.
        same_world: as many ranks as saved it: each takes its own buffers.

    Raises:
        CheckpointError: names or shapes do not fit, another optimizer wrote it, or a file is damaged.
    """

    def __init__(self, saved: SavedModel, trained: Trained, wishes: Wishes, same_world: bool) -> None:
        self._saved = saved
        self._trained = trained
        self.keys = self._compare(wishes.strict)
        rank = trained.comm.world.rank if same_world else None
        self._buffers = {
            name: saved.buffer(name, rank)
            for name, value in trained.references.items()
            if name in saved.record.buffers and isinstance(value, torch.Tensor)
        }
        for segment in self._segments():
            for name, span, _ in self._wanted(segment):
                saved.check_weight(name, span)
        self._installs: list[Callable[[], None]] = []
        if wishes.optimizer and trained.optimizer is not None and trained.step is not None:
            self._installs.append(self._read_groups(trained.optimizer))
            self._installs.append(trained.step.read_states(saved))
            self._installs.append(self._read_gradients(trained.step, same_world))
        if wishes.optimizer:
            scaler = _dictionary(saved.tree(saved.record.scaler, "loss_scaler"), "loss_scaler")
            self._installs.append(lambda: _load_scaler(trained.scaler, scaler))
        if wishes.scheduler and hasattr(trained.scheduler, "load_state_dict") and saved.record.scheduler is not None:
            state = _dictionary(saved.tree(saved.record.scheduler, "lr_scheduler"), "lr_scheduler")
            self._installs.append(lambda: trained.scheduler.load_state_dict(state))
        saved.files.settle()

    def _segments(self) -> Iterator[Segment]:
        for unit in self._trained.units:
            yield from unit.segments

    def _wanted(self, segment: Segment) -> Iterator[Slice]:
        for part in slices_of(segment, segment.parameters.master_span):
            if part.name in self._saved.record.parameters:
                yield part

    def _compare(self, strict: bool) -> IncompatibleKeys:
        record, faults = self._saved.record, []
        own = {slot.name: slot.shape for segment in self._segments() for slot in segment.layout.slots}
        own_buffers = {
            name: tuple(value.shape)
            for name, value in self._trained.references.items()
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
        }
        missing = [name for name in own if name not in record.parameters and name not in record.excluded]
        missing += [name for name in own_buffers if name not in record.buffers]
        unexpected = [name for name in record.parameters if name not in own]
        unexpected += [name for name in record.buffers if name not in own_buffers]
        if strict:
            faults += [f"missing: {_listed(missing)}"] * bool(missing)
            faults += [f"unexpected: {_listed(unexpected)}"] * bool(unexpected)
        faults += [
            f"{name!r} has shape {tuple(saved.shape)}, expected {tuple(own[name])}"
            for name, saved in record.parameters.items()
            if name in own and tuple(saved.shape) != tuple(own[name])
        ][:5]
        if faults:
            raise CheckpointError(
                f"the checkpoint is not of this model: {'; '.join(faults)}. Build the model that was saved; "
                "load_module_strict=False ignores missing and unexpected names."
            )
        return IncompatibleKeys(missing, unexpected)

    def _read_groups(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        saved = self._saved.record.optimizer
        groups = optimizer.param_groups
        if saved is None:
            raise CheckpointError(
                "the checkpoint holds no optimizer: it was saved by an engine without one. Pass "
                "load_optimizer_states=False to begin with a new optimizer state."
            )
        # Others' files do not name the class; what may have written such state is listed.
        classes = saved.get("classes", [saved["class"]])
        if type(optimizer).__name__ not in classes or len(saved["groups"]) != len(groups):
            raise CheckpointError(
                f"the checkpoint was saved with {saved['class']} over {len(saved['groups'])} group(s), and the engine "
                f"has {type(optimizer).__name__} over {len(groups)}. Build the optimizer that was saved, or pass "
                "load_optimizer_states=False to begin with a new optimizer state."
            )
        settings = self._saved.tree(saved["groups"], "optimizer.param_groups")
        for group, new in zip(groups, settings, strict=True):
            for key, value in new.items():
                if isinstance(group.get(key), (int, float)) and not isinstance(value, (int, float, torch.Tensor)):
                    raise CheckpointError(
                        f"the checkpoint has {str(value)[:80]!r} for the optimizer's {key!r}: expected a number."
                    )

        def install() -> None:
            for group, new in zip(groups, settings, strict=True):
                for key, value in new.items():
                    present = group.get(key)
                    if isinstance(present, torch.Tensor) and isinstance(value, torch.Tensor):
                        present.copy_(value)
                    elif "classes" not in saved or (key in group and key not in HOW_IT_WORKS):
                        group[key] = value

        return install

    def _read_gradients(self, step: Step, same_world: bool) -> Callable[[], None]:
        """Of a step that was under way, for the units and for what is in none."""
        saved = self._saved
        if all(record.gradient is None for record in saved.record.parameters.values()):
            return lambda: None
        installs: list[Callable[[], None]] = []
        held: set[str] = set()
        for unit in self._trained.units:
            for number, (segment, gradients) in enumerate(unit.trainable):
                held |= set(segment.names)
                so_far = self._so_far(segment, same_world)
                installs.append(partial(gradients.resume, so_far))
                used = [saved.has_gradient(name) for name in segment.names]
                installs.append(partial(unit.used[number].__setitem__, slice(None), bytes(used)))
        local = {}
        for name, parameter in _parameters_of(self._trained.units):
            if name not in held and saved.has_gradient(name):
                gradient = saved.reduced_gradient(name, Span(0, parameter.numel()), parameter.dtype, mean=True)
                if gradient is not None:
                    local[name] = gradient.to(parameter.device).view(parameter.shape)
        num_passes = saved.record.counters["num_passes"]
        installs.append(partial(step.resume_gradients, local, num_passes))

        def install() -> None:
            for change in installs:
                change()

        return install

    def _so_far(self, segment: Segment, same_world: bool) -> SoFar:
        saved, comm = self._saved, self._trained.comm
        shard = segment.layout.shard(comm.rank)
        owned = torch.empty(0, dtype=master_dtype(segment.dtype), device=comm.device)
        reduced: torch.Tensor | None = None
        for piece in segment.layout.pieces(shard):
            name = segment.names[piece.slot]
            if saved.has_gradient(name):
                part = saved.reduced_gradient(name, piece.within_parameter, owned.dtype, mean=not same_world)
                if part is not None:
                    reduced = owned.new_zeros(shard.numel) if reduced is None else reduced
                    place = piece.within_buffer.shift(-shard.begin)
                    reduced[place.begin : place.end] = part
        unreduced = {}
        for slot, name in enumerate(segment.names):
            if same_world and saved.has_gradient(name):
                whole = saved.unreduced_gradient(name, comm.world.rank, owned.dtype)
                if whole is not None:
                    unreduced[slot] = whole.to(owned.device).view(segment.layout.slots[slot].shape)
        if reduced is None and any(saved.has_reduced_gradient(name, not same_world) for name in segment.names):
            reduced = owned.new_zeros(shard.numel)  # a rank without any of them takes part in what the others do
        return SoFar(None if reduced is None else InMemory(reduced), unreduced)

    def begin(self, step: int) -> None:
        """Everybody has checked, and nobody reads this rank's weights any more. Collective."""
        trained = self._trained
        trained.comm.exchange(CollectiveId("begin of a load", "", step), b"")
        if trained.step is not None:
            trained.step.readers.wait()
            trained.step.clear_gradients()

    def read_weights(self) -> None:
        """Change the weights of this rank's shard.

        Raises:
            CheckpointError: a file was whole when it was checked and cannot be read again.
        """
        for segment in self._segments():
            for name, span, rest in self._wanted(segment):
                if isinstance(rest, InMemory):
                    self._saved.read_weight(name, span, rest.tensor)
                else:
                    values = torch.empty(span.numel, dtype=rest.dtype)
                    self._saved.read_weight_now(name, span, values)
                    rest.save(values)
        self._settle()

    def _settle(self) -> None:
        try:
            self._saved.files.settle()
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} It was whole a moment ago, so weights are half loaded: load a checkpoint before going on."
            ) from error

    @torch.no_grad()
    def install(self, step: int) -> None:
        """Change the rest. Collective."""
        trained = self._trained
        for name, value in self._buffers.items():
            trained.references[name].copy_(value)
        for change in self._installs:
            change()
        publish_loaded(trained.comm, trained.units, step)


def publish_loaded(comm: Communicator, units: Sequence[Unit], step: int) -> None:
    """Bring what was loaded to where parameters are whole; nobody reads them before all have. Collective."""
    publications = [
        segment.parameters.publish(CollectiveId("publication of a load", f"{unit.name}[{number}]", step))
        for unit in units
        for number, segment in enumerate(unit.segments)
    ]
    comm.publish()
    for publication in publications:
        publication.wait()
    comm.exchange(CollectiveId("end of a load", "", step), b"")


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(bytes_of(tensor) if tensor.numel() else b"", digest_size=16).hexdigest()


def _dictionary(state: Any, place: str) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise CheckpointError(f"{place} of the checkpoint is a {type(state).__name__}: expected the state of one.")
    return state


def _load_scaler(scaler: LossScaler, state: dict[str, Any]) -> None:
    if scaler.state_dict().keys() == state.keys():  # a constant says nothing to a scale that is found by trying
        scaler.load_state_dict(state)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more


def _parameters_of(units: Sequence[Unit]) -> Iterator[tuple[str, nn.Parameter]]:
    for unit in units:
        for segment in unit.segments:
            yield from zip(segment.names, segment.parameters.parameters, strict=True)
