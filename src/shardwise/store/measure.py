"""What a disk gives: one direction alone, both at once, and the optimizer's way through it.

All of them move the same chunks of one store. ``both_ways`` is what the disk can do at best: as many bytes read as
written, and no transfer waits for another one. ``stream`` is the optimizer's pattern, with its order, and with a pause
in place of arithmetic.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.store.aligned import Slab, SlabPool
from shardwise.store.base import Store, Transfer
from shardwise.store.chunk_stream import Chunk, ChunkStream


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes moved in ``seconds``."""

    num_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """0 where nothing was moved."""
        return self.num_bytes / self.seconds if self.seconds > 0 else 0.0


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._begin = time.perf_counter()
        self._seconds = seconds

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._begin

    @property
    def passed(self) -> bool:
        return self.elapsed >= self._seconds


def one_way(store: Store, chunks: Sequence[Chunk], slabs: SlabPool, writes: bool, most_seconds: float) -> Speed:
    """Read or write whole chunks, in order, all slabs under way at once."""
    start = store.start_write if writes else store.start_read

    def transfers(ring: list[Slab]) -> Iterator[Transfer]:
        for index, chunk in enumerate(chunks):
            size = chunk.extent.num_bytes
            yield start(chunk.extent, 0, ring[index % len(ring)].bytes(0, size))

    return _keep_going([transfers], slabs, chunks, most_seconds)


def both_ways(store: Store, chunks: Sequence[Chunk], slabs: SlabPool, most_seconds: float) -> Speed:
    """Read the chunks in order and write the same number, half a file away, in memory of their own."""
    half = len(chunks) // 2

    def reads(ring: list[Slab]) -> Iterator[Transfer]:
        for index, chunk in enumerate(chunks):
            yield store.start_read(chunk.extent, 0, ring[index % len(ring)].bytes(0, chunk.extent.num_bytes))

    def writes(ring: list[Slab]) -> Iterator[Transfer]:
        for index in range(len(chunks)):
            extent = chunks[(index + half) % len(chunks)].extent
            yield store.start_write(extent, 0, ring[index % len(ring)].bytes(0, extent.num_bytes))

    return _keep_going([reads, writes], slabs, chunks, most_seconds)


def _keep_going(
    directions: Sequence[Callable[[list[Slab]], Iterator[Transfer]]],
    slabs: SlabPool,
    chunks: Sequence[Chunk],
    most_seconds: float,
) -> Speed:
    """Keep transfers of every direction under way, each direction in its own share of the slabs."""
    taken = [slabs.take() for _ in range(slabs.num_free)]
    share = len(taken) // len(directions)
    lanes = [direction(taken[at * share : (at + 1) * share]) for at, direction in enumerate(directions)]
    under_way: list[list[Transfer]] = [[] for _ in lanes]
    moved = 0
    deadline = _Deadline(most_seconds)
    try:
        while lanes:
            for lane, pending in zip(lanes, under_way, strict=True):
                while len(pending) < share and not deadline.passed and (transfer := next(lane, None)) is not None:
                    pending.append(transfer)
            if not any(under_way):
                break
            for pending in under_way:
                if pending:
                    pending.pop(0).wait()
                    moved += 1
        return Speed(moved * chunks[0].extent.num_bytes, deadline.elapsed)
    finally:
        for transfer in (transfer for pending in under_way for transfer in pending):
            transfer.wait()
        for slab in taken:
            slabs.give_back(slab)


def stream(
    store: Store, chunks: Sequence[Chunk], slabs: SlabPool, work_seconds: float = 0.0, most_chunks: int | None = None
) -> Speed:
    """The optimizer's pattern; each chunk's work is a pause of ``work_seconds``. Counts bytes read and written."""
    begin = time.perf_counter()
    chunks = chunks[:most_chunks]
    ChunkStream(store, slabs).run(chunks, lambda index, slab: time.sleep(work_seconds) if work_seconds else None)
    num_bytes = sum(2 * chunk.extent.num_bytes - chunk.write_begin for chunk in chunks)
    return Speed(num_bytes, time.perf_counter() - begin)


def through_page_cache(path: Path, memory: memoryview, num_bytes: int, most_seconds: float) -> tuple[Speed, Speed]:
    """Plain reads and writes of a new file, which stays; writes count until they are on the disk."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        deadline = _Deadline(most_seconds)
        size = 0
        while size < num_bytes and not deadline.passed:
            size += os.pwritev(descriptor, [memory], size)
        os.fdatasync(descriptor)
        writes = Speed(size, deadline.elapsed)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        deadline = _Deadline(most_seconds)
        done = 0
        while done < size and not deadline.passed:
            done += os.preadv(descriptor, [memory], done)
        return Speed(done, deadline.elapsed), writes
    finally:
        os.close(descriptor)
