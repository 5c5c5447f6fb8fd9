"""Parameters whose shards rest off the device: in host memory, or in a file on NVMe.

::

    fetch              file -> slab            ahead of use, as many units as slabs allow
    unshard            slab -> whole buffer    by a copy where this rank is alone, else by a gather
    accept             stepped values -> file  window by window, beside the step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from shardwise.comm.base import CollectiveId, Communicator, Done, Pending
from shardwise.comm.memory_file import bytes_of
from shardwise.layout import Layout, Span
from shardwise.precision import master_dtype
from shardwise.store.aligned import Slab
from shardwise.store.base import Extent, Store, Transfer
from shardwise.store.beside import Beside
from shardwise.zero.form import Codes, Form, Values
from shardwise.zero.guard import guard
from shardwise.zero.parameters import WholeBuffer, in_codes, initial_values, load_owned
from shardwise.zero.rest import InMemory, InStore, Rest
from shardwise.zero.shard_states import MASTER, ShardStates, StagingSource


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """Where one shard of parameters rests."""

    store: Store
    extent: Extent
    staging: StagingSource
    near: NearShards
    beside: Beside


class NearShards:
    """The shards of one engine that are in slabs, or on their way there, oldest first."""

    def __init__(self) -> None:
        self._holders: list[OffloadedParameters] = []

    def add(self, holder: OffloadedParameters) -> None:
        """It has a slab."""
        self._holders.append(holder)

    def remove(self, holder: OffloadedParameters) -> None:
        """It gave its slab back."""
        self._holders.remove(holder)

    def make_room(self) -> None:
        """Free one slab: of what was fetched for later, else of what can be made whole now."""
        for holder in self._holders:
            if not holder.is_coming:
                holder.forget_fetched()
                return
        self._holders[0].bring()


@dataclass(frozen=True, slots=True)
class _Near:
    """A shard in host memory, or on its way there."""

    slab: Slab
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class _Coming:
    """A gather that has not begun."""

    identity: CollectiveId
    exact: bool


class OffloadedParameters:
    """Only a store holds this rank's shard; the whole buffer exists between ``unshard`` and ``reshard``.

    Args:
        comm: the transport; ranks of one host must not expect each other's shards in memory.
        layout: of the flat buffer.
        parameters: in the order of its slots.
        dtype: that they compute in.
        span: this rank's shard.
        place: of the shard.
        states: where the optimizer's side rests, if that is off the device, too.
        trained: whether there is an optimizer; without one there are no masters.
        codes: what the shard rests as, if not as values of ``dtype``; of parameters that no optimizer steps.
    """

    def __init__(
        self,
        comm: Communicator,
        layout: Layout,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        span: Span,
        place: ShardPlace,
        states: ShardStates | None,
        trained: bool,
        codes: Codes | None = None,
    ) -> None:
        self.layout = layout
        self.parameters = list(parameters)
        self.master_span = span
        self._comm = comm
        self._place = place
        self._form: Form = Values(dtype) if codes is None else codes
        self._dtype = self._form.dtype
        self._resting_span = Span(0, self._form.numel(span.numel)).shift(span.begin)
        """Of the array that rests, counted from where the shard begins: the shard itself, unless it rests as codes."""
        self._beside = place.beside
        memory = place.store.in_place(place.extent)
        self._memory = None if memory is None else memory.tensor(self._dtype, 0, self._resting_span.numel)
        trained = trained and parameters[0].requires_grad
        wide_dtype = master_dtype(dtype) if trained else dtype if codes is None else codes.value_dtype
        values = initial_values(layout, parameters, wide_dtype, comm)
        owned = values[span.begin : span.end]
        self._write(self._resting_span, self._form.encoded(owned))
        self._apart: torch.Tensor | None = None
        """Masters in memory."""
        if states is not None and states.plan.holds(MASTER):
            self._rest_in_states(states, owned)
        elif trained and states is None:
            self._apart = self.master = owned.clone()
            self.resting: Rest = InMemory(self._apart)
        elif codes is not None:
            self.resting = in_codes(codes, span, self._codes, self._save_codes, self._memory is not None)
            self.master = owned[:0]
        elif self._memory is not None:
            self.resting = InMemory(self._memory)
            self.master = self._memory if trained else self._memory[:0]
        else:
            self.resting = InStore(dtype, span, self._read, self._write)
            self.master = guard(owned.shape if trained else torch.Size([0]), dtype, torch.device("cpu"))
        self.whole = WholeBuffer(values, layout, parameters, dtype)
        self.full = self.whole.tensor
        self._near: _Near | None = None
        self._coming: _Coming | None = None
        """The gather that waits for this rank's shard to be near."""
        self._pending: Pending | None = None

    def _rest_in_states(self, states: ShardStates, owned: torch.Tensor) -> None:
        states.write(MASTER, self.master_span, owned)

        def read(span: Span, out: torch.Tensor) -> None:
            states.read(MASTER, span, out)

        def write(span: Span, values: torch.Tensor) -> None:
            states.write(MASTER, span, values)
            self._write(span, values)

        self.resting = InStore(owned.dtype, self.master_span, read, write, partial(states.views, MASTER))
        self.master = guard(owned.shape, owned.dtype, torch.device("cpu"))

    # ---------------------------------------------------------------------------------------------------- store

    def _codes(self) -> torch.Tensor:
        codes = torch.empty(self._resting_span.numel, dtype=self._dtype)
        self._read(self._resting_span, codes)
        return codes

    def _save_codes(self, codes: torch.Tensor) -> None:
        self._write(self._resting_span, codes)

    def _read(self, span: Span, out: torch.Tensor) -> None:
        """Fill ``out`` [span] with elements of the shard."""
        for at, part in self._parts(span):
            slab = self._place.staging().take_to_read()
            try:
                num_bytes = part.numel * self._dtype.itemsize
                self._place.store.read(self._place.extent, at, slab.bytes(0, num_bytes))
                out[part.begin : part.end].copy_(slab.tensor(self._dtype, 0, part.numel))
            finally:
                self._place.staging().give_back(slab)

    def _write(self, span: Span, values: torch.Tensor) -> None:
        """Keep ``values`` [span], from any device and in any dtype."""
        if self._memory is not None:
            local = span.shift(-self.master_span.begin)
            self._memory[local.begin : local.end].copy_(values)
            return
        for at, part in self._parts(span):
            slab = self._place.staging().take()
            slab.tensor(self._dtype, 0, part.numel).copy_(values[part.begin : part.end])
            memory = slab.bytes(0, part.numel * self._dtype.itemsize)
            written = self._place.store.start_write(self._place.extent, at, memory)
            self._place.staging().give_back(slab, after=[written])

    def _parts(self, span: Span) -> list[tuple[int, Span]]:
        """The first byte in the extent, and the elements of ``span``, of what passes through one slab."""
        step = max(1, self._place.staging().slab_bytes // self._dtype.itemsize)
        first = span.begin - self.master_span.begin
        return [
            ((first + begin) * self._dtype.itemsize, Span(begin, min(begin + step, span.numel)))
            for begin in range(0, span.numel, step)
        ]

    def start_read(self, span: Span, memory: memoryview) -> Transfer:
        """Fill ``memory`` with elements of the shard, as they rest."""
        first = (span.begin - self.master_span.begin) * self._dtype.itemsize
        return self._place.store.start_read(self._place.extent, first, memory)

    # ----------------------------------------------------------------------------------------------------- whole

    def fetch(self) -> bool:
        """Start reading, if a slab is left over beside the one for what is needed at once."""
        if self._memory is not None or self._near is not None or self._coming or self._pending:
            return True
        if self._place.staging().num_free < 2:
            return False
        self._start_near()
        return True

    def _start_near(self) -> None:
        if not self._place.staging().num_free:
            self._place.near.make_room()
        slab = self._place.staging().take_to_read()
        memory = slab.bytes(0, self._resting_span.numel * self._dtype.itemsize)
        self._near = _Near(slab, self._place.store.start_read(self._place.extent, 0, memory))
        self._place.near.add(self)

    def _give_slab_back(self, after: Transfer) -> None:
        if self._near is not None:
            self._place.staging().give_back(self._near.slab, after=[after])
            self._place.near.remove(self)
            self._near = None

    def forget_fetched(self) -> None:
        """Give the slab back when nothing is read into it any more."""
        if self._near is not None:
            self._give_slab_back(self._near.transfer)

    @property
    def is_coming(self) -> bool:
        """Whether the whole buffer waits for the shard."""
        return self._coming is not None

    def unshard(self, identity: CollectiveId, exact: bool) -> None:
        """Allocate the whole buffer; fill it now, or when it is waited for, if its shard is not near yet.

        Ranks that gather do so at once, for they must start their gathers in one order.
        """
        self.whole.allocate()
        self._coming = _Coming(identity, exact)
        if self._memory is None and self._near is None:
            self._start_near()
        if self._comm.size > 1 or self._near is None or self._near.transfer.done:
            self.bring()

    def bring(self) -> None:
        """Fill the whole buffer, as soon as the shard is near; a copy or gather may go on when this returns."""
        coming, self._coming = self._coming, None
        assert coming is not None
        source = self._memory
        if source is None:
            assert self._near is not None
            self._near.transfer.wait()
            source = self._near.slab.tensor(self._dtype, 0, self._resting_span.numel)
        with self._beside.run():
            shard = self._form.near(self._comm, source)
            gather = self._form.gather(self._comm, coming.identity, self.full, shard, coming.exact)
            self._pending = _Holding(gather, shard)
        self._give_slab_back(self._beside.end())

    def wait_unsharded(self) -> None:
        """Finish what brings the values, and show them."""
        if self._finish():
            self.whole.show()

    def _finish(self) -> bool:
        if self._coming is not None:
            self.bring()
        if self._pending is None:
            return False
        self._pending.wait()
        self._pending = None
        self._beside.join()
        return True

    def reshard(self) -> None:
        """Free the whole buffer; what is under way must end first, for it writes there."""
        if self._comm.size > 1 or self._pending is not None:
            self._finish()
        self._coming = None
        self.whole.free()

    # ------------------------------------------------------------------------------------------------------ step

    def accept(self, span: Span, stepped: torch.Tensor) -> Sequence[Transfer]:
        """Into the store."""
        local = span.shift(-self.master_span.begin)
        if self._memory is not None:
            self._memory[local.begin : local.end].copy_(stepped)
            return ()
        at = local.begin * self._dtype.itemsize
        return [self._place.store.start_write(self._place.extent, at, bytes_of(stepped))]

    def publish(self, identity: CollectiveId) -> Pending:
        """Masters in memory go to the store at once; those in a store went there window by window."""
        if self._apart is not None:
            self._write(self.master_span, self._apart)
        return Done()

    def load(self, slot: int, value: torch.Tensor) -> None:
        """What this rank owns of it."""
        load_owned(self.layout, slot, value, self.master_span, self.resting)
        if self._apart is not None:
            self._write(self.master_span, self._apart)

    def resting_bytes(self) -> tuple[int, int]:
        """Nothing but masters in memory; the store tells its own bytes."""
        return 0, 0 if self._apart is None else self._apart.nbytes


class _Holding:
    """A collective, and a tensor that must live until it was waited for."""

    def __init__(self, pending: Pending, tensor: torch.Tensor) -> None:
        self._pending = pending
        self._tensor: torch.Tensor | None = tensor

    def wait(self) -> None:
        self._pending.wait()
        self._tensor = None
