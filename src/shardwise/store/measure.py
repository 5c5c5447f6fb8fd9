"""What a disk gives: one direction alone, both at once, and the optimizer's way through it.

All of them move the same chunks of one store. ``both_ways`` is what the disk can do at best: as many bytes read as
written, and no transfer waits for another one. ``stream`` is the optimizer's pattern, with its order, and with a pause
in place of arithmetic.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardwise.errors import StorageError
from shardwise.store.aligned import Slab, SlabPool
from shardwise.store.base import Extent, Store, Transfer
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
    ring = [slabs.take() for _ in range(slabs.num_free)]
    try:
        return _keep_going(store.start_write if writes else store.start_read, chunks, ring, most_seconds)
    finally:
        for slab in ring:
            slabs.give_back(slab)


def both_ways(store: Store, chunks: Sequence[Chunk], slabs: SlabPool) -> Speed:
    """Read the chunks in order, and meanwhile write them all, half of them away and in memory of their own."""
    ring = [slabs.take() for _ in range(slabs.num_free)]
    half = len(chunks) // 2
    elsewhere = [*chunks[half:], *chunks[:half]]
    begin = time.perf_counter()
    try:
        with ThreadPoolExecutor(1) as beside:
            writing = beside.submit(_keep_going, store.start_write, elsewhere, ring[::2], math.inf)
            reads = _keep_going(store.start_read, chunks, ring[1::2], math.inf)
            writes = writing.result()
        return Speed(reads.num_bytes + writes.num_bytes, time.perf_counter() - begin)
    finally:
        for slab in ring:
            slabs.give_back(slab)


def _keep_going(
    start: Callable[[Extent, int, memoryview], Transfer],
    chunks: Sequence[Chunk],
    ring: Sequence[Slab],
    most_seconds: float,
) -> Speed:
    """Keep one transfer of each slab under way; start none after ``most_seconds``."""
    deadline = _Deadline(most_seconds)
    under_way: deque[Transfer] = deque()
    moved = 0
    try:
        for index, chunk in enumerate(chunks):
            if deadline.passed:
                break
            if len(under_way) == len(ring):
                under_way.popleft().wait()
            under_way.append(start(chunk.extent, 0, ring[index % len(ring)].bytes(0, chunk.extent.num_bytes)))
            moved += chunk.extent.num_bytes
        while under_way:
            under_way.popleft().wait()
        return Speed(moved, deadline.elapsed)
    finally:
        for transfer in under_way:
            with suppress(StorageError):
                transfer.wait()


def stream(store: Store, chunks: Sequence[Chunk], slabs: SlabPool, work_seconds: float = 0.0) -> Speed:
    """The optimizer's pattern; each chunk's work is a pause of ``work_seconds``. Counts bytes read and written."""
    begin = time.perf_counter()
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
