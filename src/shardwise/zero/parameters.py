"""Where the parameters of one flat buffer rest, and how they become whole: two answers, one interface.

``ResidentParameters``  whole on every rank at all times; after a step the owners' slices are published.
``ShardedParameters``  only this rank's shard rests; the whole buffer exists between ``unshard`` and ``reshard``.

Both keep the user's ``nn.Parameter`` objects and make them views into one flat buffer, so that a gather lands in the
memory that the module reads. ``master`` is what the optimizer steps: a slice of the buffer itself where the parameter
computes in the master's dtype, else a wider copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from shardwise.comm.base import CollectiveId, Communicator, Done, Pending
from shardwise.layout import Layout, Span
from shardwise.precision import master_dtype
from shardwise.zero.guard import guard_like
from shardwise.zero.pieces import copy_whole


class ParameterHome(Protocol):
    """The parameters of one flat buffer."""

    layout: Layout
    parameters: list[nn.Parameter]
    """The user's own objects, in the order of the slots."""
    full: torch.Tensor
    """[N] in the compute dtype; its storage may be empty while sharded."""
    master: torch.Tensor
    """[optimizer's span] in the master dtype; empty for frozen parameters."""
    master_span: Span
    """The elements of the flat buffer that ``master`` and ``resting`` hold."""
    resting: torch.Tensor
    """[optimizer's span] the values in the widest dtype that is kept, also of frozen parameters."""

    def unshard(self, identity: CollectiveId) -> None:
        """Start making the buffer whole."""

    def wait_unsharded(self) -> None:
        """Return when the parameters may be read."""

    def reshard(self) -> None:
        """Give the whole buffer back where only a shard rests."""

    def publish(self, identity: CollectiveId) -> Pending:
        """Bring the stepped masters to every rank that holds the whole buffer."""

    def load(self, slot: int, value: torch.Tensor) -> None:
        """Replace a parameter's value, given whole; on all ranks, while nobody reads."""

    def resting_tensors(self) -> list[torch.Tensor]:
        """What is allocated while nothing is unsharded, the master first if it is separate."""


def _initial_values(
    layout: Layout, parameters: Sequence[nn.Parameter], dtype: torch.dtype, comm: Communicator
) -> torch.Tensor:
    """[N] the parameters' values in ``dtype``, each in its slot; rank 0's win, as with DistributedDataParallel.

    What was built in pieces comes together here, one buffer at a time, and its pieces are freed.
    """
    values = torch.zeros(layout.numel, dtype=dtype, device=comm.device)
    for view, parameter in zip(slot_views(values, layout), parameters, strict=True):
        copy_whole(parameter, view)
    comm.broadcast(values)
    return values


