"""A minute with a disk: which settings it likes best, and what the optimizer gets of it with these."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardwise.errors import ConfigError
from shardwise.store import measure
from shardwise.store.aligned import SlabPool
from shardwise.store.chunk_stream import Chunk
from shardwise.store.direct_file import free_bytes, no_room
from shardwise.store.direct_io import DirectIO
from shardwise.store.io_settings import IOSettings
from shardwise.store.measure import Speed
from shardwise.store.run_directory import RunDirectory, new_run_id
from shardwise.store.swap_file import SwapFile

CHUNK_BYTES = 16 << 20
"""A million elements with master, gradient and Adam's two states, in fp32."""
NUM_SLABS = 4
BLOCK_SIZES = (256 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 4, 16)
SMALLEST_BYTES = 2 * NUM_SLABS * CHUNK_BYTES
ROUNDS = 2
"""Every setting is measured in each round, so that a disk's better and worse moments meet all of them."""

_FILL_SECONDS = 10.0
_ONE_WAY_SECONDS = 0.5
_STREAM_SECONDS = 4.0
_PAGE_CACHE_SECONDS = 2.0
_PAGE_CACHE_BYTES = 256 << 20
_WORK_LONGER_BY = 1.2
_AS_GOOD = 1.05

Progress = Callable[[str, float], None]
"""Told what is measured next, and which part of all is done."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one pair of settings gives, in bytes per second."""

    block_size: int
    queue_depth: int
    read: float
    write: float

    @property
    def seconds_a_byte(self) -> float:
        """To read it and to write it."""
        if min(self.read, self.write) <= 0:
            return math.inf
        return 1 / self.read + 1 / self.write


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found; speeds in bytes per second."""

    path: str
    num_bytes: int
    """Of the file that was read and written."""
    is_direct: bool
    cells: tuple[Cell, ...]
    best: Cell
    page_cache_read: float
    page_cache_write: float
    both_ways: float
    """Reads and writes at once, none waiting for another: bytes of both."""
    stream: float
    """The optimizer's pattern without arithmetic: bytes of both."""
    work_busy: float
    """Share of the time that arithmetic would be busy, were it a fifth slower than the disk."""

    @property
    def aio(self) -> dict[str, int | bool]:
        """The block for the JSON."""
        return {
            "block_size": self.best.block_size,
            "queue_depth": self.best.queue_depth,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        }


