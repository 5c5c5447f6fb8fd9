"""Host memory that states pass through on their way between a store and the place where they are worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from shardwise.errors import StateError
from shardwise.store.aligned import Slab, SlabPool
from shardwise.store.base import Transfer


class Staging:
    """A few slabs, allocated once, that go round: the one that was given back first is taken next.

    Several threads may take and give back, as long as they agree on how many each of them holds.
    """

    def __init__(self, num_slabs: int, slab_bytes: int, pin: bool) -> None:
        self._pool = SlabPool(num_slabs, slab_bytes, pin)
        self._free: deque[tuple[Slab, Sequence[Transfer]]] = deque((self._pool.take(), ()) for _ in range(num_slabs))
        self._leaving: dict[Slab, Sequence[Transfer]] = {}
        """What is written from slabs that were taken to read into."""

    @property
    def num_slabs(self) -> int:
        """How many there are."""
        return self._pool.num_slabs

    @property
    def slab_bytes(self) -> int:
        """Size of each."""
        return self._pool.slab_bytes

    @property
    def num_bytes(self) -> int:
        """Host memory of all slabs."""
        return self._pool.num_bytes

    @property
    def num_free(self) -> int:
        """Slabs that nobody holds, though something may still be written from them."""
        return len(self._free)

    def take(self) -> Slab:
        """A slab whose memory nobody uses any more: waits for what is written from it.

        Raises:
            StateError: all slabs are held.
            StorageError: what was written did not arrive.
        """
        slab, leaving = self._pop()
        try:
            for transfer in leaving:
                transfer.wait()
        except BaseException:
            self._free.append((slab, ()))
            raise
        return slab

    def take_to_read(self) -> Slab:
        """A slab that a store may read into at once: it does so when what is written from the same bytes has arrived.

        Of other bytes the write may last longer than the read: who changes them waits for ``leaving`` before.
        """
        slab, leaving = self._pop()
        for transfer in leaving:
            if not transfer.in_order:
                transfer.wait()
        self._leaving[slab] = leaving
        return slab

    def leaving(self, slab: Slab) -> Sequence[Transfer]:
        """What was written from it when it was taken to read into."""
        return self._leaving.get(slab, ())

    def _pop(self) -> tuple[Slab, Sequence[Transfer]]:
        if not self._free:
            raise StateError(f"all {self.num_slabs} slabs are held: one was not given back.")
        return self._free.popleft()

    def give_back(self, slab: Slab, after: Sequence[Transfer] = ()) -> None:
        """Let others have it. ``after``: transfers from its memory that are under way."""
        before = [transfer for transfer in self._leaving.pop(slab, ()) if not transfer.done]
        self._free.append((slab, [*before, *after]))

    def drain(self) -> None:
        """Return when everything that was started from slabs that are given back has arrived.

        Raises:
            StorageError: something did not.
        """
        for _, leaving in list(self._free):
            for transfer in leaving:
                transfer.wait()

    def close(self) -> None:
        """Free the slabs; no transfer is under way any more."""
        for slab, _ in self._free:
            self._pool.give_back(slab)
        self._free.clear()
        self._pool.close()
