"""One open file, read and written past the page cache, block by block; anything odd about a block is dealt with here.

O_DIRECT wants file position, length and memory address all on whole pages. What is not goes through a page-aligned
bounce buffer; a write that covers a page only in part first reads that page, so two transfers may not be in one page at
a time if one of them writes. Where the filesystem refuses O_DIRECT the same calls go through the page cache, which is
told after each of them that the pages are not needed.

After the first failure nothing is read or written any more: what the file holds is then unknown.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import NoReturn

import numpy as np

from shardwise.errors import ConfigError, StorageError
from shardwise.store.aligned import Slab
from shardwise.store.base import PAGE_BYTES, round_up
from shardwise.store.page_checksums import PageChecksums

_ADVICE = {
    errno.ENOSPC: "The disk is full: free space on it, or choose another nvme_path.",
    errno.EDQUOT: "The quota is used up: raise it, or choose another nvme_path.",
    errno.EFBIG: "Files of this size are not allowed: raise the limit (ulimit -f), or choose another nvme_path.",
    errno.EIO: "The disk failed: look at the system's log, and choose another nvme_path.",
    errno.EROFS: "The filesystem has become read-only: look at the system's log for the disk's errors.",
    errno.ENODEV: "The disk is gone: look at the system's log, and choose another nvme_path.",
}
_LOST = "What was kept in it is lost; go on from the last checkpoint."


def free_bytes(path: str | Path) -> int:
    """Bytes that an ordinary user may still write to the filesystem of ``path``, which must exist."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def no_room(path: Path, need: int, free: int) -> ConfigError:
    """The error for a filesystem that cannot hold ``need`` bytes of offloaded state."""
    return ConfigError(
        f"{path} has room for {free:,} bytes, but offloaded state needs {need:,}. Free space there, choose another "
        "nvme_path, offload fewer states, or use more machines."
    )


