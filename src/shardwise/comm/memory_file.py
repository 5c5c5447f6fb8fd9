"""What ranks on one host see of each other: a memory file each, with a control row that its owner alone writes.

The *control row* is the first pages of the file: a few counters, the label of what the owner waits in, a ring of
*deposits* (which gradient buffer lies where), and two boxes for small messages. Buffers follow, each on its own pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import threading
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from shardwise.comm.base import LABEL_BYTES
from shardwise.errors import CollectiveError
from shardwise.mesh import Axis

# Words (8 bytes) of the control row.
_MAGIC, PUBLISHED, EXCHANGED, DEPOSITED, CONSUMED, GAVE_UP, CLOSED = range(7)
_MAGIC_VALUE = 0x5348415244
# Bytes of the control row behind the words: what this rank waits in, the ring of deposits, two exchange boxes.
POSITION = 64
RING = 256
ENTRY_BYTES = 16 + LABEL_BYTES
RING_START = POSITION + LABEL_BYTES
BOX_PAYLOAD = 4096
BOX_BYTES = LABEL_BYTES + 8 + BOX_PAYLOAD
BOX_START = RING_START + RING * ENTRY_BYTES
_CONTROL_BYTES = -(-(BOX_START + 2 * BOX_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


_fence_lock = threading.Lock()


def fence() -> None:
    """Order memory accesses before against those after: a lock's release and acquire do so on every processor."""
    with _fence_lock:
        pass


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable.

    Not by ``numpy()``: a tensor that was shared with numpy can never be resized again, and whole buffers are.
    """
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


class MemoryFile:
    """My memory file: the control row first, then buffers, each at an offset that tensors can be mapped back to."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("shardwise")
        self.size = 0
        self._offsets: dict[int, int] = {}
        self._pages: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # tensors keep their own alive
        self.control = self._map(_CONTROL_BYTES)
        self.words = memoryview(self.control).cast("q")

    def _map(self, num_bytes: int) -> mmap.mmap:
        offset = self.size
        self.size += -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self.fd, self.size)
        return mmap.mmap(self.fd, self.size - offset, offset=offset)

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A zeroed 1-D tensor in the file."""
        offset = self.size
        pages = self._map(max(1, numel * dtype.itemsize))
        tensor = torch.frombuffer(pages, dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)
        self._offsets[tensor.untyped_storage().data_ptr()] = offset
        self._pages[tensor.untyped_storage().data_ptr()] = pages
        return tensor

    def free(self, tensor: torch.Tensor) -> None:
        """Give the pages of a tensor from ``allocate`` back: unmapping alone would leave them in the file."""
        start = tensor.untyped_storage().data_ptr()
        del self._offsets[start]
        if tensor.numel():
            self._pages.pop(start).madvise(mmap.MADV_REMOVE)

    def offset(self, tensor: torch.Tensor) -> int:
        """Byte offset in the file of a tensor from ``allocate``, or of a view into one."""
        start = tensor.untyped_storage().data_ptr()
        return self._offsets[start] + tensor.data_ptr() - start


class Peer:
    """Another rank: its memory file, its control row, and whether its process lives."""

    def __init__(self, rank: int, pid: int, fd: int) -> None:
        self.rank = rank
        self.fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        self.control = mmap.mmap(self.fd, _CONTROL_BYTES, prot=mmap.PROT_READ)
        self.words = memoryview(self.control).cast("q")
        self._pid_fd = os.pidfd_open(pid)

    def alive(self) -> bool:
        """Whether the process still runs."""
        return not select.select([self._pid_fd], [], [], 0)[0]

    def read(self, target: memoryview, offset: int) -> None:
        """Copy ``len(target)`` bytes from ``offset`` of the peer's file."""
        done = 0
        while done < len(target):
            count = os.preadv(self.fd, [target[done:]], offset + done)
            if count == 0:
                raise CollectiveError(f"rank {self.rank} shrank its shared memory: {len(target) - done} bytes missing.")
            done += count

    def close(self) -> None:
        """Unmap and close."""
        self.words.release()
        self.control.close()
        os.close(self.fd)
        os.close(self._pid_fd)


def _host_identity() -> str:
    """Tells hosts, and containers with process numbers of their own, apart."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{socket.gethostname()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def connect(axis: Axis) -> tuple[MemoryFile, list[Peer]] | None:
    """Open every rank's memory file, or None on all ranks where one of them cannot (another host, another system).

    Collective, over ``axis.group``.
    """
    file = _open_own()
    mine = None if file is None else (_host_identity(), os.getpid(), file.fd)
    everyone: list[tuple[str, int, int] | None] = [None] * axis.size
    dist.all_gather_object(everyone, mine, group=axis.group)
    peers = _open_peers(axis.rank, everyone)
    reached: list[bool] = [False] * axis.size
    dist.all_gather_object(reached, peers is not None, group=axis.group)
    if file is None or peers is None or not all(reached):
        return None
    return file, peers


def _open_own() -> MemoryFile | None:
    if not (hasattr(os, "memfd_create") and hasattr(os, "pidfd_open") and os.path.exists("/proc/self/ns/pid")):
        return None
    try:
        file = MemoryFile()
    except OSError:
        return None
    file.words[_MAGIC] = _MAGIC_VALUE
    return file


def _open_peers(rank: int, everyone: list[tuple[str, int, int] | None]) -> list[Peer] | None:
    mine = everyone[rank]
    peers: list[Peer] = []
    for other_rank, other in enumerate(everyone):
        if mine is None or other is None or other[0] != mine[0]:
            return None
        if other_rank == rank:
            continue
        try:
            peer = Peer(other_rank, other[1], other[2])
        except OSError:
            return None
        if peer.words[_MAGIC] != _MAGIC_VALUE:
            return None
        peers.append(peer)
    return peers
