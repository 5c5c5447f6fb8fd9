"""Host memory that states pass through on their way between a store and the place where they are worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from shardwise.store.aligned import Slab, SlabPool
from shardwise.store.base import Transfer


class Staging:
    """A few slabs, allocated once; each is taken again when what was written from it has arrived."""

    def __init__(self, num_slabs: int, slab_bytes: int, pin: bool) -> None:
        self._pool = SlabPool(num_slabs, slab_bytes, pin)
        self._leaving: deque[tuple[Slab, Sequence[Transfer]]] = deque()

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
        """Slabs that nobody holds and nothing is written from."""
        self._collect()
        return self._pool.num_free

    @property
    def num_unheld(self) -> int:
        """Slabs that ``take`` can give, now or when what is written from them has arrived."""
        return self._pool.num_free + len(self._leaving)

    def take(self) -> Slab:
        """A slab; waits for the write that was started first where none is free.

        Raises:
            StateError: all slabs are held.
            StorageError: that write failed.
        """
        self._collect()
        if not self._pool.num_free and self._leaving:
            self._finish_first()
        return self._pool.take()

    def give_back(self, slab: Slab, after: Sequence[Transfer] = ()) -> None:
        """Let others have it, once the transfers ``after`` have ended."""
        if after:
            self._leaving.append((slab, after))
        else:
            self._pool.give_back(slab)

    def drain(self) -> None:
        """Return when everything that was started has arrived.

        Raises:
            StorageError: something did not.
        """
        while self._leaving:
            self._finish_first()

    def _collect(self) -> None:
        while self._leaving and all(transfer.done for transfer in self._leaving[0][1]):
            self._finish_first()

    def _finish_first(self) -> None:
        slab, transfers = self._leaving.popleft()
        try:
            for transfer in transfers:
                transfer.wait()
        finally:
            self._pool.give_back(slab)

    def close(self) -> None:
        """Free the slabs; no transfer is under way any more."""
        self._leaving.clear()
        self._pool.close()
