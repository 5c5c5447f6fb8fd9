"""Host memory in which reduced gradients wait for a step that is taken at once."""

from __future__ import annotations

from collections import deque

from shardwise.store.aligned import Slab, SlabPool


class Landings:
    """A few slabs, allocated once. One thread takes them, another gives them back."""

    def __init__(self, num_slabs: int, slab_bytes: int, pin: bool) -> None:
        self._pool = SlabPool(num_slabs, slab_bytes, pin)
        self._all = [self._pool.take() for _ in range(num_slabs)]
        self._free = deque(self._all)

    @property
    def num_bytes(self) -> int:
        """Host memory of all slabs."""
        return self._pool.num_bytes

    def has_free(self) -> bool:
        """Whether ``take`` gives one."""
        return bool(self._free)

    def take(self) -> Slab:
        """The slab that was free longest."""
        return self._free.popleft()

    def give_back(self, slab: Slab) -> None:
        """Its gradient was stepped."""
        self._free.append(slab)

    def take_all_back(self) -> None:
        """Nobody uses any of them, whoever had taken it."""
        self._free = deque(self._all)

    def close(self) -> None:
        """Free the memory; no copy to it is under way any more."""
        self._free.clear()
        for slab in self._all:
            self._pool.give_back(slab)
        self._all = []
        self._pool.close()
