"""Ranks on one host without a GPU: each rank reads what it needs out of the others' memory.

Every rank owns one anonymous memory file (``memfd``). Its first pages are a *control row* that only the owner writes
and all others map; behind it lie the buffers that collectives read from. Nobody pushes: a gather copies the owners'
shards, a reduction reads my slice of everybody's gradients, chunk by chunk, while the sum is in cache. One copy by the
kernel replaces a trip through the network stack, and no thread works beside the two that compute.

What keeps readers and writers apart:

- *resting shards*: the owner writes them only between ``exchange`` (every rank has finished its backward pass, so
  nobody reads any more) and ``publish`` (a counter that readers wait for). A gather is therefore one-sided: ranks that
  take different branches each read what they need, and are right.
- *gradient buffers*: the owner *deposits* a buffer (identity and offset into a ring, then a counter); readers check the
  identity against their own, read, and count what they *consumed*; a buffer is lent again when all have consumed it.

Peers' pages are read with ``pread`` and not mapped: a mapped page would count as this rank's resident memory too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from shardwise.comm.base import Buckets, CollectiveId, Communicator, Cuts, Pending, different_paths
from shardwise.errors import CollectiveError
from shardwise.mesh import Axis

CHUNK = 1 << 16
"""Elements that are read and summed at a time: 256 KiB of fp32 stay in the second-level cache."""

# Words (8 bytes) of the control row.
_MAGIC, _PUBLISHED, _EXCHANGED, _DEPOSITED, _CONSUMED, _CLOSED = range(6)
_MAGIC_VALUE = 0x5348415244
# Bytes of the control row behind the words: what this rank waits in, the ring of deposits, two exchange boxes.
_LABEL_BYTES = 184
_POSITION = 64
_RING = 256
_ENTRY_BYTES = 8 + _LABEL_BYTES
_RING_START = _POSITION + _LABEL_BYTES
_BOX_PAYLOAD = 4096
_BOX_BYTES = _LABEL_BYTES + 8 + _BOX_PAYLOAD
_BOX_START = _RING_START + _RING * _ENTRY_BYTES
_CONTROL_BYTES = -(-(_BOX_START + 2 * _BOX_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE

_SPINS = 200
_FIRST_NAP_SECONDS = 20e-6
_LONGEST_NAP_SECONDS = 1e-3
_ALIVE_CHECK_SECONDS = 0.25

_fence_lock = threading.Lock()


def _fence() -> None:
    """Order memory accesses before against those after: a lock's release and acquire do so on every processor."""
    with _fence_lock:
        pass


