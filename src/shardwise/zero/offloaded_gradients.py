"""Gradients that leave the device as soon as they are averaged, and come back window by window for their step."""

from __future__ import annotations

import torch

from shardwise.comm.base import CollectiveId, Communicator, Done, Pending
from shardwise.layout import Span
from shardwise.zero.gradients import OnePass, SoFar, Then, norms_of
from shardwise.zero.guard import guard
from shardwise.zero.shard_states import GRADIENT, ShardStates


class OffloadedGradients:
    """Only a store holds this rank's shard of the averaged gradient; a whole buffer is borrowed for one backward pass.

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
        self._keep(owned)

    def multiply(self, factor: float) -> None:
        """Later, in ``fill``."""
        self._factor *= factor

    def fill(self, place: Span, window: torch.Tensor) -> None:
        """The store brought the gradient; the factor is left to do."""
        if self._factor != 1.0:
            window.mul_(self._factor)

    def add(self, index: int, gradient: torch.Tensor, keep: bool) -> None:
        """Into the buffer of the pass."""
        self._pass.add(index, gradient, keep)

    def reduce(self, identity: CollectiveId) -> Pending:
        """The shard lives between the start of the reduction and its end, in memory that the transport lends."""
        buffer = self._pass.take()
        accumulate, self._holds_gradient = self._holds_gradient, True
        # The first reduction of a step may sum into the buffer itself.
        in_place = not accumulate and buffer.dtype == self._dtype
        owned = self._comm.my_slice(buffer, self.layout.cuts) if in_place else self._borrow()
        if accumulate:
            self._states.read(GRADIENT, self._span, owned)
        pending = self._comm.reduce_scatter(identity, buffer, self.layout.cuts, owned, accumulate)

        def keep() -> None:
            self._keep(owned)
            self._comm.give_back(buffer)
            if not in_place:
                self._comm.give_back(owned)

        if isinstance(pending, Done):  # nothing travels: what is written can be written beside the units to come
            keep()
            return pending
        return Then(pending, keep)

    def _borrow(self) -> torch.Tensor:
        return self._comm.borrow(self._span.numel, self._dtype)

    def _keep(self, owned: torch.Tensor) -> None:
        self._norms = norms_of(owned, self.layout)
        self._states.write(GRADIENT, self._span, owned)

    def _owned_so_far(self) -> torch.Tensor:
        owned = torch.empty(self._span.numel, dtype=self._dtype, device=self._comm.device)
        self._states.read(GRADIENT, self._span, owned)
        return owned

    def spread(self, identity: CollectiveId) -> Pending | None:
        """The optimizer steps this rank's shard only."""
        return None

    def so_far(self) -> SoFar:
        """What the store holds, and what passes under ``no_sync`` have left in the borrowed buffer."""
        reduced = self._states.rest(GRADIENT, self._span) if self._holds_gradient else None
        return SoFar(reduced, self._pass.written())

    def resume(self, so_far: SoFar) -> None:
        """The same places."""
        if so_far.reduced is not None:
            self._keep(so_far.reduced.load().to(self._comm.device))
            self._holds_gradient = True
        for index, gradient in so_far.unreduced.items():
            self.add(index, gradient, keep=True)

    def clear(self) -> None:
        """The next reduction overwrites what the store holds."""
        self._pass.clear()
        self._holds_gradient = False
        self._factor = 1.0

    def resting_tensors(self) -> list[torch.Tensor]:
        """Nothing rests in memory."""
        return []

    def transient_tensors(self) -> list[torch.Tensor]:
        """What the pass holds."""
        return self._pass.tensors()
