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

import os
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import timedelta
from mmap import mmap

import torch

from shardwise.comm.base import (
    LABEL_BYTES,
    Buckets,
    CollectiveId,
    Communicator,
    Cuts,
    Pending,
    different_paths,
    label,
    text_of,
)
from shardwise.comm.memory_file import (
    BOX_BYTES,
    BOX_PAYLOAD,
    BOX_START,
    CLOSED,
    CONSUMED,
    DEPOSITED,
    ENTRY_BYTES,
    EXCHANGED,
    GAVE_UP,
    POSITION,
    PUBLISHED,
    RING,
    RING_START,
    MemoryFile,
    Peer,
    bytes_of,
    connect,
    fence,
)
from shardwise.comm.traffic import wire_of
from shardwise.errors import CollectiveError
from shardwise.mesh import Axis

CHUNK = 1 << 16
"""Elements that are read and summed at a time: 256 KiB of fp32 stay in the second-level cache."""

_SPINS = 200
_FIRST_NAP_SECONDS = 20e-6
_LONGEST_NAP_SECONDS = 1e-3
_ALIVE_CHECK_SECONDS = 0.25


class _Gather:
    """A gather that reads when it is waited for: there is nothing to win by reading earlier."""

    def __init__(self, read: Callable[[], None]) -> None:
        self._read: Callable[[], None] | None = read

    def wait(self) -> None:
        if self._read is not None:
            self._read()
            self._read = None


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


