"""The optimizer's side of one rank's shard, off the device: gradient, master and moments, window by window.

::

    shard    | window 0            | window 1            | ...
    store    [gradient|master|exp_avg|exp_avg_sq][gradient|master|exp_avg|exp_avg_sq] ...

A window is what is in memory at a time while the optimizer streams over the shard. Its states lie one after the other,
so that one sequential read brings all that a step needs, and one write takes back all that it changed: the gradient,
which a step does not change, comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from shardwise.layout import Layout, Span
from shardwise.store.aligned import Slab
from shardwise.store.base import Extent, Store, Transfer, round_up
from shardwise.store.beside import Beside
from shardwise.store.host_memory import HostMemory
from shardwise.zero.rest import InStore
from shardwise.zero.staging import Staging

StagingSource = Callable[[], Staging]

GRADIENT = "gradient"
MASTER = "master"
VALUES = "values"
"""The parameters as they rest apart from the masters: stepped values on their way out. Where a window has no masters
they are what is stepped, and are brought in from where they rest. This store does not keep them."""

WINDOW_NUMEL = 1 << 20
"""Elements of a window at most: parameter, gradient and moments of it pass through the cache, and a transfer of a few
megabytes is long enough to reach a disk's bandwidth."""


def cut_windows(layout: Layout, span: Span, cut_anywhere: bool, max_numel: int = WINDOW_NUMEL) -> list[Span]:
    """Cut ``span`` of a flat buffer into windows that cover it.

    Args:
        layout: of the buffer.
        span: what the optimizer of this rank steps.
        cut_anywhere: False keeps parameters whole, for optimizers that need whole matrices.
        max_numel: elements of a window, unless one whole parameter has more.
    """
    if cut_anywhere:
        cuts = list(range(span.begin, span.end, max_numel))
    else:
        cuts = [span.begin]
        for slot in layout.slots:
            if span.begin < slot.offset < span.end and slot.span.end - cuts[-1] > max_numel:
                cuts.append(slot.offset)
    return [Span(begin, end) for begin, end in zip(cuts, [*cuts[1:], span.end], strict=True) if end > begin]


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Which states a window of any length holds, in order."""

    kinds: tuple[tuple[str, torch.dtype], ...]
    """What the store keeps."""
    values: torch.dtype | None
    """Dtype of the parameters' values, where a window holds them; they lie behind what is kept."""

    def holds(self, kind: str) -> bool:
        """Whether the store keeps that kind."""
        return any(name == kind for name, _ in self.kinds)

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """What the optimizer itself keeps, such as ``exp_avg``."""
        return tuple(name for name, _ in self.kinds if name not in (GRADIENT, MASTER))

    def begin(self, kind: str, numel: int) -> int:
        """First byte of a kind in a window of ``numel`` elements."""
        at = 0
        for name, dtype in self.kinds:
            if name == kind:
                break
            at += round_up(numel * dtype.itemsize)
        return at

    def dtype(self, kind: str) -> torch.dtype:
        """Of that kind's elements."""
        if kind == VALUES and self.values is not None:
            return self.values
        return dict(self.kinds)[kind]

    def kept_bytes(self, numel: int) -> int:
        """Bytes that the store keeps of a window."""
        return self.begin(VALUES, numel)

    def memory_bytes(self, numel: int) -> int:
        """Bytes of a window in memory."""
        return self.kept_bytes(numel) + (round_up(numel * self.values.itemsize) if self.values is not None else 0)


@dataclass(frozen=True, slots=True)
class Window:
    """Elements ``span`` of the flat buffer, and where the store keeps their states."""

    span: Span
    extent: Extent


class Loaded:
    """A window in memory, or on its way there."""

    def __init__(self, plan: WindowPlan, window: Window, memory: Slab, transfers: Sequence[Transfer]) -> None:
        self.window = window
        self.memory = memory
        self._plan = plan
        self._transfers = list(transfers)

    @property
    def transfers(self) -> Sequence[Transfer]:
        """What brings it, and what its memory waits for."""
        return self._transfers

    def also(self, transfer: Transfer) -> None:
        """Something else that brings a part of the window."""
        self._transfers.append(transfer)

    def wait(self) -> None:
        """Return when it may be worked on; StorageError if it could not be read."""
        for transfer in self._transfers:
            transfer.wait()

    def bytes(self, kind: str) -> memoryview:
        """The memory of one kind."""
        numel = self.window.span.numel
        return self.memory.bytes(self._plan.begin(kind, numel), numel * self._plan.dtype(kind).itemsize)

    def values(self, kind: str, span: Span) -> torch.Tensor:
        """[span] a view of those elements, which lie in the window."""
        dtype = self._plan.dtype(kind)
        local = span.shift(-self.window.span.begin)
        begin = self._plan.begin(kind, self.window.span.numel)
        return self.memory.tensor(dtype, begin + local.begin * dtype.itemsize, span.numel)


