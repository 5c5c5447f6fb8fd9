"""Where the gradients of one flat buffer gather until they are reduced: two answers, one interface.

``ResidentGradients``  a whole buffer at all times: gradients of several backward passes add up and are reduced once.
``TransientGradients``  only this rank's shard of the reduced gradient rests; a whole buffer is borrowed for one
backward pass, from its first gradient to its reduction.

Both take each parameter's gradient as autograd produces it, and both can take more after a reduction: what is reduced
already stays reduced, what comes later is added by the next reduction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from shardwise import torch_compat
from shardwise.comm.base import CollectiveId, Communicator, Pending
from shardwise.layout import Layout, Span
from shardwise.zero.parameters import slot_views
from shardwise.zero.rest import InMemory, Rest


@dataclass(frozen=True, slots=True)
class SoFar:
    """The gradients of a step under way."""

    reduced: Rest | None
    """[this rank's shard] what is averaged already."""
    unreduced: Mapping[int, torch.Tensor]
    """By slot, in the parameter's shape: what only this rank knows."""


class GradientHome(Protocol):
    """The gradients of one flat buffer."""

    layout: Layout
    for_optimizer: torch.Tensor
    """[optimizer's span] the reduced gradient as the optimizer sees it, valid after ``spread``."""

    @property
    def has_unreduced(self) -> bool:
        """Whether a gradient came since the last reduction."""

    def norms(self) -> torch.Tensor:
        """[k] norms of the parts of this rank's shard of the reduced gradient, see ``norms_of``."""

    def clamp(self, bound: float) -> None:
        """Limit every element of the shard to ±``bound``."""

    def multiply(self, factor: float) -> None:
        """Multiply what the optimizer sees."""

    @property
    def is_in_store(self) -> bool:
        """Whether the store brings the gradient to its step."""

    def take_norms(self) -> None:
        """Let ``norms`` be what they are now, for the optimizer may change its gradient."""

    def for_window(self, place: Span, window: torch.Tensor) -> torch.Tensor:
        """[place] What the optimizer is to see there, in host memory: ``window``, or memory of its own.

        Args:
            place: elements of the optimizer's span, counted from its begin.
            window: what the store held of them, if the gradient is there; else of any content.
        """

    def add(self, index: int, gradient: torch.Tensor, keep: bool) -> None:
        """Take the gradient of slot ``index``. ``keep``: it will not be reduced in this backward pass."""

    def reduce(self, identity: CollectiveId) -> Pending:
        """Start adding the mean over ranks of what is unreduced (zeros where nothing came) to ``owned``."""

    def spread(self, identity: CollectiveId) -> Pending | None:
        """Bring ``owned`` of all ranks into ``for_optimizer``; None where the optimizer steps ``owned`` alone."""

    def so_far(self) -> SoFar:
        """What a checkpoint in the middle of a step keeps; views."""

    def resume(self, so_far: SoFar) -> None:
        """Go on from there, with what ``so_far`` said, after ``clear``."""

    def clear(self) -> None:
        """Forget all gradients: the step is done, or is given up."""

    def resting_tensors(self) -> list[torch.Tensor]:
        """What is allocated between steps."""

    def transient_tensors(self) -> list[torch.Tensor]:
        """What is borrowed at this moment."""


class _Slots:
    """The per-parameter views of a whole gradient buffer, and which of them hold something."""

    def __init__(self, layout: Layout, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self._views = slot_views(buffer, layout)
        self._gaps = [buffer[gap.begin : gap.end] for gap in layout.gaps()]
        self._written = [False] * len(self._views)
        self.any_written = False

    def add(self, index: int, gradient: torch.Tensor) -> None:
        """The first gradient of a parameter overwrites what an earlier use left, so nothing needs zeroing before."""
        if self._written[index]:
            self._views[index].add_(gradient)
        else:
            self._views[index].copy_(gradient)
            self._written[index] = self.any_written = True

    def written(self) -> dict[int, torch.Tensor]:
        """What holds something, by slot."""
        return {i: view for i, (view, written) in enumerate(zip(self._views, self._written, strict=True)) if written}

    def complete(self) -> torch.Tensor:
        """The buffer with zeros where no gradient came."""
        for view, written in zip(self._views, self._written, strict=True):
            if not written:
                view.zero_()
        for gap in self._gaps:
            gap.zero_()
        return self.buffer

    def clear(self) -> None:
        """The next gradients overwrite."""
        if self.any_written:
            self._written = [False] * len(self._views)
            self.any_written = False


def norms_of(owned: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[1] the norm of a shard; of the only one of a world [number of slots] those of its parameters.

    ``torch.nn.utils.clip_grad_norm_`` works by parameter, and so does a rank alone, offloaded or not.
    """
    if layout.world > 1:
        norm: torch.Tensor = torch.linalg.vector_norm(owned)
        return norm[None]
    return torch.stack(torch_compat.norms(slot_views(owned, layout)))


class _InMemory:
    """What homes whose reduced gradient stays in memory have in common."""

    owned: torch.Tensor
    """[this rank's shard] the reduced gradient, in the master's dtype."""
    for_optimizer: torch.Tensor

    layout: Layout
    is_in_store = False
    _norms: torch.Tensor | None = None

    def norms(self) -> torch.Tensor:
        """Of the shard at once: the bits do not depend on how the optimizer cuts it."""
        return norms_of(self.owned, self.layout) if self._norms is None else self._norms

    def take_norms(self) -> None:
        """Until ``clear``."""
        self._norms = norms_of(self.owned, self.layout)

    def clamp(self, bound: float) -> None:
        """In place."""
        self.owned.clamp_(-bound, bound)

    def multiply(self, factor: float) -> None:
        """In place."""
        self.for_optimizer.mul_(factor)

    def for_window(self, place: Span, window: torch.Tensor) -> torch.Tensor:
        """From the device."""
        return window.copy_(self.for_optimizer[place.begin : place.end])


class Then:
    """A pending collective with something to do once it is over."""

    def __init__(self, pending: Pending, then: _Finish) -> None:
        self._pending: Pending | None = pending
        self._then = then

    def wait(self) -> None:
        """Finish the collective and do it; once."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._then()


class _Finish(Protocol):
    def __call__(self) -> None: ...


class ResidentGradients(_InMemory):
    """A whole buffer in the master's dtype; this rank's slice of it becomes the reduced gradient in place."""

    def __init__(
        self, comm: Communicator, layout: Layout, dtype: torch.dtype, travel_dtype: torch.dtype, span: Span
    ) -> None:
        self.layout = layout
        self._comm = comm
        self._travel_dtype = travel_dtype
        self._whole = comm.allocate(layout.numel, dtype)
        self._slots = _Slots(layout, self._whole)
        self.owned = comm.my_slice(self._whole, layout.cuts)
        self.for_optimizer = self._whole[span.begin : span.end]
        self._reduced = False
        self._carry: torch.Tensor | None = None

    @property
    def has_unreduced(self) -> bool:
        """Whether a gradient came since the last reduction."""
        return self._slots.any_written

    def add(self, index: int, gradient: torch.Tensor, keep: bool) -> None:
        """Add in place; what an earlier reduction of this step left in my slice is set aside first."""
        if self._reduced:
            self._comm.settle()
            self._carry = self.owned.clone()
            self._reduced = False
        self._slots.add(index, gradient)

    def reduce(self, identity: CollectiveId) -> Pending:
        """From the whole buffer into my slice of it; through a narrower copy where gradients travel so."""
        if self._reduced:
            # Nothing of mine is new, but other ranks reduce: take part with zeros.
            self._comm.settle()
            self._carry = self.owned.clone()
        whole = self._slots.complete()
        self._slots.clear()
        self._reduced = True
        if self._travel_dtype == whole.dtype:
            pending = self._comm.reduce_scatter(identity, whole, self.layout.cuts, self.owned, accumulate=False)
            return Then(pending, self._add_carry)
        staging = self._comm.borrow(whole.numel(), self._travel_dtype)
        staging.copy_(whole)
        pending = self._comm.reduce_scatter(identity, staging, self.layout.cuts, self.owned, accumulate=False)

        def finish() -> None:
            self._comm.give_back(staging)
            self._add_carry()

        return Then(pending, finish)

    def _add_carry(self) -> None:
        if self._carry is not None:
            self.owned.add_(self._carry)
            self._carry = None

    def spread(self, identity: CollectiveId) -> Pending | None:
        """Fetch the other owners' reduced slices, where this rank's optimizer steps them too."""
        if self.for_optimizer.numel() == self.owned.numel() or not self._reduced:
            return None
        return self._comm.all_gather_in_place(identity, self._whole, self.layout.cuts)

    def so_far(self) -> SoFar:
        """What is averaged lies in my slice, or was set aside when more came."""
        reduced = self.owned if self._reduced else self._carry
        return SoFar(None if reduced is None else InMemory(reduced), self._slots.written())

    def resume(self, so_far: SoFar) -> None:
        """The same places."""
        if so_far.reduced is not None and so_far.unreduced:
            self._carry = so_far.reduced.load()
        elif so_far.reduced is not None:
            self.owned.copy_(so_far.reduced.load())
            self._reduced = True
        for index, gradient in so_far.unreduced.items():
            self._slots.add(index, gradient)

    def clear(self) -> None:
        """The next gradients overwrite the buffer."""
        self._slots.clear()
        self._reduced = False
        self._carry = None
        self._norms = None

    def resting_tensors(self) -> list[torch.Tensor]:
        """The whole buffer."""
        return [self._whole]

    def transient_tensors(self) -> list[torch.Tensor]:
        """What was set aside."""
        return [] if self._carry is None else [self._carry]


class OnePass:
    """The whole gradient of one backward pass, in a buffer that is borrowed until its reduction is over."""

    def __init__(
        self, comm: Communicator, layout: Layout, dtype: torch.dtype, travel_dtype: torch.dtype, contiguous: bool
    ) -> None:
        self.layout = layout
        self._comm = comm
        self._dtype = dtype
        self._travel_dtype = travel_dtype
        self._contiguous = contiguous
        self._slots: _Slots | None = None
        self._scattered: dict[int, torch.Tensor] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing came since the last reduction."""
        return self._slots is None and not self._scattered

    def add(self, index: int, gradient: torch.Tensor, keep: bool) -> None:
        """Into the borrowed buffer; in the master's dtype where several passes will add up in it."""
        if not self._contiguous and not keep and self._slots is None:
            kept = self._scattered.get(index)
            self._scattered[index] = gradient if kept is None else kept.add_(gradient)
            return
        self._borrowed(self._dtype if keep else self._travel_dtype).add(index, gradient)

    def _borrowed(self, dtype: torch.dtype) -> _Slots:
        if self._slots is None:
            self._slots = _Slots(self.layout, self._comm.borrow(self.layout.numel, dtype))
        return self._slots

    def take(self) -> torch.Tensor:
        """[N] the buffer in the travelling dtype, zeros where nothing came; the caller gives it back.

        Of one rank alone nothing travels: a sum of several passes stays in the master's dtype.
        """
        slots = self._borrowed(self._travel_dtype)
        for index, gradient in self._scattered.items():
            slots.add(index, gradient)
        self._scattered.clear()
        self._slots = None
        buffer = slots.complete()
        if buffer.dtype != self._travel_dtype and self._comm.world.size > 1:
            wide, buffer = buffer, self._comm.borrow(self.layout.numel, self._travel_dtype)
            buffer.copy_(wide)
            self._comm.give_back(wide)
        return buffer

    def written(self) -> dict[int, torch.Tensor]:
        """What came, by slot."""
        return dict(self._scattered) if self._slots is None else self._slots.written()

    def clear(self) -> None:
        """Forget it."""
        if self._slots is not None:
            self._comm.give_back(self._slots.buffer)
        self._slots = None
        self._scattered.clear()

    def tensors(self) -> list[torch.Tensor]:
        """The borrowed buffer, or the gradients as autograd made them."""
        return list(self._scattered.values()) if self._slots is None else [self._slots.buffer]


class TransientGradients(_InMemory):
    """A shard in the master's dtype; a whole buffer in the travelling dtype for the time of one backward pass."""

    def __init__(self, comm: Communicator, dtype: torch.dtype, one_pass: OnePass) -> None:
        self.layout = one_pass.layout
        self._comm = comm
        self._pass = one_pass
        self.owned = torch.zeros(comm.my_span(self.layout.cuts).numel, dtype=dtype, device=comm.device)
        self.for_optimizer = self.owned
        self._holds_gradient = False

    @property
    def has_unreduced(self) -> bool:
        """Whether a gradient came since the last reduction."""
        return not self._pass.is_empty

    def add(self, index: int, gradient: torch.Tensor, keep: bool) -> None:
        """Into the buffer of the pass."""
        self._pass.add(index, gradient, keep)

    def reduce(self, identity: CollectiveId) -> Pending:
        """Into the shard; the whole buffer goes back when the reduction is over."""
        buffer = self._pass.take()
        accumulate, self._holds_gradient = self._holds_gradient, True
        pending = self._comm.reduce_scatter(identity, buffer, self.layout.cuts, self.owned, accumulate)
        return Then(pending, lambda: self._comm.give_back(buffer))

    def spread(self, identity: CollectiveId) -> Pending | None:
        """The optimizer steps this rank's shard only."""
        return None

    def so_far(self) -> SoFar:
        """The shard, and what passes under ``no_sync`` have left in the borrowed buffer."""
        return SoFar(InMemory(self.owned) if self._holds_gradient else None, self._pass.written())

    def resume(self, so_far: SoFar) -> None:
        """The same places."""
        if so_far.reduced is not None:
            self.owned.copy_(so_far.reduced.load())
            self._holds_gradient = True
        for index, gradient in so_far.unreduced.items():
            self.add(index, gradient, keep=True)

    def clear(self) -> None:
        """The next reduction overwrites the shard."""
        self._pass.clear()
        self._holds_gradient = False
        self._norms = None

    def resting_tensors(self) -> list[torch.Tensor]:
        """The shard."""
        return [self.owned]

    def transient_tensors(self) -> list[torch.Tensor]:
        """What the pass holds."""
        return self._pass.tensors()