class SharedMemory(Communicator):
    """The transport of CPU ranks on one Linux host. See the module's text."""

    overlaps = False
    one_sided_gathers = True
    forgets = True

    def __init__(self, axis: Axis, buckets: Buckets, file: MemoryFile, peers: list[Peer]) -> None:
        super().__init__(axis, torch.device("cpu"))
        self._file = file
        self._words = file.words
        self._peers = peers
        self._timeout = axis.timeout
        self._chunk = max(1, min(CHUNK, buckets.reduce_numel // axis.size))
        self._reducing: deque[_Reduce] = deque()
        self._lent: dict[int, torch.Tensor] = {}  # by address
        self._last_deposit: dict[int, int] = {}  # address of a buffer -> its latest deposit
        self._num_buffers: Counter[tuple[int, torch.dtype]] = Counter()
        self._scratch: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    @classmethod
    def connect(cls, axis: Axis, buckets: Buckets) -> SharedMemory | None:
        """The transport, or None on all ranks where the memory of one cannot be reached."""
        connected = connect(axis)
        return None if connected is None else cls(axis, buckets, *connected)

    # ------------------------------------------------------------------------------------------------- buffers

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A zeroed buffer in my memory file: the same allocation of another rank lies at the same offset there."""
        return self._file.allocate(numel, dtype)

    def free(self, buffer: torch.Tensor) -> None:
        """Its pages leave my memory file."""
        self._file.free(buffer)

    def _new_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self._file.allocate(numel, dtype)

    def borrow(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer that every rank has finished reading; waits for one rather than taking a third of its size.

        Units that wait for their turn in the reduction may hold more: then there is nothing to wait for.
        """
        buffer = self._find_buffer(numel, dtype)
        self._lent[buffer.data_ptr()] = buffer
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """End a loan; the buffer is lent again when every rank has read it."""
        del self._lent[buffer.data_ptr()]
        super().give_back(buffer)

    def _find_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        free = self._free.get((numel, dtype), [])
        for position, buffer in enumerate(free):
            if self._consumed_by_all(self._last_deposit.get(buffer.data_ptr(), -1)):
                return free.pop(position)
        if not free or self._num_buffers[numel, dtype] < 2:
            self._num_buffers[numel, dtype] += 1
            return self._new_buffer(numel, dtype)
        self._wait_consumed(self._last_deposit[free[0].data_ptr()], CollectiveId("reuse of a gradient buffer", "", 0))
        return free.pop(0)

    def scratch_bytes(self) -> int:
        """Bytes of the chunks that sums and casts are made in."""
        return sum(chunk.nbytes for chunk in self._scratch.values())

    def publish(self) -> None:
        """Count up: readers that count as far may read my shards."""
        fence()
        self._words[PUBLISHED] += 1

    # --------------------------------------------------------------------------------------------- collectives

    def _all_gather(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        """Copy each owner's resting shard into its slice of ``output``."""

        def read() -> None:
            self._wait_published(identity)
            numel = shard.numel()
            offset = self._file.offset(shard)
            output[self.rank * numel : (self.rank + 1) * numel].copy_(shard)
            for peer in self._peers:
                self._read_cast(peer, output[peer.rank * numel : (peer.rank + 1) * numel], offset, shard.dtype)
            sizes = [(peer.rank, shard.nbytes) for peer in self._peers]
            self.traffic.from_ranks("all-gather", wire_of(shard.dtype), sizes)

        return _Gather(read)

    def _all_gather_in_place(self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts) -> Pending:
        """Copy each owner's slice of its own buffer into the same slice of mine."""

        def read() -> None:
            self._wait_published(identity)
            start = self._file.offset(buffer)
            for peer in self._peers:
                part = buffer[cuts[peer.rank] : cuts[peer.rank + 1]]
                if part.numel():
                    peer.read(bytes_of(part), start + cuts[peer.rank] * buffer.itemsize)
                self.traffic.from_ranks("all-gather", wire_of(buffer.dtype), [(peer.rank, part.nbytes)])

        return _Gather(read)

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        """Deposit my buffer; sum my slice over ranks as soon as all have deposited theirs."""
        index = self._words[DEPOSITED]
        if index >= RING:
            self._wait_consumed(index - RING, identity)
        entry = RING_START + index % RING * ENTRY_BYTES
        place = self._file.offset(buffer).to_bytes(8, "little") + buffer.nbytes.to_bytes(8, "little")
        self._file.control[entry : entry + ENTRY_BYTES] = place + label(identity)
        self._last_deposit[buffer.data_ptr()] = index
        reduction = _Reduce(self, index, identity, buffer, cuts, shard, accumulate)
        self._reducing.append(reduction)
        fence()
        self._words[DEPOSITED] = index + 1
        self._finish_ready_reductions()
        return reduction

    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """Boxes of the control row, two in turn: nobody can be two exchanges ahead of a rank that still reads."""
        parts = [payload[i : i + BOX_PAYLOAD] for i in range(0, len(payload), BOX_PAYLOAD)] or [b""]
        lengths = [
            int.from_bytes(box, "little") for box in self._exchange_box(identity, len(payload).to_bytes(8, "little"))
        ]
        received = [b""] * self.size
        for i in range(max(-(-length // BOX_PAYLOAD) for length in lengths)):
            for rank, box in enumerate(self._exchange_box(identity, parts[i] if i < len(parts) else b"")):
                received[rank] += box
        return received

    def _exchange_box(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        count = self._words[EXCHANGED]
        box = BOX_START + count % 2 * BOX_BYTES
        body = box + LABEL_BYTES + 8
        mine = label(identity)
        control = self._file.control
        control[box : box + LABEL_BYTES] = mine
        control[box + LABEL_BYTES : body] = len(payload).to_bytes(8, "little")
        control[body : body + len(payload)] = payload
        fence()
        self._words[EXCHANGED] = count + 1
        self._wait_for(identity, lambda peer: peer.words[EXCHANGED] > count)
        received = []
        for rank, source in self._everyone(control):
            if source[box : box + LABEL_BYTES] != mine:
                self._raise_mismatch(identity, rank, source[box : box + LABEL_BYTES])
            length = int.from_bytes(source[box + LABEL_BYTES : body], "little")
            received.append(bytes(source[body : body + length]))
        return received

    def settle(self) -> None:
        """Wait until every rank has read all that I have deposited."""
        self._finish_reductions(through=self._words[DEPOSITED] - 1)
        self._wait_consumed(self._words[DEPOSITED] - 1, CollectiveId("end of the reductions", "", 0))

    def realign(self) -> None:
        """Count as if all had deposited and read as much as the rank that got furthest; loans are over."""
        super().realign()
        self._words[GAVE_UP] += 1
        self._reducing.clear()
        for buffer in list(self._lent.values()):
            self.give_back(buffer)
        counts = self.exchange(CollectiveId("recovery", "", 0), self._words[DEPOSITED].to_bytes(8, "little"))
        furthest = max(int.from_bytes(count, "little") for count in counts)
        self._words[DEPOSITED] = self._words[CONSUMED] = furthest
        self.exchange(CollectiveId("recovery", "", 0), b"")

    def close(self) -> None:
        """Tell the others, unmap their rows and close my file; memory goes when its last tensor goes."""
        super().close()
        self._words[CLOSED] = 1
        self._reducing.clear()
        self._scratch.clear()
        for peer in self._peers:
            peer.close()
        self._peers = []
        os.close(self._file.fd)

    # ----------------------------------------------------------------------------------------------- reductions

    def _finish_ready_reductions(self) -> None:
        while self._reducing and all(peer.words[DEPOSITED] > self._reducing[0].index for peer in self._peers):
            self._finish_one()

    def _finish_reductions(self, through: int) -> None:
        while self._reducing and self._reducing[0].index <= through:
            self._wait_deposited(self._reducing[0])
            self._finish_one()

    def _wait_deposited(self, reduction: _Reduce) -> None:
        self._wait_for(reduction.identity, lambda peer: peer.words[DEPOSITED] > reduction.index)

    def _finish_one(self) -> None:
        """Sum my slice of the oldest deposit: chunk by chunk in rank order, then count it as consumed."""
        fence()
        reduction = self._reducing.popleft()
        entry = RING_START + reduction.index % RING * ENTRY_BYTES
        expected = label(reduction.identity)
        begin, end = reduction.cuts[self.rank], reduction.cuts[self.rank + 1]
        itemsize = reduction.buffer.itemsize
        starts: dict[int, int] = {}
        for peer in self._peers:
            found = peer.control[entry + 16 : entry + ENTRY_BYTES]
            if found != expected:
                self._raise_mismatch(reduction.identity, peer.rank, found)
            num_bytes = int.from_bytes(peer.control[entry + 8 : entry + 16], "little")
            if num_bytes != reduction.buffer.nbytes:
                raise CollectiveError(
                    f"in {reduction.identity} rank {peer.rank} has {num_bytes} bytes, rank {self.rank} has "
                    f"{reduction.buffer.nbytes}. Build the same model on every rank."
                )
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
                    self._peer(rank).read(bytes_of(chunk), starts[rank] + at * itemsize)
                    addends.append(chunk)
            self._mean_chunk(reduction.shard[at : at + numel], addends, reduction.accumulate)
        sizes = [(peer.rank, mine.nbytes) for peer in self._peers]
        self.traffic.from_ranks("reduce-scatter", wire_of(mine.dtype), sizes)
        fence()
        self._words[CONSUMED] = reduction.index + 1

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
            shard.add_(total.mul_(self.factor_after_sum))
        else:
            torch.mul(total, self.factor_after_sum, out=shard)

    # -------------------------------------------------------------------------------------------------- waiting

    def _wait_published(self, identity: CollectiveId) -> None:
        count = self._words[PUBLISHED]
        self._wait_for(identity, lambda peer: peer.words[PUBLISHED] >= count)

    def _consumed_by_all(self, index: int) -> bool:
        return all(peer.words[CONSUMED] > index for peer in self._peers)

    def _wait_consumed(self, index: int, identity: CollectiveId) -> None:
        """Wait for readers of my deposit ``index``; finish my own sums meanwhile, for the others wait for those."""

        def consumed(peer: Peer) -> bool:
            if peer.words[CONSUMED] > index:
                return True
            self._finish_ready_reductions()
            return False

        self._wait_for(identity, consumed)

    def _wait_for(self, identity: CollectiveId, arrived: Callable[[Peer], bool]) -> None:
        """Return when ``arrived`` holds for every peer; first yielding, then napping, watching that all live."""
        for peer in self._peers:
            for _ in range(_SPINS):
                if arrived(peer):
                    break
                os.sched_yield()
            else:
                self._wait_long(identity, peer, arrived)
        fence()

    def _wait_long(self, identity: CollectiveId, peer: Peer, arrived: Callable[[Peer], bool]) -> None:
        self._file.control[POSITION : POSITION + LABEL_BYTES] = label(identity)
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
        self._file.control[POSITION : POSITION + LABEL_BYTES] = bytes(LABEL_BYTES)

    def _raise_if_gone(self, identity: CollectiveId, peer: Peer, arrived: Callable[[Peer], bool]) -> None:
        if not peer.alive():
            gone = "has ended"
        elif peer.words[CLOSED]:
            gone = "has closed its engine"
        elif peer.words[GAVE_UP] > self._words[GAVE_UP]:
            gone = "gave up its pass after an exception"
        else:
            return
        if not arrived(peer):
            raise CollectiveError(
                f"rank {peer.rank} {gone}, but rank {self.rank} waits for it in {identity}. "
                "Give every rank the same number of batches and let all of them take part in every step."
            )

    def _raise_timeout(self, identity: CollectiveId, arrived: Callable[[Peer], bool]) -> None:
        absent = [peer for peer in self._peers if not arrived(peer)]
        where = "; ".join(
            f"rank {peer.rank} " + (f"waits in {text}" if (text := self._position(peer)) else "is in no collective")
            for peer in absent
        )
        raise CollectiveError(
            f"rank {self.rank} waited {_seconds(self._timeout)} in {identity}, but {where}. "
            "Look for a rank that ran out of data, took another path or is stuck outside of training."
        )

    def _raise_mismatch(self, identity: CollectiveId, rank: int, found: bytes) -> None:
        raise different_paths(self.rank, str(identity), rank, text_of(found))

    def _position(self, peer: Peer) -> str:
        return text_of(peer.control[POSITION : POSITION + LABEL_BYTES])

    # -------------------------------------------------------------------------------------------------- helpers

    def _peer(self, rank: int) -> Peer:
        return self._peers[rank - (rank > self.rank)]

    def _everyone(self, mine: mmap) -> list[tuple[int, mmap]]:
        rows = [(peer.rank, peer.control) for peer in self._peers]
        rows.insert(self.rank, (self.rank, mine))
        return rows

    def _scratch_chunk(self, dtype: torch.dtype, number: int) -> torch.Tensor:
        chunk = self._scratch.get((dtype, number))
        if chunk is None:
            chunk = self._scratch[dtype, number] = torch.empty(CHUNK, dtype=dtype)
        return chunk

    def _read_cast(self, peer: Peer, target: torch.Tensor, offset: int, dtype: torch.dtype) -> None:
        """Read ``target.numel()`` elements of ``dtype``; a cast goes through a chunk that stays in cache."""
        if target.dtype == dtype:
            peer.read(bytes_of(target), offset)
            return
        for at in range(0, target.numel(), CHUNK):
            chunk = self._scratch_chunk(dtype, peer.rank)[: min(CHUNK, target.numel() - at)]
            peer.read(bytes_of(chunk), offset + at * dtype.itemsize)
            target[at : at + chunk.numel()].copy_(chunk)


def _seconds(duration: timedelta) -> str:
    return f"{duration.total_seconds():g} s"
