"""The store that is host memory: extents lie in one mapping, and a transfer is a copy that is done when it starts."""

from __future__ import annotations

import time

from shardwise.errors import StateError
from shardwise.store.aligned import Slab
from shardwise.store.base import Done, Extent, Extents, Store, Traffic, Transfer


class HostMemory(Store):
    """Host memory, pinned where asked for. Work on ``in_place`` memory needs no transfer at all."""

    def __init__(self, pin: bool = False) -> None:
        self._pin = pin
        self._extents = Extents()
        self._slab: Slab | None = None
        self._traffic = Traffic()

    def reserve(self, num_bytes: int) -> Extent:
        """Set bytes apart; StateError after ``allocate``."""
        return self._extents.reserve(num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all extents, each rounded up to whole pages."""
        return self._extents.num_bytes

    @property
    def host_bytes(self) -> int:
        """All of it, once allocated."""
        return 0 if self._slab is None else self._slab.allocated_bytes

    def allocate(self) -> None:
        """Map the memory, filled with zeros; StorageError where the system has not that much."""
        self._extents.closed = True
        self._slab = Slab.allocate(self._extents.num_bytes, self._pin)

    def in_place(self, extent: Extent) -> Slab:
        """The memory of the extent."""
        return self._whole().part(extent.begin, extent.num_bytes)

    def start_read(self, extent: Extent, begin: int, memory: memoryview) -> Transfer:
        """Copy to ``memory``."""
        size = memory.nbytes
        return self._copy(memory, self._whole().bytes(extent.at(begin, size), size), writes=False)

    def start_write(self, extent: Extent, begin: int, memory: memoryview) -> Transfer:
        """Copy from ``memory``."""
        size = memory.nbytes
        return self._copy(self._whole().bytes(extent.at(begin, size), size), memory, writes=True)

    def _whole(self) -> Slab:
        if self._slab is None:
            raise StateError("Host memory was used before it was allocated, or after it was closed.")
        return self._slab

    def _copy(self, target: memoryview, source: memoryview, writes: bool) -> Transfer:
        begin = time.perf_counter()
        target[:] = source
        self._traffic = self._traffic.plus(source.nbytes, time.perf_counter() - begin, writes)
        return Done()

    @property
    def traffic(self) -> Traffic:
        """What was copied so far."""
        return self._traffic

    def close(self) -> None:
        """Let go of the memory; it is freed with the last tensor on it."""
        if self._slab is not None:
            self._slab.unpin()
        self._slab = None
