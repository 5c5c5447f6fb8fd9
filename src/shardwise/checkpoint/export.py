"""Weights for others to load: whole tensors in the dtype that the model computes in, streamed to rank 0.

Ranks make one parameter whole at a time, out of their shards and not by way of its unit; rank 0 copies or writes it,
and the next one takes its place in memory. So a file of the whole model never needs the memory of the whole model, and
a dict of it no more than itself and one parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shardwise.checkpoint.model import Trained, slices_of
from shardwise.checkpoint.save import Meeting, agree
from shardwise.checkpoint.zero_to_fp32 import write_weights
from shardwise.comm.base import CollectiveId, Communicator
from shardwise.zero.unit import Segment


class Where(NamedTuple):
    """A tensor to be streamed."""

    name: str
    tensor: torch.Tensor
    """The model's own."""
    segment: Segment | None
    """Whose shards it is made of; None where the model's own is whole."""
    slot: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the values that are streamed."""
        return self.tensor.dtype


def plan(trained: Trained, with_frozen: bool = True) -> tuple[list[Where], dict[str, str]]:
    """What will be streamed, in order, and the ties: name to name. Wide dtypes first, for files want it so."""
    places = {
        id(parameter): (number, segment, slot)
        for number, unit in enumerate(trained.units)
        for segment in unit.segments
        for slot, parameter in enumerate(segment.parameters.parameters)
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
        number, segment, slot = places.get(id(value), (len(trained.units), None, 0))
        if segment is not None and not (with_frozen or value.requires_grad):
            continue
        first_names[id(value)] = name
        is_sharded = segment is not None and segment.sharding.parameter
        found.append(((-value.itemsize, number), Where(name, value, segment if is_sharded else None, slot)))
    return [where for _, where in sorted(found, key=lambda item: item[0])], ties


def stream(order: Sequence[Where], comm: Communicator, step: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor whole, valid until the next one is asked for. Collective: every rank goes through all of it."""
    largest: dict[torch.dtype, int] = {}
    for where in order:
        if where.segment is not None:
            largest[where.dtype] = max(largest.get(where.dtype, 0), where.tensor.numel())
    buffers = {dtype: comm.allocate(numel, dtype) for dtype, numel in largest.items()}
    try:
        for where in order:
            if where.segment is None:
                yield where.name, where.tensor.detach()
            else:
                yield where.name, _gather(where, where.segment, buffers[where.dtype], comm, step)
    finally:
        for buffer in buffers.values():
            comm.free(buffer)


def _gather(where: Where, segment: Segment, buffer: torch.Tensor, comm: Communicator, step: int) -> torch.Tensor:
    """One parameter whole in ``buffer``, from every rank's shard. Collective."""
    slot = segment.layout.slots[where.slot]
    whole = buffer[: slot.numel]
    cuts = [min(max(cut - slot.offset, 0), slot.numel) for cut in segment.layout.cuts]
    for name, span, values in slices_of(segment, segment.layout.shard(comm.rank)):
        if name == slot.name:
            whole[span.begin : span.end].copy_(values.load())
    comm.publish()
    comm.all_gather_in_place(CollectiveId("gather of a parameter", where.name, step), whole, cuts).wait()
    # Ranks that read each other's memory: nobody writes the next parameter there before all have read this one.
    comm.exchange(CollectiveId("end of a gather", where.name, step), b"")
    return whole.view(slot.shape)


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
    for name, tensor in stream(order, trained.comm, step):
        if trained.comm.world.rank == 0:
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
    source = stream(order, trained.comm, step)

    def work() -> None:
        try:
            if meeting.rank == 0:
                output.parent.mkdir(parents=True, exist_ok=True)
                weights: Mapping[str, Any] = {where.name: _Next(where.name, where.tensor, source) for where in order}
                write_weights(output, weights, ties, max_bytes, safetensors)
        finally:
            for _ in source:  # the other ranks wait for this one, whatever happened to its disk
                pass

    agree(meeting, "the end of an export", work)