class ShardStates:
    """The states of one flat buffer's shard in a store.

    Args:
        store: not allocated yet: room is reserved in it here.
        staging: what windows pass through where the store is no memory; opened before the first use.
        beside: for copies between the device and a store that is memory.
        plan: which states.
        spans: the windows, from ``cut_windows``.
    """

    def __init__(
        self, store: Store, staging: StagingSource, beside: Beside, plan: WindowPlan, spans: Sequence[Span]
    ) -> None:
        self.plan = plan
        self.beside = beside
        # Where the store is memory that is worked on in place, the parameters' values have a place there, too.
        self._store = store
        size = plan.memory_bytes if self.in_memory else plan.kept_bytes
        self.windows = [Window(span, store.reserve(size(span.numel))) for span in spans]
        self._staging = staging

    @property
    def in_memory(self) -> bool:
        """Whether the store is memory: windows are worked on in place, and gradients have a place there."""
        return isinstance(self._store, HostMemory)

    def window_bytes(self) -> int:
        """Bytes of the largest window in memory."""
        return max((self.plan.memory_bytes(window.span.numel) for window in self.windows), default=0)

    # --------------------------------------------------------------------------------------------------- windows

    def start_load(self, window: Window, kinds: Sequence[str]) -> Loaded:
        """Bring the window to memory; ``kinds`` are neighbours in the plan, the others hold anything."""
        memory = self._store.in_place(window.extent)
        if memory is not None:
            # Gradients may still be on their way from the device.
            return Loaded(self.plan, window, memory, [self.beside.end()])
        staging = self._staging()
        slab = staging.take_to_read()
        # A step also writes where nothing is read: moments in its first step, values on their way out.
        transfers = list(staging.leaving(slab))
        if kinds:
            begin, end = self._bounds(kinds, window)
            transfers.append(self._store.start_read(window.extent, begin, slab.bytes(begin, end - begin)))
        return Loaded(self.plan, window, slab, transfers)

    def start_keep(self, loaded: Loaded, kinds: Sequence[str], others: Sequence[Transfer] = ()) -> None:
        """Take back what a step changed: ``kinds``, neighbours in the plan. The window may not be touched after this.

        Args:
            loaded: the window.
            kinds: what changed.
            others: transfers that read from the window's memory, too.
        """
        if self._store.in_place(loaded.window.extent) is not None:
            return
        transfers = list(others)
        if kinds:
            begin, end = self._bounds(kinds, loaded.window)
            memory = loaded.memory.bytes(begin, end - begin)
            transfers.append(self._store.start_write(loaded.window.extent, begin, memory))
        self._staging().give_back(loaded.memory, after=transfers)

    def let_go(self, loaded: Loaded) -> None:
        """Give up the window's memory; nothing of it is taken back."""
        if self._store.in_place(loaded.window.extent) is None:
            self._staging().give_back(loaded.memory, after=loaded.transfers)

    def _bounds(self, kinds: Sequence[str], window: Window) -> tuple[int, int]:
        """The first byte of ``kinds`` and the one behind the last."""
        numel = window.span.numel
        end = self.plan.begin(kinds[-1], numel) + numel * self.plan.dtype(kinds[-1]).itemsize
        return self.plan.begin(kinds[0], numel), end

    # -------------------------------------------------------------------------------------------------- elements

    def rest(self, kind: str, span: Span) -> InStore:
        """Elements ``span`` of the flat buffer, of one kind, where they rest."""
        read, write = partial(self.read, kind), partial(self.write, kind)
        return InStore(self.plan.dtype(kind), span, read, write, partial(self.views, kind))

    def views(self, kind: str, span: Span) -> list[torch.Tensor] | None:
        """Elements ``span`` where the store keeps them, window by window; None where it is no memory."""
        found = []
        for common, extent, begin in self._parts(kind, span, self.plan.dtype(kind)):
            memory = self._store.in_place(extent)
            if memory is None:
                return None
            found.append(memory.tensor(self.plan.dtype(kind), begin, common.numel))
        self.beside.end().wait()  # some may still be on its way from the device
        return found

    def read(self, kind: str, span: Span, out: torch.Tensor, narrow: torch.dtype | None = None) -> None:
        """Fill ``out`` [span], on any device; ``narrow`` as in ``write``."""
        dtype = narrow or self.plan.dtype(kind)
        for common, extent, begin in self._parts(kind, span, dtype):
            target = out[common.begin - span.begin : common.end - span.begin]
            memory = self._store.in_place(extent)
            num_bytes = common.numel * dtype.itemsize
            if memory is not None:
                with self.beside.run():
                    target.copy_(memory.tensor(dtype, begin, common.numel), non_blocking=True)
                self.beside.join()
                continue
            slab = self._staging().take_to_read()
            try:
                self._store.read(extent, begin, slab.bytes(0, num_bytes))
                target.copy_(slab.tensor(dtype, 0, common.numel))
            finally:
                self._staging().give_back(slab)

    def write(self, kind: str, span: Span, values: torch.Tensor, narrow: torch.dtype | None = None) -> None:
        """Keep ``values`` [span], from any device; the transfer may go on when this returns.

        Args:
            kind: which.
            span: whole windows where it is narrow.
            values: in the plan's dtype, or to be converted to it; exactly ``narrow`` where that is given.
            narrow: a dtype of fewer bytes than the plan's, in which the store is to have them: from the begin of each
                window's place on. Who reads must know.
        """
        dtype = narrow or self.plan.dtype(kind)
        for common, extent, begin in self._parts(kind, span, dtype):
            source = values[common.begin - span.begin : common.end - span.begin]
            memory = self._store.in_place(extent)
            num_bytes = common.numel * dtype.itemsize
            if memory is not None:
                with self.beside.run():
                    memory.tensor(dtype, begin, common.numel).copy_(source, non_blocking=True)
                self.beside.holds(source)
                continue
            slab = self._staging().take()
            slab.tensor(dtype, 0, common.numel).copy_(source)
            self._staging().give_back(slab, after=[self._store.start_write(extent, begin, slab.bytes(0, num_bytes))])

    def _parts(self, kind: str, span: Span, dtype: torch.dtype) -> Iterator[tuple[Span, Extent, int]]:
        """What of ``span`` lies in each window: the elements, the extent, and the first byte in it."""
        for window in self.windows:
            common = span.intersect(window.span)
            if common.numel:
                at = (common.begin - window.span.begin) * dtype.itemsize
                yield common, window.extent, self.plan.begin(kind, window.span.numel) + at
