"""The store that is a file on NVMe: one for each rank and kind of state."""

from __future__ import annotations

import os
from pathlib import Path

from shardwise.errors import StateError, StorageError
from shardwise.store.base import Extent, Extents, Store, Traffic, Transfer
from shardwise.store.direct_io import DirectIO, WatchedFile


class SwapFile(Store):
    """Extents one after the other in one file, allocated whole before the run and removed by ``close``."""

    def __init__(self, path: Path, io: DirectIO) -> None:
        self.path = path
        self._io = io
        self._extents = Extents()
        self._target: WatchedFile | None = None

    def reserve(self, num_bytes: int) -> Extent:
        """Set bytes apart; StateError after ``allocate``."""
        return self._extents.reserve(num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all extents, each rounded up to whole pages."""
        return self._extents.num_bytes

    @property
    def host_bytes(self) -> int:
        """None to speak of."""
        return 0

    def allocate(self) -> None:
        """Create the file with all its room; ConfigError where the filesystem has not that much.

        Ranks that share a filesystem each see the same free bytes: compare their sum with `free_bytes` before.
        """
        self._extents.closed = True
        self._target = self._io.create(self.path, self._extents.num_bytes)

    def start_read(self, extent: Extent, begin: int, memory: memoryview) -> Transfer:
        """Fill ``memory`` from byte ``begin`` of the extent on."""
        return self._io.start_read(self._open(), extent.at(begin, memory.nbytes), memory)

    def start_write(self, extent: Extent, begin: int, memory: memoryview) -> Transfer:
        """Keep ``memory`` at byte ``begin`` of the extent and after it."""
        return self._io.start_write(self._open(), extent.at(begin, memory.nbytes), memory)

    def _open(self) -> WatchedFile:
        if self._target is None:
            raise StateError(f"{self.path} was used before it was allocated, or after it was closed.")
        return self._target

    def check(self) -> None:
        """StorageError where a transfer has failed, or where somebody else touched the file."""
        target = self._open()
        if target.failure is not None:
            raise target.failure
        try:
            there = os.stat(self.path)
        except OSError as error:
            raise StorageError(f"{self.path} is gone: {error.strerror}.") from error
        own = os.fstat(target.file.fd)
        if (there.st_ino, there.st_dev) != (own.st_ino, own.st_dev):
            raise StorageError(f"{self.path} was replaced by another file.")

    @property
    def traffic(self) -> Traffic:
        """What was moved so far, by all files that share the threads."""
        return self._io.traffic

    def close(self) -> None:
        """Wait for transfers under way, then remove the file. Twice is fine."""
        if self._target is None:
            return
        for transfer in list(self._target.active):
            try:
                transfer.wait()
            except StorageError:
                continue  # whoever needed it has been told, and nobody needs it any more
        self._target.file.remove()
        self._target = None