def address_of(memory: memoryview) -> int:
    """Where the bytes begin; 0 where there are none."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data) if memory.nbytes else 0


class DirectFile:
    """A file of a fixed size that this process created, open for reading and writing."""

    def __init__(self, path: Path, num_bytes: int, verify: bool = False) -> None:
        """Create ``path`` with room for ``num_bytes`` bytes, rounded up to whole pages, all zero.

        Args:
            path: A file that does not exist, in a directory that does.
            num_bytes: Its size, never to change.
            verify: Keep a checksum of every page, and compare whatever is read: slower, and it finds what the
                filesystem does not tell.

        Raises:
            ConfigError: The path exists or cannot be written, or the filesystem has not that much room.
        """
        self.path = path
        self.num_bytes = round_up(num_bytes)
        self.failure: StorageError | None = None
        self._checksums = PageChecksums(self.num_bytes) if verify else None
        self._num_writes = 0  # under way
        self._process = os.getpid()
        self.fd = self._create()
        try:
            if self.num_bytes:
                os.posix_fallocate(self.fd, 0, self.num_bytes)
            self.is_direct = self._leave_page_cache()
        except OSError as error:
            self.remove()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise no_room(path.parent, self.num_bytes, free_bytes(path.parent)) from error
            raise ConfigError(
                f"{path} could not get {self.num_bytes:,} bytes for offloaded state: {error.strerror}. "
                + _ADVICE.get(error.errno or 0, "Choose another nvme_path, best on a local disk with ext4 or xfs.")
            ) from error
        self._stamp = self._read_stamp()

    def _create(self) -> int:
        try:
            free = free_bytes(self.path.parent)
            if self.num_bytes > free:
                raise no_room(self.path.parent, self.num_bytes, free)
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be created for offloaded state: {error.strerror}. nvme_path must be a directory "
                "that this user may write to, and every run needs a run id of its own."
            ) from error

    def _leave_page_cache(self) -> bool:
        """Switch O_DIRECT on if the filesystem lets us; some say no only when a page is read."""
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

    # -- blocks, in any thread

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill ``memory`` from byte ``offset`` on; StorageError with the reason where that cannot be."""
        whole = self._as_it_is(memory, offset)
        self._read(memory[:whole], offset)
        if whole < memory.nbytes:
            rest, begin = memory[whole:], offset + whole
            first, bounce = _bounce(rest, begin)
            self._read(bounce, first)
            rest[:] = bounce[begin - first : begin - first + rest.nbytes]

    def write(self, memory: memoryview, offset: int) -> None:
        """Write ``memory`` at byte ``offset``; StorageError with the reason where that cannot be."""
        whole = self._as_it_is(memory, offset)
        self._write(memory[:whole], offset)
        if whole < memory.nbytes:
            self._write_odd(memory[whole:], offset + whole)

    def _write_odd(self, memory: memoryview, offset: int) -> None:
        first, bounce = _bounce(memory, offset)
        begin, end = offset - first, offset - first + memory.nbytes
        for page in {0, bounce.nbytes - PAGE_BYTES}:
            if begin > page or end < page + PAGE_BYTES:
                self._read(bounce[page : page + PAGE_BYTES], first + page)
        bounce[begin:end] = memory
        self._write(bounce, first)

    def _as_it_is(self, memory: memoryview, offset: int) -> int:
        """How many bytes from the block's begin on may go to the system without a bounce."""
        if not self.is_direct and self._checksums is None:
            return memory.nbytes
        if offset % PAGE_BYTES or address_of(memory) % PAGE_BYTES:
            return 0
        return memory.nbytes // PAGE_BYTES * PAGE_BYTES

    def _read(self, memory: memoryview, offset: int) -> None:
        done = 0
        while done < memory.nbytes:
            try:
                count = os.preadv(self.fd, [memory[done:]], offset + done)
            except OSError as error:
                raise self._failed("read", offset + done, error) from error
            if count == 0:
                raise StorageError(
                    f"{self.path} ends at byte {offset + done} or before, but {self.num_bytes} bytes were allocated: "
                    f"another process truncated it. {_LOST}"
                )
            done += self._whole(count)
        self._forget(offset, memory.nbytes)
        if self._checksums is not None:
            position = self._checksums.first_difference(memory, offset)
            if position is not None:
                raise StorageError(
                    f"{self.path} does not hold at byte {position} what was written there: another process changed "
                    f"it, or the disk lost it. {_LOST}"
                )

    def _write(self, memory: memoryview, offset: int) -> None:
        if self._checksums is not None:
            self._checksums.note(memory, offset)
        done = 0
        while done < memory.nbytes:
            try:
                count = os.pwritev(self.fd, [memory[done:]], offset + done)
            except OSError as error:
                raise self._failed("written", offset + done, error) from error
            done += self._whole(count)
        self._forget(offset, memory.nbytes)

    def _whole(self, count: int) -> int:
        """How far a call that moved ``count`` bytes came: O_DIRECT can only go on from a whole page."""
        return count // PAGE_BYTES * PAGE_BYTES if self.is_direct else count

    def _forget(self, offset: int, num_bytes: int) -> None:
        if not self.is_direct:
            # Starts the writing of dirty pages and drops the clean ones: the cache shall not crowd out the run.
            os.posix_fadvise(self.fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def _failed(self, action: str, position: int, error: OSError) -> StorageError:
        advice = _ADVICE.get(error.errno or 0, "Look at the system's log, or choose another nvme_path.")
        return StorageError(f"{self.path} could not be {action} at byte {position}: {error.strerror}. {advice} {_LOST}")

    # -- who touches the file; callers see to it that one thread at a time is here

    def begin(self, writes: bool) -> None:
        """A transfer starts; StorageError where the file has failed or was touched by somebody else."""
        if self.failure is not None:
            raise self.failure
        if self._num_writes == 0:
            self._compare_stamp()
        self._num_writes += writes

    def end(self, writes: bool) -> None:
        """A transfer has ended."""
        self._num_writes -= writes
        if writes and self._num_writes == 0:
            self._stamp = self._read_stamp()

    def fail(self, error: StorageError) -> None:
        """A transfer has failed: the file is of no use from now on. The first failure is the one that is told."""
        self.failure = self.failure or error

    def check(self) -> None:
        """StorageError where the file has failed, or where somebody else touched it or its path."""
        if self.failure is not None:
            raise self.failure
        if self._num_writes == 0:
            self._compare_stamp()
        try:
            there = os.stat(self.path)
        except OSError as error:
            self._touched(f"cannot be found any more ({error.strerror})")
        if not os.path.samestat(there, os.fstat(self.fd)):
            self._touched("was replaced by another file")

    def _read_stamp(self) -> tuple[int, int, int]:
        """Size, number of names, time of the last change; no time without O_DIRECT: a network sets it late, by itself.

        Nothing else than a write of ours moves the time, so it needs no clock that is right.
        """
        found = os.fstat(self.fd)
        return found.st_size, found.st_nlink, found.st_mtime_ns if self.is_direct else 0

    def _compare_stamp(self) -> None:
        size, num_names, changed = self._read_stamp()
        if (size, num_names, changed) == self._stamp:
            return
        if size != self._stamp[0]:
            self._touched(f"has {size} bytes instead of {self._stamp[0]}")
        if num_names != self._stamp[1]:
            self._touched("was removed or replaced, or got a second name")
        self._touched("was written to by another process")

    def _touched(self, what: str) -> NoReturn:
        self.fail(StorageError(f"{self.path} {what}, while a run keeps its state there. {_LOST}"))
        assert self.failure is not None
        raise self.failure

    @property
    def is_ours(self) -> bool:
        """Whether this process created it; a fork of that process did not."""
        return os.getpid() == self._process

    def remove(self) -> None:
        """Close the file; remove it if it and its path are still ours. No transfer may be under way."""
        try:
            if self.is_ours and os.path.samestat(os.stat(self.path), os.fstat(self.fd)):
                self.path.unlink()
        except OSError:
            pass  # it is gone, or the next run's turn
        finally:
            os.close(self.fd)


def _bounce(memory: memoryview, offset: int) -> tuple[int, memoryview]:
    """Where the whole pages around a block begin in the file, and memory for them."""
    first = offset // PAGE_BYTES * PAGE_BYTES
    return first, Slab.allocate(round_up(offset + memory.nbytes) - first).memory