def slot_views(buffer: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """One view into ``buffer`` [N] a slot, in the parameter's shape."""
    return [buffer[slot.offset : slot.span.end].view(slot.shape) for slot in layout.slots]


class ResidentParameters:
    """Whole on every rank. ``span`` is what this rank's optimizer owns: everything, or its shard."""

    def __init__(
        self, comm: Communicator, layout: Layout, parameters: Sequence[nn.Parameter], dtype: torch.dtype, span: Span
    ) -> None:
        self.layout = layout
        self.parameters = list(parameters)
        self.master_span = span
        self._comm = comm
        self._sharded_optimizer = span != layout.whole
        trainable = parameters[0].requires_grad
        resting_dtype = master_dtype(dtype) if trainable else dtype
        values = _initial_values(layout, parameters, resting_dtype, comm)
        self.full = comm.allocate(layout.numel, dtype)
        self.full.copy_(values)
        self._own = self.full[span.begin : span.end]
        self._separate = resting_dtype != dtype
        # The masters keep what the compute dtype rounds away.
        owned = values[span.begin : span.end].clone() if self._separate else self._own
        self.resting = owned
        self.master = owned if trainable else owned[:0]
        for parameter, view in zip(parameters, slot_views(self.full, layout), strict=True):
            parameter.data = view

    def unshard(self, identity: CollectiveId) -> None:
        """Whole already."""

    def wait_unsharded(self) -> None:
        """Whole already."""

    def reshard(self) -> None:
        """Whole always."""

    def publish(self, identity: CollectiveId) -> Pending:
        """Narrow my masters into my slice, then fetch the other owners' slices where the optimizer is sharded."""
        if self._separate:
            self._own.copy_(self.resting)
        if not self._sharded_optimizer:
            return Done()
        # The readers of shared memory wait for the owners' signal, which comes after the last narrowing of all buffers.
        return self._comm.all_gather_in_place(identity, self.full, self.layout.cuts)

    def load(self, slot: int, value: torch.Tensor) -> None:
        """Into the whole buffer, and into the masters what this rank owns of it."""
        self.parameters[slot].data.copy_(value)
        if self._separate:
            _load_owned(self.layout, slot, value, self.master_span, self.master)

    def resting_tensors(self) -> list[torch.Tensor]:
        """The whole buffer, and the masters if they are separate."""
        return [self.master, self.full] if self._separate else [self.full]


class ShardedParameters:
    """Only this rank's shard rests, in the master's dtype; a gather casts it on its way.

    While sharded the whole buffer's storage has no bytes: views that autograd saved stay views of it and are valid
    again once it is whole. The module's own parameters show NaN of the right shape meanwhile: a read outside of the
    schedule must not touch freed memory, and must not look like a weight.
    """

    def __init__(
        self, comm: Communicator, layout: Layout, parameters: Sequence[nn.Parameter], dtype: torch.dtype, span: Span
    ) -> None:
        self.layout = layout
        self.parameters = list(parameters)
        self.master_span = span
        self._comm = comm
        trainable = parameters[0].requires_grad
        resting_dtype = master_dtype(dtype) if trainable else dtype
        values = _initial_values(layout, parameters, resting_dtype, comm)
        self.shard = comm.allocate(span.numel, resting_dtype)
        self.shard.copy_(values[span.begin : span.end])
        self.full = values if resting_dtype == dtype else torch.empty(layout.numel, dtype=dtype, device=comm.device)
        self._views = slot_views(self.full, layout)
        self._guards = [guard_like(view) for view in self._views]
        self.resting = self.shard
        self.master = self.shard if trainable else self.shard[:0]
        self._pending: Pending | None = None
        self.reshard()

    def unshard(self, identity: CollectiveId) -> None:
        """Allocate the whole buffer and start the gather."""
        storage = self.full.untyped_storage()
        storage.resize_(self.full.numel() * self.full.itemsize)
        self._pending = self._comm.all_gather(identity, self.full, self.shard)

    def wait_unsharded(self) -> None:
        """Finish the gather and show the values."""
        if self._pending is None:
            return
        self._pending.wait()
        self._pending = None
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.data = view

    def reshard(self) -> None:
        """Free the whole buffer; a gather under way must end first, for it writes there."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        for parameter, guard in zip(self.parameters, self._guards, strict=True):
            parameter.data = guard
        self.full.untyped_storage().resize_(0)

    def publish(self, identity: CollectiveId) -> Pending:
        """The next gather reads the masters themselves."""
        return Done()

    def load(self, slot: int, value: torch.Tensor) -> None:
        """Into the shard, what this rank owns of it."""
        _load_owned(self.layout, slot, value, self.master_span, self.shard)

    def resting_tensors(self) -> list[torch.Tensor]:
        """The shard."""
        return [self.shard]


def _load_owned(layout: Layout, slot: int, value: torch.Tensor, span: Span, target: torch.Tensor) -> None:
    """Copy the part of a parameter's whole ``value`` that lies in ``span`` into ``target`` [span]."""
    owned = layout.slots[slot].span.intersect(span)
    if owned.numel:
        source, place = owned.shift(-layout.slots[slot].offset), owned.shift(-span.begin)
        target[place.begin : place.end].copy_(value.reshape(-1)[source.begin : source.end])
