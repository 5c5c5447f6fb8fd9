"""Where the parameters of one flat buffer rest on the device, and how they become whole: two answers, one interface.

``ResidentParameters``  whole on every rank at all times; after a step the owners' slices are published.
``ShardedParameters``  only this rank's shard rests; the whole buffer exists between ``unshard`` and ``reshard``.

(``OffloadedParameters``, in a file of its own: the shard rests in a store.)

All keep the user's ``nn.Parameter`` objects and make them views into one flat buffer, so that a gather lands in the
memory that the module reads. ``master`` is what the optimizer steps: a slice of the buffer itself where the parameter
computes in the master's dtype, else a wider copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from shardwise.comm.base import CollectiveId, Communicator, Done, Pending
from shardwise.layout import Layout, Span
from shardwise.precision import master_dtype
from shardwise.store.base import Transfer
from shardwise.zero.form import Codes, Form, Values
from shardwise.zero.guard import guard, guard_like
from shardwise.zero.pieces import copy_whole
from shardwise.zero.rest import InMemory, InStore, Rest
from shardwise.zero.shard_states import MASTER, ShardStates


class ParameterHome(Protocol):
    """The parameters of one flat buffer."""

    layout: Layout
    parameters: list[nn.Parameter]
    """The user's own objects, in the order of the slots."""
    full: torch.Tensor
    """[N] in the compute dtype; its storage may be empty while sharded."""
    master: torch.Tensor
    """[optimizer's span] in the master dtype, without memory where a store holds it; empty for frozen parameters."""
    master_span: Span
    """The elements of the flat buffer that ``master`` and ``resting`` hold."""
    resting: Rest
    """[optimizer's span] the values in the widest dtype that is kept, also of frozen parameters. Saving to it changes
    everything that rests of them on this rank; other ranks' copies follow with ``publish``."""

    def fetch(self) -> bool:
        """Start bringing this rank's shard near, ahead of ``unshard``; False where there is no room for it now."""

    def forget_fetched(self) -> None:
        """What was fetched ahead will not be used, or will be outdated."""

    def unshard(self, identity: CollectiveId, exact: bool) -> None:
        """Start making the buffer whole; ``exact``: with what rests, however passes round it."""

    def wait_unsharded(self) -> None:
        """Return when the parameters may be read."""

    def reshard(self) -> None:
        """Give the whole buffer back where only a shard rests."""

    def accept(self, span: Span, stepped: torch.Tensor) -> Sequence[Transfer]:
        """Take over the stepped values of elements ``span``, where the masters rest in a store.

        Args:
            span: of the flat buffer, inside ``master_span``.
            stepped: [span] in host memory, which may be used again when the transfers that are returned have ended.
        """

    def publish(self, identity: CollectiveId) -> Pending:
        """Bring the stepped values to every rank that holds the whole buffer."""

    def load(self, slot: int, value: torch.Tensor) -> None:
        """Replace a parameter's value, given whole; on all ranks, while nobody reads."""

    def resting_bytes(self) -> tuple[int, int]:
        """What is allocated while nothing is unsharded, stores apart: for parameters, and for separate masters."""


