"""Memory and files for direct I/O: pieces go between page-aligned memory and the disk, not by way of the page cache.

A file that is written once and read much later gains nothing from the cache, and pays for it: the kernel copies each
byte, and writes back in its own time and size.

Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path

import torch

ALIGNMENT = 4096
"""Bytes: addresses, offsets and lengths of direct I/O are multiples of it, on any disk of today."""
_NOT_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems answer that do not know direct I/O, or want other alignments."""


def aligned(nbytes: int) -> int:
    """``nbytes``, rounded up to whole pages."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Slab:
    """Page-aligned host memory.

    Args:
        nbytes: that it holds at least; rounded up to whole pages.
        pinned: locked, for copies from a GPU at full speed.
    """

    def __init__(self, nbytes: int, pinned: bool = False) -> None:
        if pinned:
            self.tensor = torch.empty(aligned(nbytes), dtype=torch.uint8, pin_memory=True)  # [bytes]
        else:
            # Private, so that neighbours may become one mapping: a process may have some 65,000 of them.
            memory = mmap.mmap(-1, max(ALIGNMENT, aligned(nbytes)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if sys.platform == "linux":
                with contextlib.suppress(OSError):  # large pages are a kindness: their first touch costs far less
                    memory.madvise(mmap.MADV_HUGEPAGE)
            self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
        self.view = memoryview((ctypes.c_char * self.tensor.nbytes).from_address(self.address)).cast("B")

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.tensor.nbytes


class NewFile:
    """A file that is written piece by piece, in any order, by several threads. A context that closes it.

    Where a file system refuses direct I/O the same calls go through the page cache.

    Args:
        path: must not exist.
        nbytes: that it will have. They are reserved on the disk now, so that a disk that is too full says so early.

    Raises:
        OSError: it exists, or the disk has no room; names the file.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path = path
        self._nbytes = nbytes
        # Not opened for direct I/O: some file systems would make the file and then refuse, and it would be there.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._is_direct = _set_direct(self._descriptor, True)
            reserve(self._descriptor, aligned(nbytes))
        except OSError as error:
            os.close(self._descriptor)
            raise self._named(error) from error
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, memory: memoryview, offset: int, nbytes: int) -> None:
        """Write the first ``nbytes`` of ``memory`` at ``offset``; for a piece that ends the file, whole pages of it.

        ``memory`` begins at a page and is as long as ``aligned(nbytes)``; offsets of pieces are multiples of
        ``ALIGNMENT`` too.

        Raises:
            OSError: the disk does not take it; names the file.
        """
        at, padded = 0, min(aligned(nbytes), len(memory)) if offset + nbytes == self._nbytes else nbytes
        try:
            while at < nbytes:
                direct = self._is_direct  # another thread may end it meanwhile
                try:
                    written = os.pwrite(self._descriptor, memory[at : padded if direct else nbytes], offset + at)
                except OSError as error:
                    if error.errno not in _NOT_DIRECT or not direct:
                        raise
                    # Refused, or a short write has left us in the middle of a page.
                    self._is_direct = _set_direct(self._descriptor, False)
                    continue
                if not written:
                    raise OSError(errno.EIO, "the disk takes nothing and gives no reason")
                at += written
        except OSError as error:
            raise self._named(error) from error

    def finish(self) -> None:
        """Give the file its length, and return when the disk has all of it.

        Raises:
            OSError: the disk failed; names the file.
        """
        try:
            os.ftruncate(self._descriptor, self._nbytes)
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._named(error) from error

    def close(self) -> None:
        """Let the file go, finished or not."""
        os.close(self._descriptor)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror or str(error), str(self._path))


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Whether I/O of this descriptor goes around the page cache from now on."""
    if sys.platform != "linux":
        return False
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        return False
    return direct


def reserve(descriptor: int, nbytes: int) -> None:
    """Give the file room for ``nbytes``, where its file system can; it has that length then.

    By the kernel's own call: libc's ``posix_fallocate`` would write into each block where the file system cannot.

    Raises:
        OSError: there is no room.
    """
    if sys.platform != "linux" or not nbytes:
        return
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(descriptor, 0, 0, nbytes):
        number = ctypes.get_errno()
        if number in _NOT_DIRECT:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
