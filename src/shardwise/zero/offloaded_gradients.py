"""Gradients that leave the device as soon as they are averaged, and come back window by window for their step.

Where a unit is stepped at once its gradient does not go to a file: it *lands* in memory that is lent for that.

One rank alone averages nothing: the first gradient of a step leaves in the *narrow* dtype of the pass, bf16 or fp16,
and is widened for its step in host memory: the same bits, in half the bytes.
"""

from __future__ import annotations

from typing import Protocol

import torch

from shardwise.comm.base import CollectiveId, Communicator, Done, Pending
from shardwise.layout import Span
from shardwise.store.aligned import Slab
from shardwise.store.beside import Beside
from shardwise.zero.gradients import OnePass, SoFar, Then, norms_of
from shardwise.zero.guard import guard
from shardwise.zero.shard_states import GRADIENT, ShardStates


class _Shelf(Protocol):
    """Where a reduced shard waits for its step."""

    def memory(self) -> torch.Tensor | None:
        """[shard] where the reduction may sum into the shelf itself; else None."""

    def put(self, owned: torch.Tensor) -> None:
        """Keep ``owned`` [shard], wide or narrow; a copy may go on when this returns."""

    def window(self, place: Span, window: torch.Tensor) -> torch.Tensor:
        """[place] the gradient there; ``window`` holds what a store brought."""


class _InStates:
    """In the store, window by window."""

    def __init__(self, states: ShardStates, span: Span, dtype: torch.dtype) -> None:
        self._states = states
        self._span = span
        self._dtype = dtype
        self.narrow: torch.dtype | None = None
        """In which dtype the store has it, if that is not the wide one."""

    def memory(self) -> torch.Tensor | None:
        """A transfer is needed."""
        return None

    def put(self, owned: torch.Tensor) -> None:
        """To the store."""
        self.narrow = owned.dtype if owned.dtype != self._dtype else None
        self._states.write(GRADIENT, self._span, owned, self.narrow)

    def read(self, owned: torch.Tensor) -> torch.Tensor:
        """Fill ``owned`` [shard], wide."""
        if self.narrow is None:
            self._states.read(GRADIENT, self._span, owned)
            return owned
        as_kept = torch.empty_like(owned, dtype=self.narrow)
        self._states.read(GRADIENT, self._span, as_kept, self.narrow)
        return owned.copy_(as_kept)

    def window(self, place: Span, window: torch.Tensor) -> torch.Tensor:
        """From the store; what is narrow lies at the begin of the window's memory."""
        if self.narrow is None:
            return window
        return window.copy_(window.view(self.narrow)[: place.numel].clone())


class _Landed:
    """In host memory that was lent until the step is over."""

    def __init__(self, slab: Slab, numel: int, dtype: torch.dtype, beside: Beside) -> None:
        self._slab = slab
        self._shard = slab.tensor(dtype, 0, numel)
        self._beside = beside

    def memory(self) -> torch.Tensor | None:
        """Of the device where that is the CPU."""
        return None if self._beside.is_there else self._shard

    def put(self, owned: torch.Tensor) -> None:
        """On the second stream, which the step's thread waits for."""
        if owned is not self._shard:
            self._shard = self._slab.tensor(owned.dtype, 0, owned.numel())
            with self._beside.run():
                self._shard.copy_(owned, non_blocking=True)
            self._beside.holds(owned)

    def window(self, place: Span, window: torch.Tensor) -> torch.Tensor:
        """A view, or widened into ``window``."""
        landed = self._shard[place.begin : place.end]
        return landed if landed.dtype == window.dtype else window.copy_(landed)