def initial_values(
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
    """Whole on every rank.

    Args:
        comm: the transport.
        layout: of the flat buffer.
        parameters: in the order of its slots.
        dtype: that they compute in.
        span: what this rank's optimizer owns: everything, or its shard.
        states: where the masters rest, if they are off the device.
    """

    def __init__(
        self,
        comm: Communicator,
        layout: Layout,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        span: Span,
        states: ShardStates | None = None,
    ) -> None:
        self.layout = layout
        self.parameters = list(parameters)
        self.master_span = span
        self._comm = comm
        self._sharded_optimizer = span != layout.whole
        trainable = parameters[0].requires_grad
        resting_dtype = master_dtype(dtype) if trainable else dtype
        values = initial_values(layout, parameters, resting_dtype, comm)
        self.full = comm.allocate(layout.numel, dtype)
        self.full.copy_(values)
        self._own = self.full[span.begin : span.end]
        self._beside = None if states is None else states.beside
        # The masters keep what the compute dtype rounds away.
        self._separate: torch.Tensor | None = None
        if states is not None and states.plan.holds(MASTER):
            states.write(MASTER, span, values[span.begin : span.end])
            self.resting: Rest = replace(states.rest(MASTER, span), write=self._save_to(states))
            self.master = guard(self._own.shape, resting_dtype, torch.device("cpu"))
        else:
            if resting_dtype != dtype:
                self._separate = values[span.begin : span.end].clone()
            owned = self._own if self._separate is None else self._separate
            self.resting = InMemory(owned)
            self.master = owned if trainable else owned[:0]
        for parameter, view in zip(parameters, slot_views(self.full, layout), strict=True):
            parameter.data = view

    def _save_to(self, states: ShardStates) -> Callable[[Span, torch.Tensor], None]:
        def save(span: Span, values: torch.Tensor) -> None:
            states.write(MASTER, span, values)
            self.full[span.begin : span.end].copy_(values)

        return save

    def fetch(self) -> bool:
        """Here already."""
        return True

    def forget_fetched(self) -> None:
        """Nothing was."""

    def unshard(self, identity: CollectiveId, exact: bool) -> None:
        """Whole already."""

    def wait_unsharded(self) -> None:
        """Whole already."""

    def reshard(self) -> None:
        """Whole always."""

    def accept(self, span: Span, stepped: torch.Tensor) -> Sequence[Transfer]:
        """Into my slice, narrowed where it is narrower."""
        assert self._beside is not None
        with self._beside.run():
            self.full[span.begin : span.end].copy_(stepped, non_blocking=True)
        return [self._beside.end()]

    def publish(self, identity: CollectiveId) -> Pending:
        """Narrow my masters into my slice, then fetch the other owners' slices where the optimizer is sharded."""
        if self._separate is not None:
            self._own.copy_(self._separate)
        if self._beside is not None:
            self._beside.join()
        if not self._sharded_optimizer:
            return Done()
        # The readers of shared memory wait for the owners' signal, which comes after the last narrowing of all buffers.
        return self._comm.all_gather_in_place(identity, self.full, self.layout.cuts)

    def load(self, slot: int, value: torch.Tensor) -> None:
        """Into the whole buffer, and into the masters what this rank owns of it."""
        self.parameters[slot].data.copy_(value)
        if self.resting.dtype != self.full.dtype or isinstance(self.resting, InStore):
            load_owned(self.layout, slot, value, self.master_span, self.resting)

    def resting_bytes(self) -> tuple[int, int]:
        """The whole buffer, and the masters if they are separate."""
        return self.full.nbytes, 0 if self._separate is None else self._separate.nbytes


class ShardedParameters:
    """Only this rank's shard rests, in the master's dtype, or as codes; a gather casts or decodes it on its way.

    While sharded the whole buffer's storage has no bytes: views that autograd saved stay views of it and are valid
    again once it is whole. The module's own parameters show NaN of the right shape meanwhile: a read outside of the
    schedule must not touch freed memory, and must not look like a weight.

    Args:
        comm: the transport.
        layout: of the flat buffer.
        parameters: in the order of its slots.
        dtype: that they compute in.
        span: this rank's shard.
        states: where the masters rest, if they are off the device: the shard then rests in ``dtype``.
        codes: what the shard rests as, if not as values; of parameters that no optimizer steps.
    """

    def __init__(
        self,
        comm: Communicator,
        layout: Layout,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        span: Span,
        states: ShardStates | None = None,
        codes: Codes | None = None,
    ) -> None:
        self.layout = layout
        self.parameters = list(parameters)
        self.master_span = span
        self._comm = comm
        trainable = parameters[0].requires_grad and codes is None
        wide_dtype = master_dtype(dtype) if trainable else dtype if codes is None else codes.value_dtype
        values = initial_values(layout, parameters, wide_dtype, comm)
        owned = values[span.begin : span.end]
        self._beside = None if states is None else states.beside
        if states is not None and states.plan.holds(MASTER):
            self.shard = comm.allocate(span.numel, dtype)
            states.write(MASTER, span, owned)
            self.resting: Rest = replace(states.rest(MASTER, span), write=self._save_to(states))
            self.master = guard(owned.shape, wide_dtype, torch.device("cpu"))
            self._form: Form = Values(dtype)
        elif codes is not None:
            self.shard = comm.allocate(codes.numel(span.numel), codes.dtype)
            self.resting = in_codes(codes, span, lambda: self.shard, self.shard.copy_)
            self.master = owned[:0]
            self._form = codes
        else:
            self.shard = comm.allocate(span.numel, wide_dtype)
            self.resting = InMemory(self.shard)
            self.master = self.shard if trainable else self.shard[:0]
            self._form = Values(wide_dtype)
        self.shard.copy_(self._form.encoded(owned))
        self.whole = WholeBuffer(values, layout, parameters, dtype)
        self.full = self.whole.tensor
        self._pending: Pending | None = None

    def _save_to(self, states: ShardStates) -> Callable[[Span, torch.Tensor], None]:
        def save(span: Span, values: torch.Tensor) -> None:
            states.write(MASTER, span, values)
            self._part(span).copy_(values)

        return save

    def _part(self, span: Span) -> torch.Tensor:
        local = span.shift(-self.master_span.begin)
        return self.shard[local.begin : local.end]

    def fetch(self) -> bool:
        """Here already."""
        return True

    def forget_fetched(self) -> None:
        """Nothing was."""

    def unshard(self, identity: CollectiveId, exact: bool) -> None:
        """Allocate the whole buffer and start the gather."""
        self.whole.allocate()
        self._pending = self._form.gather(self._comm, identity, self.full, self.shard, exact)

    def wait_unsharded(self) -> None:
        """Finish the gather and show the values."""
        if self._pending is None:
            return
        self._pending.wait()
        self._pending = None
        self.whole.show()

    def reshard(self) -> None:
        """Free the whole buffer; a gather under way must end first, for it writes there."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        self.whole.free()

    def accept(self, span: Span, stepped: torch.Tensor) -> Sequence[Transfer]:
        """Into the shard, narrowed where it is narrower."""
        assert self._beside is not None
        with self._beside.run():
            self._part(span).copy_(stepped, non_blocking=True)
        return [self._beside.end()]

    def publish(self, identity: CollectiveId) -> Pending:
        """The next gather reads the shards themselves."""
        if self._beside is not None:
            self._beside.join()
        return Done()

    def load(self, slot: int, value: torch.Tensor) -> None:
        """What this rank owns of it."""
        load_owned(self.layout, slot, value, self.master_span, self.resting)

    def resting_bytes(self) -> tuple[int, int]:
        """The shard."""
        return self.shard.nbytes, 0


def in_codes(
    codes: Codes,
    span: Span,
    load: Callable[[], torch.Tensor],
    save: Callable[[torch.Tensor], object],
    in_memory: bool = True,
) -> InStore:
    """Values ``span`` that rest as codes: ``load`` gives all codes, and ``save`` replaces them."""

    def values() -> torch.Tensor:
        decoded = torch.empty(span.numel, dtype=codes.value_dtype)
        codes.decode(load().cpu(), decoded)
        return decoded

    def read(part: Span, out: torch.Tensor) -> None:
        local = part.shift(-span.begin)
        out.copy_(values()[local.begin : local.end])

    def write(part: Span, new: torch.Tensor) -> None:
        local, changed = part.shift(-span.begin), values()
        changed[local.begin : local.end].copy_(new)
        save(codes.encoded(changed))

    def decoded(part: Span) -> list[torch.Tensor] | None:
        local = part.shift(-span.begin)
        return [values()[local.begin : local.end]] if in_memory else None

    return InStore(codes.value_dtype, span, read, write, decoded)


class WholeBuffer:
    """[N] the whole parameters of a sharded buffer, with memory only from ``allocate`` to ``free``.

    Args:
        values: [N] the values that the parameters had; its memory becomes the buffer's where the dtype is the same.
        layout: of the buffer.
        parameters: in the order of its slots.
        dtype: that they compute in.
    """

    def __init__(
        self, values: torch.Tensor, layout: Layout, parameters: Sequence[nn.Parameter], dtype: torch.dtype
    ) -> None:
        self.tensor = values if values.dtype == dtype else torch.empty(layout.numel, dtype=dtype, device=values.device)
        self._layout = layout
        self._parameters = list(parameters)
        self._views = slot_views(self.tensor, layout)
        self._guards = [guard_like(view) for view in self._views]
        self.free()

    def allocate(self) -> None:
        """Memory with undefined content."""
        self.tensor.untyped_storage().resize_(self.tensor.numel() * self.tensor.itemsize)

    def show(self) -> None:
        """The module's parameters are views of it."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.data = view

    def free(self) -> None:
        """The module's parameters show NaN, and the memory goes."""
        for parameter, stand_in in zip(self._parameters, self._guards, strict=True):
            parameter.data = stand_in
        if not self.tensor.untyped_storage().resizable():
            self._leave_memory()
        self.tensor.untyped_storage().resize_(0)

    def _leave_memory(self) -> None:
        """A NumPy array shares the memory, which torch then never frees: it stays the array's, as it is."""
        shape, strides = self.tensor.size(), self.tensor.stride()
        self.tensor.set_(torch.empty_like(self.tensor).untyped_storage(), 0, shape, strides)
        self._views = slot_views(self.tensor, self._layout)


def load_owned(layout: Layout, slot: int, value: torch.Tensor, span: Span, target: Rest) -> None:
    """Save the part of a parameter's whole ``value`` that lies in ``span`` to ``target`` [span]."""
    owned = layout.slots[slot].span.intersect(span)
    if owned.numel:
        source = owned.shift(-layout.slots[slot].offset)
        target.part(owned.shift(-span.begin)).save(value.reshape(-1)[source.begin : source.end])
