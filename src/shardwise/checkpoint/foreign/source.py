"""A foreign checkpoint as a load sees its own kind: a manifest, and files that elements are read from.

``Draft`` gathers, parameter by parameter, where elements lie. What comes of it has the manifest that a save of ours
would have written; so loading, checking and converting need to know nothing of where it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.foreign.torch_file import Stored
from shardwise.checkpoint.foreign.unpickler import Record, plain
from shardwise.checkpoint.manifest import Manifest, ModelRecord, ParameterRecord
from shardwise.checkpoint.model import BUFFER, WEIGHT, key_of, state_kind
from shardwise.checkpoint.tree import DTYPE_NAMES, encode
from shardwise.errors import CheckpointError
from shardwise.layout import NO_GROUP


@dataclass(frozen=True)
class Cell:
    """Elements of a tensor of somebody's file."""

    stored: Stored
    begin: int
    numel: int

    def values(self, begin: int, end: int) -> torch.Tensor:
        """Some of them, flat; of the mapped file."""
        return self.stored.flat(self.begin + begin, self.begin + end)


@dataclass(frozen=True)
class Piece:
    """Elements ``begin`` to ``end`` of a parameter: its weight from ``at`` on of a tensor, and its state likewise."""

    file: int
    begin: int
    end: int
    weight: Stored
    at: int
    states: Mapping[str, Stored]


@dataclass(frozen=True)
class Training:
    """What of a run is not a parameter's."""

    groups: Sequence[Mapping[str, Any]] | None
    """Settings of the optimizer; None where nothing is kept of one."""
    scheduler: Any
    scaler: Any
    counters: Mapping[str, int]
    client_state: Mapping[str, Any]
    stage: int