class OffloadedGradients:
    """Only a shelf holds this rank's shard of the averaged gradient; a whole buffer is borrowed for one backward pass.

    The norm is taken while the shard is whole in memory, so its bits are those of gradients that stay there. A factor
    is not applied before the gradient is in memory anyway: for its step.
    """

    def __init__(self, comm: Communicator, dtype: torch.dtype, one_pass: OnePass, states: ShardStates) -> None:
        self.layout = one_pass.layout
        self._comm = comm
        self._dtype = dtype
        self._pass = one_pass
        self._states = states
        self._span = comm.my_span(self.layout.cuts)
        self.for_optimizer = guard(torch.Size([self._span.numel]), dtype, torch.device("cpu"))
        self._norms = torch.zeros(1, dtype=dtype, device=comm.device)
        self._store_shelf = _InStates(states, self._span, dtype)
        self._shelf: _Shelf = self._store_shelf
        self._factor = 1.0
        self._holds_gradient = False

    @property
    def has_unreduced(self) -> bool:
        """Whether a gradient came since the last reduction."""
        return not self._pass.is_empty

    def norms(self) -> torch.Tensor:
        """As they were when the shard was in memory."""
        return self._norms

    def clamp(self, bound: float) -> None:
        """Brings the shard to memory once more."""
        owned = self._owned_so_far()
        owned.clamp_(-bound, bound)
        self._keep(owned, owned)

    def multiply(self, factor: float) -> None:
        """Later, in ``fill``."""
        self._factor *= factor

    @property
    def is_in_store(self) -> bool:
        """Unless it has landed."""
        return self._shelf is self._store_shelf

    def take_norms(self) -> None:
        """They were taken when the shard was whole."""

    def for_window(self, place: Span, window: torch.Tensor) -> torch.Tensor:
        """From the shelf; the factor is left to do."""
        gradient = self._shelf.window(place, window)
        return gradient if self._factor == 1.0 else gradient.mul_(self._factor)

    @property
    def landing_bytes(self) -> int:
        """Memory that the shard needs to land in; 0 where the store is memory itself."""
        return 0 if self._states.in_memory else self._span.numel * self._dtype.itemsize

    def land_in(self, memory: Slab) -> None:
        """The next reduction is the last one before the step, which follows at once: until ``clear``."""
        self._shelf = _Landed(memory, self._span.numel, self._dtype, self._states.beside)

    def add(self, index: int, gradient: torch.Tensor, keep: bool) -> None:
        """Into the buffer of the pass."""
        self._pass.add(index, gradient, keep)

    def reduce(self, identity: CollectiveId) -> Pending:
        """Between its start and its end the shard lives in memory of the shelf, or of the transport."""
        buffer = self._pass.take()
        accumulate, self._holds_gradient = self._holds_gradient, True
        lent, owned = None, self._shelf.memory()
        leaves_narrow = owned is None and not accumulate and self._comm.world.size == 1
        if owned is None and not accumulate and buffer.dtype == self._dtype:
            # The first reduction of a step may sum into the buffer itself.
            owned = self._comm.my_slice(buffer, self.layout.cuts)
        elif owned is None:
            lent = owned = self._comm.borrow(self._span.numel, self._dtype)
        if accumulate:
            self._store_shelf.read(owned)
        pending = self._comm.reduce_scatter(identity, buffer, self.layout.cuts, owned, accumulate)

        def keep() -> None:
            self._keep(owned, buffer if leaves_narrow else owned)
            self._comm.give_back(buffer)
            if lent is not None:
                self._comm.give_back(lent)

        if isinstance(pending, Done):  # nothing travels: what is written can be written beside the units to come
            keep()
            return pending
        return Then(pending, keep)

    def _keep(self, owned: torch.Tensor, same: torch.Tensor) -> None:
        """Both hold the same numbers; ``same`` may be narrow."""
        self._norms = norms_of(owned, self.layout)
        self._shelf.put(same)

    def _owned_so_far(self) -> torch.Tensor:
        owned = torch.empty(self._span.numel, dtype=self._dtype, device=self._comm.device)
        return self._store_shelf.read(owned)

    def spread(self, identity: CollectiveId) -> Pending | None:
        """The optimizer steps this rank's shard only."""
        return None

    def so_far(self) -> SoFar:
        """What the store holds, and what passes under ``no_sync`` have left in the borrowed buffer."""
        if self._store_shelf.narrow is not None:
            self._store_shelf.put(self._owned_so_far())  # who reads or edits it expects the wide dtype
        reduced = self._states.rest(GRADIENT, self._span) if self._holds_gradient else None
        return SoFar(reduced, self._pass.written())

    def resume(self, so_far: SoFar) -> None:
        """The same places."""
        if so_far.reduced is not None:
            owned = so_far.reduced.load().to(self._comm.device)
            self._keep(owned, owned)
            self._holds_gradient = True
        for index, gradient in so_far.unreduced.items():
            self.add(index, gradient, keep=True)

    def clear(self) -> None:
        """The next reduction overwrites what the store holds."""
        self._pass.clear()
        self._holds_gradient = False
        self._factor = 1.0
        self._shelf = self._store_shelf
        self._store_shelf.narrow = None

    def resting_tensors(self) -> list[torch.Tensor]:
        """Nothing rests in memory."""
        return []

    def transient_tensors(self) -> list[torch.Tensor]:
        """What the pass holds."""
        return self._pass.tensors()