def _label(identity: CollectiveId) -> bytes:
    text = str(identity).encode()
    if len(text) > _LABEL_BYTES:
        # Both ends of a long unit name tell more than its middle.
        text = text[: _LABEL_BYTES // 2] + text[-_LABEL_BYTES // 2 :]
    return text.ljust(_LABEL_BYTES, b"\0")


def _text(label: bytes) -> str:
    return label.rstrip(b"\0").decode(errors="replace")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable.

    Not by ``numpy()``: a tensor that was shared with numpy can never be resized again, and whole buffers are.
    """
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


class _Segment:
    """My memory file: the control row first, then buffers, each at an offset that tensors can be mapped back to."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("shardwise")
        self.size = 0
        self._offsets: dict[int, int] = {}
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
        return tensor

    def offset(self, tensor: torch.Tensor) -> int:
        """Byte offset in the file of a tensor from ``allocate``, or of a view into one."""
        start = tensor.untyped_storage().data_ptr()
        return self._offsets[start] + tensor.data_ptr() - start


class _Peer:
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


class _Gather:
    """A gather that reads when it is waited for: there is nothing to win by reading earlier."""

    def __init__(self, read: Callable[[], None]) -> None:
        self._read: Callable[[], None] | None = read

    def wait(self) -> None:
        if self._read is not None:
            self._read()
            self._read = None

    def poll(self) -> None:
        pass


class _Reduce:
    """One deposit and the sum that it waits for."""

    def __init__(
        self,
        comm: SharedMemory,
        index: int,
        identity: CollectiveId,
        buffer: torch.Tensor,
        cuts: Cuts,
        shard: torch.Tensor,
        accumulate: bool,
    ) -> None:
        self._comm = comm
        self.index = index
        self.identity = identity
        self.buffer = buffer
        self.cuts = cuts
        self.shard = shard
        self.accumulate = accumulate

    def wait(self) -> None:
        self._comm._finish_reductions(through=self.index)

    def poll(self) -> None:
        self._comm._finish_ready_reductions()


class SharedMemory(Communicator):
    """The transport of CPU ranks on one Linux host. See the module's text."""

    overlaps = False
    one_sided_gathers = True

    def __init__(self, axis: Axis, buckets: Buckets, segment: _Segment, peers: list[_Peer]) -> None:
        super().__init__(axis, torch.device("cpu"))
        self._segment = segment
        self._words = segment.words
        self._peers = peers
        self._timeout = axis.timeout
        self._chunk = max(1, min(CHUNK, buckets.reduce_numel // axis.size))
        self._reducing: deque[_Reduce] = deque()
        self._last_deposit: dict[int, int] = {}  # address of a buffer -> its latest deposit
        self._num_buffers: Counter[tuple[int, torch.dtype]] = Counter()
        self._scratch: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    @classmethod
    def connect(cls, axis: Axis, buckets: Buckets) -> SharedMemory | None:
        """Open every rank's memory, or None on all ranks where one cannot (another host, another system)."""
        segment = _open_segment()
        mine = None if segment is None else (_host_identity(), os.getpid(), segment.fd)
        everyone: list[tuple[str, int, int] | None] = [None] * axis.size
        dist.all_gather_object(everyone, mine, group=axis.group)
        peers = _open_peers(axis, everyone)
        reached: list[bool] = [False] * axis.size
        dist.all_gather_object(reached, peers is not None, group=axis.group)
        if segment is None or peers is None or not all(reached):
            return None
        return cls(axis, buckets, segment, peers)

    # ------------------------------------------------------------------------------------------------- buffers

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A zeroed buffer in my memory file: the same allocation of another rank lies at the same offset there."""
        return self._segment.allocate(numel, dtype)

    def _new_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self._segment.allocate(numel, dtype)

    def borrow(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer that every rank has finished reading; waits for one rather than taking a third of its size.

        Units that wait for their turn in the reduction may hold more: then there is nothing to wait for.
        """
        free = self._free.get((numel, dtype), [])
        for position, buffer in enumerate(free):
            if self._consumed_by_all(self._last_deposit.get(buffer.data_ptr(), -1)):
                return free.pop(position)
        if not free or self._num_buffers[numel, dtype] < 2:
            self._num_buffers[numel, dtype] += 1
            return self._new_buffer(numel, dtype)
        self._wait_consumed(self._last_deposit[free[0].data_ptr()], CollectiveId("reuse of a gradient buffer", "", 0))
        return free.pop(0)

    def publish(self) -> None:
        """Count up: readers that count as far may read my shards."""
        _fence()
        self._words[_PUBLISHED] += 1

    # --------------------------------------------------------------------------------------------- collectives

    def _all_gather(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        """Copy each owner's resting shard into its slice of ``output``."""

        def read() -> None:
            self._wait_published(identity)
            numel = shard.numel()
            offset = self._segment.offset(shard)
            output[self.rank * numel : (self.rank + 1) * numel].copy_(shard)
            for peer in self._peers:
                self._read_cast(peer, output[peer.rank * numel : (peer.rank + 1) * numel], offset, shard.dtype)
            self.traffic.count("all-gather", shard.nbytes * len(self._peers))

        return _Gather(read)

    def _all_gather_in_place(self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts) -> Pending:
        """Copy each owner's slice of its own buffer into the same slice of mine."""

        def read() -> None:
            self._wait_published(identity)
            start = self._segment.offset(buffer)
            for peer in self._peers:
                part = buffer[cuts[peer.rank] : cuts[peer.rank + 1]]
                if part.numel():
                    peer.read(_bytes_of(part), start + cuts[peer.rank] * buffer.itemsize)
                self.traffic.count("all-gather", part.nbytes)

        return _Gather(read)

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        """Deposit my buffer; sum my slice over ranks as soon as all have deposited theirs."""
        index = self._words[_DEPOSITED]
        if index >= _RING:
            self._wait_consumed(index - _RING, identity)
        entry = _RING_START + index % _RING * _ENTRY_BYTES
        self._segment.control[entry : entry + 8] = self._segment.offset(buffer).to_bytes(8, "little")
        self._segment.control[entry + 8 : entry + _ENTRY_BYTES] = _label(identity)
        self._last_deposit[buffer.data_ptr()] = index
        reduction = _Reduce(self, index, identity, buffer, cuts, shard, accumulate)
        self._reducing.append(reduction)
        _fence()
        self._words[_DEPOSITED] = index + 1
        self._finish_ready_reductions()
        return reduction

    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """Boxes of the control row, two in turn: nobody can be two exchanges ahead of a rank that still reads."""
        parts = [payload[i : i + _BOX_PAYLOAD] for i in range(0, len(payload), _BOX_PAYLOAD)] or [b""]
        lengths = [
            int.from_bytes(box, "little") for box in self._exchange_box(identity, len(payload).to_bytes(8, "little"))
        ]
        received = [b""] * self.size
        for i in range(max(-(-length // _BOX_PAYLOAD) for length in lengths)):
            for rank, box in enumerate(self._exchange_box(identity, parts[i] if i < len(parts) else b"")):
                received[rank] += box
        return received

    def _exchange_box(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        count = self._words[_EXCHANGED]
        box = _BOX_START + count % 2 * _BOX_BYTES
        body = box + _LABEL_BYTES + 8
        label = _label(identity)
        control = self._segment.control
        control[box : box + _LABEL_BYTES] = label
        control[box + _LABEL_BYTES : body] = len(payload).to_bytes(8, "little")
        control[body : body + len(payload)] = payload
        _fence()
        self._words[_EXCHANGED] = count + 1
        self._wait_for(identity, lambda peer: peer.words[_EXCHANGED] > count)
        received = []
        for rank, source in self._everyone(control):
            if source[box : box + _LABEL_BYTES] != label:
                self._raise_mismatch(identity, rank, source[box : box + _LABEL_BYTES])
            length = int.from_bytes(source[box + _LABEL_BYTES : body], "little")
            received.append(bytes(source[body : body + length]))
        return received

    def settle(self) -> None:
        """Wait until every rank has read all that I have deposited."""
        self._finish_reductions(through=self._words[_DEPOSITED] - 1)
        self._wait_consumed(self._words[_DEPOSITED] - 1, CollectiveId("end of the reductions", "", 0))

    def realign(self) -> None:
        """Count as if all had deposited and read as much as the rank that got furthest."""
        self._reducing.clear()
        counts = self.exchange(CollectiveId("recovery", "", 0), self._words[_DEPOSITED].to_bytes(8, "little"))
        furthest = max(int.from_bytes(count, "little") for count in counts)
        self._words[_DEPOSITED] = self._words[_CONSUMED] = furthest
        self.exchange(CollectiveId("recovery", "", 0), b"")

    def close(self) -> None:
        """Tell the others, unmap their rows and close my file; memory goes when its last tensor goes."""
        super().close()
        self._words[_CLOSED] = 1
        self._reducing.clear()
        self._scratch.clear()
        for peer in self._peers:
            peer.close()
        self._peers = []
        os.close(self._segment.fd)

    # ----------------------------------------------------------------------------------------------- reductions

    def _finish_ready_reductions(self) -> None:
        while self._reducing and all(peer.words[_DEPOSITED] > self._reducing[0].index for peer in self._peers):
            self._finish_one()

    def _finish_reductions(self, through: int) -> None:
        while self._reducing and self._reducing[0].index <= through:
            self._wait_deposited(self._reducing[0])
            self._finish_one()

    def _wait_deposited(self, reduction: _Reduce) -> None:
        self._wait_for(reduction.identity, lambda peer: peer.words[_DEPOSITED] > reduction.index)

    def _finish_one(self) -> None:
        """Sum my slice of the oldest deposit: chunk by chunk in rank order, then count it as consumed."""
        _fence()
        reduction = self._reducing.popleft()
        entry = _RING_START + reduction.index % _RING * _ENTRY_BYTES
        label = _label(reduction.identity)
        begin, end = reduction.cuts[self.rank], reduction.cuts[self.rank + 1]
        itemsize = reduction.buffer.itemsize
        starts: dict[int, int] = {}
        for peer in self._peers:
            found = peer.control[entry + 8 : entry + _ENTRY_BYTES]
            if found != label:
                self._raise_mismatch(reduction.identity, peer.rank, found)
            starts[peer.rank] = int.from_bytes(peer.control[entry : entry + 8], "little") + begin * itemsize
        mine = reduction.buffer[begin:end]
        for at in range(0, end - begin, self._chunk):
            numel = min(self._chunk, end - begin - at)
            addends = []
            for rank in range(self.size):
                if rank == self.rank:
                    addends.append(mine[at : at + numel])
                else:
                    chunk = self._scratch_chunk(reduction.buffer.dtype, rank)[:numel]
                    self._peer(rank).read(_bytes_of(chunk), starts[rank] + at * itemsize)
                    addends.append(chunk)
            self._mean_chunk(reduction.shard[at : at + numel], addends, reduction.accumulate)
        self.traffic.count("reduce-scatter", (end - begin) * itemsize * len(self._peers))
        _fence()
        self._words[_CONSUMED] = reduction.index + 1

    def _mean_chunk(self, shard: torch.Tensor, addends: list[torch.Tensor], accumulate: bool) -> None:
        """The sum of ``mean_into``, kept in a chunk of scratch so that it leaves the cache once."""
        total = self._scratch_chunk(shard.dtype, self.size)[: shard.numel()]
        if addends[0].dtype == total.dtype:
            torch.add(addends[0], addends[1], out=total)
        else:
            total.copy_(addends[0])
            total.add_(addends[1])
        for addend in addends[2:]:
            total.add_(addend)
        if accumulate:
            shard.add_(total.mul_(1.0 / self.size))
        else:
            torch.mul(total, 1.0 / self.size, out=shard)

    # -------------------------------------------------------------------------------------------------- waiting

    def _wait_published(self, identity: CollectiveId) -> None:
        count = self._words[_PUBLISHED]
        self._wait_for(identity, lambda peer: peer.words[_PUBLISHED] >= count)

    def _consumed_by_all(self, index: int) -> bool:
        return all(peer.words[_CONSUMED] > index for peer in self._peers)

    def _wait_consumed(self, index: int, identity: CollectiveId) -> None:
        """Wait for readers of my deposit ``index``; finish my own sums meanwhile, for the others wait for those."""

        def consumed(peer: _Peer) -> bool:
            if peer.words[_CONSUMED] > index:
                return True
            self._finish_ready_reductions()
            return False

        self._wait_for(identity, consumed)

    def _wait_for(self, identity: CollectiveId, arrived: Callable[[_Peer], bool]) -> None:
        """Return when ``arrived`` holds for every peer; first yielding, then napping, watching that all live."""
        for peer in self._peers:
            for _ in range(_SPINS):
                if arrived(peer):
                    break
                os.sched_yield()
            else:
                self._wait_long(identity, peer, arrived)
        _fence()

    def _wait_long(self, identity: CollectiveId, peer: _Peer, arrived: Callable[[_Peer], bool]) -> None:
        self._segment.control[_POSITION : _POSITION + _LABEL_BYTES] = _label(identity)
        start = time.monotonic()
        next_check = start + _ALIVE_CHECK_SECONDS
        nap = _FIRST_NAP_SECONDS
        while not arrived(peer):
            time.sleep(nap)
            nap = min(nap * 1.5, _LONGEST_NAP_SECONDS)
            now = time.monotonic()
            if now >= next_check:
                next_check = now + _ALIVE_CHECK_SECONDS
                self._raise_if_gone(identity, peer, arrived)
                if now - start > self._timeout.total_seconds():
                    self._raise_timeout(identity, arrived)
        self._segment.control[_POSITION : _POSITION + _LABEL_BYTES] = bytes(_LABEL_BYTES)

    def _raise_if_gone(self, identity: CollectiveId, peer: _Peer, arrived: Callable[[_Peer], bool]) -> None:
        gone = "has ended" if not peer.alive() else "has closed its engine" if peer.words[_CLOSED] else None
        if gone and not arrived(peer):
            raise CollectiveError(
                f"rank {peer.rank} {gone}, but rank {self.rank} waits for it in {identity}. "
                "Give every rank the same number of batches and let all of them take part in every step."
            )

    def _raise_timeout(self, identity: CollectiveId, arrived: Callable[[_Peer], bool]) -> None:
        absent = [peer for peer in self._peers if not arrived(peer)]
        where = "; ".join(
            f"rank {peer.rank} " + (f"waits in {text}" if (text := self._position(peer)) else "is in no collective")
            for peer in absent
        )
        raise CollectiveError(
            f"rank {self.rank} waited {_seconds(self._timeout)} in {identity}, but {where}. "
            "Look for a rank that ran out of data, took another path or is stuck outside of training."
        )

    def _raise_mismatch(self, identity: CollectiveId, rank: int, label: bytes) -> None:
        raise different_paths(self.rank, str(identity), rank, _text(label))

    def _position(self, peer: _Peer) -> str:
        return _text(peer.control[_POSITION : _POSITION + _LABEL_BYTES])

    # -------------------------------------------------------------------------------------------------- helpers

    def _peer(self, rank: int) -> _Peer:
        return self._peers[rank - (rank > self.rank)]

    def _everyone(self, mine: mmap.mmap) -> list[tuple[int, mmap.mmap]]:
        rows = [(peer.rank, peer.control) for peer in self._peers]
        rows.insert(self.rank, (self.rank, mine))
        return rows

    def _scratch_chunk(self, dtype: torch.dtype, number: int) -> torch.Tensor:
        chunk = self._scratch.get((dtype, number))
        if chunk is None:
            chunk = self._scratch[dtype, number] = torch.empty(CHUNK, dtype=dtype)
        return chunk

    def _read_cast(self, peer: _Peer, target: torch.Tensor, offset: int, dtype: torch.dtype) -> None:
        """Read ``target.numel()`` elements of ``dtype``; a cast goes through a chunk that stays in cache."""
        if target.dtype == dtype:
            peer.read(_bytes_of(target), offset)
            return
        for at in range(0, target.numel(), CHUNK):
            chunk = self._scratch_chunk(dtype, peer.rank)[: min(CHUNK, target.numel() - at)]
            peer.read(_bytes_of(chunk), offset + at * dtype.itemsize)
            target[at : at + chunk.numel()].copy_(chunk)


def _seconds(duration: timedelta) -> str:
    return f"{duration.total_seconds():g} s"


def _host_identity() -> str:
    """Tells hosts, and containers with process numbers of their own, apart."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{socket.gethostname()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def _open_segment() -> _Segment | None:
    if not (hasattr(os, "memfd_create") and hasattr(os, "pidfd_open") and os.path.exists("/proc/self/ns/pid")):
        return None
    try:
        segment = _Segment()
    except OSError:
        return None
    segment.words[_MAGIC] = _MAGIC_VALUE
    return segment


def _open_peers(axis: Axis, everyone: list[tuple[str, int, int] | None]) -> list[_Peer] | None:
    mine = everyone[axis.rank]
    peers: list[_Peer] = []
    for rank, other in enumerate(everyone):
        if mine is None or other is None or other[0] != mine[0]:
            return None
        if rank == axis.rank:
            continue
        try:
            peer = _Peer(rank, other[1], other[2])
        except OSError:
            return None
        if peer.words[_MAGIC] != _MAGIC_VALUE:
            return None
        peers.append(peer)
    return peers