class Source:
    """The files of a foreign checkpoint, for reading: as ``Reads``.

    Attributes:
        manifest: what they hold.
        cells: by file and key, where the elements lie.
        trees: tensors of trees, by key.
    """

    def __init__(self, manifest: Manifest, cells: Sequence[Mapping[str, Cell]], trees: Mapping[str, torch.Tensor]):
        self.manifest = manifest
        self.cells = cells
        self.trees = trees

    @property
    def world(self) -> int:
        """Ranks that wrote it."""
        return self.manifest.world

    def check(self, file: int, key: str, begin: int, end: int) -> None:
        """Elements were found to lie in their file when it was opened; there are no checksums."""
        assert 0 <= begin <= end <= self.cells[file][key].numel

    def read_into(self, file: int, key: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` with the elements from ``begin`` on."""
        out.copy_(self.cells[file][key].values(begin, begin + out.numel()))

    def read_later(self, file: int, key: str, begin: int, out: torch.Tensor) -> None:
        """At once: what is mapped needs no order."""
        self.read_into(file, key, begin, out)

    def settle(self) -> None:
        """Nothing was left for later."""

    def entry(self, file: int, key: str) -> torch.Tensor:
        """A whole tensor, in its shape."""
        return self.cells[file][key].stored.tensor().clone()

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of a tree."""
        return self.trees[key]

    def close(self) -> None:
        """Take the mappings away."""
        for cells in self.cells:
            for cell in cells.values():
                cell.stored.file.close()


class Draft:
    """Gathers what a foreign checkpoint holds.

    Args:
        place: its directory, for messages.
        num_files: how many files what is found there is spread over.
        world: ranks that wrote it.
    """

    def __init__(self, place: Path, num_files: int, world: int) -> None:
        self._place = place
        self._world = world
        self._cells: list[dict[str, Cell]] = [{} for _ in range(num_files)]
        self._trees: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, ParameterRecord] = {}
        self._buffers: dict[str, tuple[int, ...]] = {}
        self._kinds: set[str] = set()

    @property
    def parameters(self) -> Mapping[str, ParameterRecord]:
        """Those that were added."""
        return self._parameters

    def add_parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        pieces: Sequence[Piece],
        compute: torch.dtype,
        group: int | None,
        others: Mapping[str, Any],
    ) -> None:
        """A parameter and its state.

        Args:
            name: of the parameter.
            shape: of all of it.
            pieces: in order.
            compute: what the run computed in.
            group: of the optimizer; None where it is frozen.
            others: the rest of its state.

        Raises:
            CheckpointError: the pieces are not the whole, or not of one kind.
        """
        found = [piece for piece in pieces if piece.end > piece.begin]
        kinds = [
            {"weight": piece.weight.dtype} | {key: stored.dtype for key, stored in piece.states.items()}
            for piece in found
        ]
        if any(other != kinds[0] for other in kinds):
            raise CheckpointError(
                f"{self._place}: the ranks' files hold different states of parameter {name!r}: are they of one save?"
            )
        dtypes = kinds[0] if kinds else {"weight": compute}
        for piece in found:
            for kind, stored in {WEIGHT: piece.weight, **{state_kind(k): v for k, v in piece.states.items()}}.items():
                if piece.at + piece.end - piece.begin > stored.numel:
                    raise CheckpointError(f"{stored.file.path} is damaged: it does not hold all of {name!r}.")
                key = key_of(0, kind, name, piece.begin)
                self._cells[piece.file][key] = Cell(stored, piece.at, piece.end - piece.begin)
        at = 0
        for piece in found:
            if piece.begin != at:
                break
            at = piece.end
        if at != torch.Size(shape).numel():
            raise CheckpointError(f"{self._place} holds {at} elements of {name!r}, which has shape {shape}.")
        self._kinds |= dtypes.keys() - {"weight"}
        state = {key: DTYPE_NAMES[dtype] for key, dtype in dtypes.items() if key != "weight"}
        self._parameters[name] = ParameterRecord(
            shape=shape,
            dtype=DTYPE_NAMES[dtypes["weight"]],
            compute=DTYPE_NAMES[compute],
            trainable=group is not None,
            group=NO_GROUP if group is None else group,
            pieces=tuple((piece.file, piece.begin, piece.end) for piece in found),
            state=state,
            others=self._encode(dict(others), f"optimizer.{name}") if state or others else None,
        )

    def add_buffer(self, name: str, of_files: Sequence[Stored]) -> None:
        """A buffer, as each rank has it, or as all have it."""
        first = of_files[0].tensor()
        owners = [0, *(n for n, other in enumerate(of_files) if n and not _same(first, other.tensor()))]
        for file in owners:
            stored = of_files[file]
            self._cells[file][key_of(0, BUFFER, name)] = Cell(stored, 0, stored.numel)
        self._buffers[name] = tuple(owners)

    def _encode(self, value: Any, place: str) -> Any:
        def put(tensor: torch.Tensor) -> str:
            key = f"0/tree/{len(self._trees)}"
            self._trees[key] = tensor
            return key

        return encode(value, put, place)

    def plain(self, value: Any, place: str) -> Any:
        """A value of the files as plain Python, with its tensors."""
        return plain(value, f"{self._place}: {place}", _loaded)

    def finish(self, names: Mapping[str, str], training: Training) -> Source:
        """All of it.

        Args:
            names: of the state dict, and the parameter that each is.
            training: the rest.
        """
        optimizer = None
        if training.groups is not None:
            groups = [
                {key: value for key, value in self.plain(group, "param_groups").items() if key != "params"}
                for group in training.groups
            ]
            classes = classes_of(self._kinds)
            optimizer = {
                "class": classes[0],
                "classes": list(classes),
                "groups": self._encode(groups, "optimizer.param_groups"),
            }
        scheduler = _scheduler(self.plain(training.scheduler, "lr_scheduler"), training.groups or ())
        model = ModelRecord(
            name="pytorch_model",
            stage=training.stage,
            parameters=self._parameters,
            names=dict(names),
            buffers=self._buffers,
            excluded=(),
            optimizer=optimizer,
            scheduler=self._encode(scheduler, "lr_scheduler"),
            scaler=self._encode(_scaler(training.scaler), "loss_scaler"),
            counters=dict(training.counters),
        )
        shared = self._encode(self.plain(training.client_state, "client_state"), "client_state")
        described = [(name, vars(record)) for name, record in self._parameters.items()]
        digest = hashlib.sha256(json.dumps([described, training.counters], default=str).encode())
        manifest = Manifest(
            digest.hexdigest()[:8], self._world, (), (model,), shared, ({"random": None},) * self._world
        )
        return Source(manifest, self._cells, self._trees)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _loaded(found: Any) -> Any:
    return found.tensor().clone() if isinstance(found, Stored) else found


# --- what others call differently -------------------------------------------------------------------------------------

_CLASSES: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (frozenset({"exp_avg", "exp_avg_sq"}), ("AdamW", "Adam")),
    (frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}), ("AdamW", "Adam")),
    (frozenset({"exp_avg"}), ("Lion",)),
    (frozenset({"momentum_buffer"}), ("SGD",)),
    (frozenset({"sum"}), ("Adagrad",)),
    (frozenset({"square_avg"}), ("RMSprop",)),
    (frozenset(), ("AdamW", "Adam", "Lion", "SGD", "Adagrad", "RMSprop")),
)


def classes_of(kinds: Iterable[str]) -> tuple[str, ...]:
    """Classes of optimizers whose state has these kinds and means the same; the files do not name the class."""
    kinds = frozenset(kinds)
    for known, classes in _CLASSES:
        if known == kinds:
            return classes
    return (f"an optimizer with {', '.join(sorted(kinds))}",)


def _scheduler(state: Any, groups: Iterable[Mapping[str, Any]]) -> Any:
    """DeepSpeed's schedulers count ``last_batch_iteration`` from -1 and keep nothing else; torch's count from 0."""
    if isinstance(state, dict) and set(state) == {"last_batch_iteration"}:
        ticks = int(state["last_batch_iteration"]) + 1
        rates = [group["lr"] for group in groups if "lr" in group]
        return {"last_epoch": ticks, "_step_count": ticks + 1, "_last_lr": rates}
    return state


def _scaler(found: Any) -> dict[str, Any]:
    """A loss scaler's object as the state of ours."""
    said = found.attributes if isinstance(found, Record) else {}
    scale = float(said.get("cur_scale", 1.0))
    if "cur_hysteresis" not in said:
        return {"scale": scale}
    return {
        "scale": scale,
        "allowance": int(said["cur_hysteresis"]),
        "good_steps": max(0, int(said["cur_iter"]) - int(said["last_overflow_iter"]) - 1),
        "overflows_at_minimum": 0,
    }
