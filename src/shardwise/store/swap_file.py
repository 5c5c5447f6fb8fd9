"""The store that is a file on NVMe: one for each rank and kind of state."""

from __future__ import annotations

from pathlib import Path

from shardwise.errors import StateError
from shardwise.store.base import Extent, Extents, Store, Traffic, Transfer
from shardwise.store.direct_file import DirectFile
from shardwise.store.direct_io import DirectIO


class SwapFile(Store):
    """Extents one after the other in one file, allocated whole before the run and removed by ``close``."""

    def __init__(self, path: Path, io: DirectIO, verify: bool = False) -> None:
        """Name a file that does not exist yet.

        Args:
            path: Best from `RunDirectory.file`.
            io: The threads, shared with other files; they must be closed after this.
            verify: Compare a checksum of all that is read.
        """
        self.path = path
        self._io = io
        self._verify = verify
        self._extents = Extents()
        self._file: DirectFile | None = None

    def reserve(self, num_bytes: int) -> Extent:
        """Set bytes apart; StateError after ``allocate``."""
        return self._extents.reserve(num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all extents, each rounded up to whole pages: the size of the file."""
        return self._extents.num_bytes

    @property
    def host_bytes(self) -> int:
        """None to speak of: buffers are the caller's."""
        return 0

    def allocate(self) -> None:
        """Create the file with all its room; ConfigError where the filesystem has not that much.

        Ranks that share a filesystem each see the same free bytes: compare their sum with `free_bytes` before.
        """
        self._extents.closed = True
        self._file = self._io.create(self.path, self._extents.num_bytes, self._verify)

    def switch_to(self, io: DirectIO) -> None:
        """Go on with other threads, once every transfer under way has ended."""
        self._io.finish(self._open())
        self._io = io

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is left alone; False where the filesystem wants it so."""
        return self._open().is_direct

    def start_read(self, extent: Extent, begin: int, memory: memoryview) -> Transfer:
        """Fill ``memory`` from byte ``begin`` of the extent on."""
        return self._io.start_read(self._open(), extent.at(begin, memory.nbytes), memory)

    def start_write(self, extent: Extent, begin: int, memory: memoryview) -> Transfer:
        """Keep ``memory`` at byte ``begin`` of the extent and after it."""
        return self._io.start_write(self._open(), extent.at(begin, memory.nbytes), memory)

    def _open(self) -> DirectFile:
        if self._file is None:
            raise StateError(f"{self.path} was used before it was allocated, or after it was closed.")
        return self._file

    def check(self) -> None:
        """StorageError where a transfer has failed, or where the file was truncated, replaced, removed or written to.

        Cheap: two system calls. Every transfer that finds no write under way compares as well.
        """
        self._io.check(self._open())

    @property
    def traffic(self) -> Traffic:
        """What was moved so far, by all files that share the threads."""
        return self._io.traffic

    def close(self) -> None:
        """Wait for transfers under way, then remove the file. Twice is fine; in a fork it is left alone."""
        if self._file is not None:
            if self._file.is_ours:
                self._io.finish(self._file)
            self._file.remove()
            self._file = None
