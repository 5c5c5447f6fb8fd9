"""Weights for others to load: whole tensors in the dtype that the model computes in, streamed to rank 0.

Ranks make one unit whole at a time; rank 0 copies or writes its tensors, and the unit is put away before the next one.
So a file of the whole model never needs the memory of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.model import Trained
from shardwise.checkpoint.save import Meeting, agree
from shardwise.checkpoint.zero_to_fp32 import write_weights
from shardwise.zero.unit import Unit

Where = tuple[str, torch.Tensor, Unit | None]  # name, the model's own tensor, its unit if it is a parameter


def plan(trained: Trained, with_frozen: bool = True) -> tuple[list[Where], dict[str, str]]:
    """What will be streamed, in order, and the ties: name to name. Wide dtypes first, for files want it so."""
    units = {
        id(parameter): (number, unit)
        for number, unit in enumerate(trained.units)
        for segment in unit.segments
        for parameter in segment.parameters.parameters
    }
    first_names: dict[int, str] = {}
    ties: dict[str, str] = {}
    found: list[tuple[tuple[int, int], Where]] = []
    for name, value in trained.references.items():
        if not isinstance(value, torch.Tensor):
            continue
        if id(value) in first_names:
            ties[name] = first_names[id(value)]
            continue
        number, unit = units.get(id(value), (len(units), None))
        if unit is not None and not (with_frozen or value.requires_grad):
            continue
        first_names[id(value)] = name
        found.append(((-value.itemsize, number), (name, value, unit)))
    return [where for _, where in sorted(found, key=lambda item: item[0])], ties


def stream(order: list[Where], step: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor whole, valid until the next one is asked for. Collective: every rank goes through all of it."""
    opened: Unit | None = None
    try:
        for name, tensor, unit in order:
            if opened is not None and unit is not opened:
                opened.reshard()
                opened = None
            if unit is not None and unit.is_sharded:
                if not unit.is_whole:
                    opened = unit
                unit.unshard(step)
                unit.wait_unsharded()
            yield name, tensor.detach()
    finally:
        if opened is not None:
            opened.reshard()


class _Next:
    """The tensor that a stream gives next, in the eyes of a writer."""

    def __init__(self, name: str, like: torch.Tensor, source: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.shape = tuple(like.shape)
        self.dtype = like.dtype
        self.nbytes = like.numel() * like.itemsize
        self._name = name
        self._source = source

    def contiguous(self) -> torch.Tensor:
        """Take it."""
        name, tensor = next(self._source)
        assert name == self._name, f"the writer asked for {self._name!r} where the ranks brought {name!r}"
        return tensor.contiguous()


def gather(trained: Trained, step: int) -> dict[str, torch.Tensor]:
    """The whole state dict on rank 0's CPU, in its order; nothing on the others. Collective."""
    order, ties = plan(trained)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in stream(order, step):
        if trained.comm.rank == 0:
            found[name] = tensor.to("cpu", copy=True)
    found |= {name: found[kept] for name, kept in ties.items() if kept in found}
    return {name: found[name] for name in trained.references if name in found}


def write(
    trained: Trained,
    output: Path,
    meeting: Meeting,
    max_bytes: int,
    safetensors: bool,
    step: int,
    with_frozen: bool = True,
) -> None:
    """Write the whole weights from rank 0: a file where ``output`` is the name of one, else a directory. Collective.

    Raises:
        CheckpointError: rank 0 could not write them.
    """
    order, ties = plan(trained, with_frozen)
    source = stream(order, step)

    def work() -> None:
        try:
            if meeting.rank == 0:
                output.parent.mkdir(parents=True, exist_ok=True)
                weights: Mapping[str, Any] = {name: _Next(name, tensor, source) for name, tensor, _ in order}
                write_weights(output, weights, ties, max_bytes, safetensors)
        finally:
            for _ in source:  # the other ranks wait for this one, whatever happened to its disk
                pass

    agree(meeting, "the end of an export", work)