def survey(path: Path, num_bytes: int, progress: Progress) -> Survey:
    """Measure the disk under the directory ``path`` with a file of ``num_bytes`` bytes, which is gone in the end.

    Raises:
        ConfigError: The path is no directory that can be written to, or has not that much room.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory: name one on the disk to be measured.")
    if num_bytes < SMALLEST_BYTES:
        raise ConfigError(f"A file of {num_bytes:,} bytes is too small to tell: take {SMALLEST_BYTES:,} or more.")
    with (
        RunDirectory(path, new_run_id(), rank=0) as directory,
        closing(DirectIO()) as io,
        closing(SwapFile(directory.file("survey"), io)) as file,
        closing(SlabPool(NUM_SLABS, CHUNK_BYTES)) as slabs,
    ):
        need, free = num_bytes + _PAGE_CACHE_BYTES, free_bytes(path)
        if need > free:
            raise no_room(path, need, free)
        progress("making a file", 0.0)
        chunks = [Chunk(file.reserve(CHUNK_BYTES)) for _ in range(num_bytes // CHUNK_BYTES)]
        file.allocate()
        return _Bench(file, chunks, slabs, progress).run(directory)


class _Bench:
    """The file, filled, and what is done with it."""

    def __init__(self, file: SwapFile, chunks: list[Chunk], slabs: SlabPool, progress: Progress) -> None:
        self._file = file
        self._slabs = slabs
        self._progress = progress
        _make_incompressible(slabs)
        filled = measure.one_way(file, chunks, slabs, writes=True, most_seconds=_FILL_SECONDS)
        self._chunks = chunks[: filled.num_bytes // CHUNK_BYTES]  # reading what was never written needs no disk

    def run(self, directory: RunDirectory) -> Survey:
        cells = self._grid()
        best = choose(cells)
        self._progress("through the page cache", 0.7)
        page_cache_read, page_cache_write = self._through_page_cache(directory.file("page_cache"))
        chunks = self._chunks[: max(2 * NUM_SLABS, int(_STREAM_SECONDS / (CHUNK_BYTES * best.seconds_a_byte)))]
        with self._threads(best.block_size, best.queue_depth):
            self._progress("both ways at once", 0.8)
            both_ways = measure.both_ways(self._file, chunks, self._slabs)
            self._progress("the optimizer's pattern", 0.87)
            stream = measure.stream(self._file, chunks, self._slabs)
            self._progress("the optimizer's pattern beside arithmetic", 0.93)
            work_seconds = stream.seconds / len(chunks) * _WORK_LONGER_BY
            beside = measure.stream(self._file, chunks, self._slabs, work_seconds)
        return Survey(
            path=str(directory.home.parent),
            num_bytes=len(self._chunks) * CHUNK_BYTES,
            is_direct=self._file.is_direct,
            cells=cells,
            best=best,
            page_cache_read=page_cache_read.bytes_per_second,
            page_cache_write=page_cache_write.bytes_per_second,
            both_ways=both_ways.bytes_per_second,
            stream=stream.bytes_per_second,
            work_busy=work_seconds * len(chunks) / beside.seconds,
        )

    def _grid(self) -> tuple[Cell, ...]:
        pairs = list(itertools.product(BLOCK_SIZES, DEPTHS))
        found: dict[tuple[int, int, bool], list[Speed]] = {}
        for step, (_, (block_size, depth)) in enumerate(itertools.product(range(ROUNDS), pairs)):
            part = 0.1 + 0.6 * step / (ROUNDS * len(pairs))
            self._progress(f"blocks of {block_size >> 10} KiB, {depth} at once", part)
            with self._threads(block_size, depth):
                for writes in (False, True):
                    speed = measure.one_way(self._file, self._chunks, self._slabs, writes, _ONE_WAY_SECONDS)
                    found.setdefault((block_size, depth, writes), []).append(speed)
        return tuple(
            Cell(size, depth, _mean(found[size, depth, False]), _mean(found[size, depth, True]))
            for size, depth in pairs
        )

    def _through_page_cache(self, path: Path) -> tuple[Speed, Speed]:
        slab = self._slabs.take()
        try:
            size = min(_PAGE_CACHE_BYTES, len(self._chunks) * CHUNK_BYTES)
            return measure.through_page_cache(path, slab.memory, size, _PAGE_CACHE_SECONDS)
        finally:
            path.unlink(missing_ok=True)
            self._slabs.give_back(slab)

    @contextmanager
    def _threads(self, block_size: int, queue_depth: int) -> Iterator[None]:
        with closing(DirectIO(IOSettings(block_size=block_size, queue_depth=queue_depth))) as io:
            self._file.switch_to(io)
            yield


def choose(cells: tuple[Cell, ...]) -> Cell:
    """The settings under which a byte is read and written soonest; of those as good, the fewest threads and calls."""
    soonest = min(cell.seconds_a_byte for cell in cells)
    as_good = [cell for cell in cells if cell.seconds_a_byte <= _AS_GOOD * soonest]
    return min(as_good, key=lambda cell: (cell.queue_depth, -cell.block_size))


def _mean(speeds: list[Speed]) -> float:
    return sum(speed.num_bytes for speed in speeds) / sum(speed.seconds for speed in speeds)


def _make_incompressible(slabs: SlabPool) -> None:
    """Some disks and filesystems store zeros for free."""
    draw = np.random.default_rng(0)
    taken = [slabs.take() for _ in range(slabs.num_free)]
    for slab in taken:
        slab.memory[:] = draw.bytes(slab.num_bytes)
        slabs.give_back(slab)
