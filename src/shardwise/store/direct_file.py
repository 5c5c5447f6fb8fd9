"""One open file, read and written past the page cache, block by block; anything odd about a block is dealt with here.

O_DIRECT wants file position, length and memory address all on whole pages. A block that is not goes through a page-
aligned bounce buffer; a write that covers a page only in part first reads that page. Where the filesystem refuses
O_DIRECT the same calls go through the page cache, which is told after each of them that the pages are not needed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from pathlib import Path

from shardwise.errors import ConfigError, StorageError
from shardwise.store.aligned import Slab
from shardwise.store.base import PAGE_BYTES, round_up

_WHAT_TO_DO = {
    errno.ENOSPC: "The disk is full: free space on it, or choose another nvme_path.",
    errno.EDQUOT: "The quota is used up: raise it, or choose another nvme_path.",
    errno.EFBIG: "Files of this size are not allowed here: raise the limit (ulimit -f), or choose another nvme_path.",
    errno.EIO: "The disk failed: look at the system's log, and choose another nvme_path.",
    errno.EROFS: "The filesystem has become read-only: look at the system's log for the disk's errors.",
    errno.ENODEV: "The disk is gone: look at the system's log, and choose another nvme_path.",
}


def failure(action: str, path: Path, position: int, error: OSError) -> StorageError:
    """The error for a call that failed: file, position, the system's words, what to do."""
    advice = _WHAT_TO_DO.get(error.errno or 0, "Look at the system's log, or choose another nvme_path.")
    return StorageError(
        f"{path} could not be {action} at byte {position}: {error.strerror or error}. {advice} "
        "What was kept in it is lost; go on from the last checkpoint."
    )


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user may still write to the filesystem of ``path``."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def make_room_error(path: Path, need: int, free: int) -> ConfigError:
    """The error for a filesystem that cannot hold what is needed."""
    return ConfigError(
        f"{path} has room for {free:,} bytes, but {need:,} are needed for offloaded state. Free space there, choose "
        "another nvme_path, offload fewer states, or use more ranks on more machines."
    )


def _is_aligned(memory: memoryview, offset: int) -> bool:
    if offset % PAGE_BYTES or memory.nbytes % PAGE_BYTES:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE_BYTES == 0


class DirectFile:
    """A file of a fixed size that this process created, open for reading and writing."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Create ``path`` with room for ``num_bytes`` bytes, rounded up to whole pages, all zero.

        Raises:
            ConfigError: The path exists or cannot be written, or the filesystem has not that much room.
        """
        self.path = path
        self.num_bytes = round_up(num_bytes)
        free = free_bytes(path.parent)
        if self.num_bytes > free:
            raise make_room_error(path.parent, self.num_bytes, free)
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be created for offloaded state: {error.strerror}. Choose an nvme_path that this user "
                "may write to, and one run id a run."
            ) from error
        self._edges = threading.Lock()  # of partly written pages, which are read before they are written
        try:
            if self.num_bytes:
                os.posix_fallocate(self.fd, 0, self.num_bytes)
            self.is_direct = self._switch_to_direct()
        except OSError as error:
            self.remove()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise make_room_error(path.parent, self.num_bytes, free_bytes(path.parent)) from error
            raise ConfigError(f"{path} cannot be used for offloaded state: {error.strerror}.") from error

    def _switch_to_direct(self) -> bool:
        """Leave the page cache if the filesystem lets us; some say no only when a page is read."""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            os.preadv(self.fd, [Slab.allocate(PAGE_BYTES).memory], 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags)
            return False
        return True

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill ``memory`` from byte ``offset`` on; StorageError with the reason where that cannot be."""
        if not self.is_direct or _is_aligned(memory, offset):
            self._read(memory, offset)
            return
        first, bounce = self._bounce(memory, offset)
        self._read(bounce, first)
        memory[:] = bounce[offset - first : offset - first + memory.nbytes]

    def write(self, memory: memoryview, offset: int) -> None:
        """Write ``memory`` at byte ``offset``; StorageError with the reason where that cannot be."""
        if not self.is_direct or _is_aligned(memory, offset):
            self._write(memory, offset)
            return
        first, bounce = self._bounce(memory, offset)
        with self._edges:
            if offset > first:
                self._read(bounce[:PAGE_BYTES], first)
            last = bounce.nbytes - PAGE_BYTES
            if (offset + memory.nbytes) % PAGE_BYTES and (last > 0 or offset == first):
                self._read(bounce[last:], first + last)
            bounce[offset - first : offset - first + memory.nbytes] = memory
            self._write(bounce, first)

    def _bounce(self, memory: memoryview, offset: int) -> tuple[int, memoryview]:
        """Where the whole pages around a block begin, and memory for them."""
        first = offset // PAGE_BYTES * PAGE_BYTES
        return first, Slab.allocate(round_up(offset + memory.nbytes) - first).memory

    def _read(self, memory: memoryview, offset: int) -> None:
        done = 0
        while done < memory.nbytes:
            try:
                count = os.preadv(self.fd, [memory[done:]], offset + done)
            except OSError as error:
                raise failure("read", self.path, offset + done, error) from error
            if count == 0:
                raise StorageError(
                    f"{self.path} ends before byte {offset + done}, but {self.num_bytes} bytes were allocated: another "
                    "process truncated it. What was kept in it is lost; go on from the last checkpoint."
                )
            done = self._resume(done, count)
        self._forget(offset, memory.nbytes)

    def _write(self, memory: memoryview, offset: int) -> None:
        done = 0
        while done < memory.nbytes:
            try:
                count = os.pwritev(self.fd, [memory[done:]], offset + done)
            except OSError as error:
                raise failure("written", self.path, offset + done, error) from error
            done = self._resume(done, count)
        self._forget(offset, memory.nbytes)

    def _resume(self, done: int, count: int) -> int:
        """Where to go on after ``count`` more bytes: O_DIRECT can only go on from a whole page."""
        if not self.is_direct:
            return done + count
        return done + count // PAGE_BYTES * PAGE_BYTES

    def _forget(self, offset: int, num_bytes: int) -> None:
        if not self.is_direct:
            # Starts the writing of dirty pages and drops the clean ones: the cache shall not crowd out the run.
            os.posix_fadvise(self.fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def remove(self) -> None:
        """Close the file and remove it. No transfer may be under way."""
        os.close(self.fd)
        self.path.unlink(missing_ok=True)
