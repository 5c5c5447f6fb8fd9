"""The fear: a disk that idles while the optimizer works, or an optimizer that works on bytes that have not come."""

from __future__ import annotations

import pytest
import torch

from shardwise.errors import StateError, StorageError
from shardwise.store.aligned import Slab, SlabPool
from shardwise.store.base import PAGE_BYTES, Store
from shardwise.store.chunk_stream import Chunk, ChunkStream
from shardwise.store.host_memory import HostMemory
from tests.slow_store import Disk, SlowStore

NUMEL = 10_240  # of one state of a chunk; 10 pages
CHUNK_BYTES = 2 * NUMEL * 4
READ_SECONDS = CHUNK_BYTES / 1e9


def filled(store: Store, num_chunks: int) -> list[Chunk]:
    """Chunks of a gradient, only read, and a value."""
    chunks = [Chunk(store.reserve(CHUNK_BYTES), write_begin=NUMEL * 4) for _ in range(num_chunks)]
    store.allocate()
    memory = Slab.allocate(CHUNK_BYTES)
    for index, chunk in enumerate(chunks):
        memory.tensor(torch.float32, 0, NUMEL).fill_(index + 1)
        memory.tensor(torch.float32, NUMEL * 4, NUMEL).copy_(torch.arange(NUMEL))
        store.write(chunk.extent, 0, memory.bytes(0, CHUNK_BYTES))
    return chunks


def step(slab: Slab) -> None:
    gradient = slab.tensor(torch.float32, 0, NUMEL)
    slab.tensor(torch.float32, NUMEL * 4, NUMEL).add_(gradient)
    gradient.zero_()  # not written back


def values(store: Store, chunks: list[Chunk]) -> list[tuple[float, torch.Tensor]]:
    memory = Slab.allocate(CHUNK_BYTES)
    found = []
    for chunk in chunks:
        store.read(chunk.extent, 0, memory.bytes(0, CHUNK_BYTES))
        both = memory.tensor(torch.float32, 0, 2 * NUMEL).clone()
        found.append((both[0].item(), both[NUMEL:]))
    return found


@pytest.mark.parametrize("num_slabs", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("num_chunks", [1, 2, 5])
def test_every_chunk_is_worked_on_once(num_chunks: int, num_slabs: int) -> None:
    store = SlowStore(Disk(write_bytes_per_second=3e8))
    chunks = filled(store, num_chunks)
    pool = SlabPool(num_slabs, CHUNK_BYTES)
    order = []

    def work(index: int, slab: Slab) -> None:
        order.append(index)
        step(slab)
        store.disk.work(READ_SECONDS / 3)

    for _ in range(2):
        ChunkStream(store, pool).run(chunks, work)
    assert order == [*range(num_chunks)] * 2
    assert pool.num_free == num_slabs
    for index, (gradient, value) in enumerate(values(store, chunks)):
        assert gradient == index + 1
        assert torch.equal(value, torch.arange(NUMEL) + 2.0 * (index + 1))


def test_work_that_takes_longer_than_the_disk_never_waits_but_at_both_ends() -> None:
    store = SlowStore()
    chunks = filled(store, 20)
    disk = store.disk
    began, disk.stall_seconds = disk.now, 0.0
    work_seconds = 1.5 * READ_SECONDS
    ChunkStream(store, SlabPool(3, CHUNK_BYTES)).run(chunks, lambda index, slab: disk.work(work_seconds))
    unavoidable = READ_SECONDS + READ_SECONDS / 2  # the first read; the last write, of half a chunk
    assert disk.stall_seconds == pytest.approx(unavoidable)
    assert disk.now - began == pytest.approx(20 * work_seconds + unavoidable)


@pytest.mark.parametrize("num_slabs", [3, 4])
@pytest.mark.parametrize("write_speed", [1e9, 2e8])
def test_disk_that_takes_longer_than_the_work_never_idles(num_slabs: int, write_speed: float) -> None:
    store = SlowStore(Disk(write_bytes_per_second=write_speed))
    chunks = filled(store, 20)
    disk = store.disk
    began = disk.now
    write_seconds = CHUNK_BYTES / 2 / write_speed
    longer = max(READ_SECONDS, write_seconds)
    work_seconds = longer / 4
    ChunkStream(store, SlabPool(num_slabs, CHUNK_BYTES)).run(chunks, lambda index, slab: disk.work(work_seconds))
    ideal = 20 * longer + min(READ_SECONDS, write_seconds) + work_seconds
    # A slab's own round is read, work, write: with few slabs the slower side waits for it now and then.
    round_trip = (READ_SECONDS + work_seconds + write_seconds) * 20 / num_slabs
    assert disk.now - began <= max(ideal, round_trip) + READ_SECONDS + write_seconds


def test_host_memory_is_worked_on_in_place() -> None:
    store = HostMemory()
    chunks = filled(store, 3)
    before = store.traffic
    pool = SlabPool(1, PAGE_BYTES)  # too small for any chunk
    ChunkStream(store, pool).run(chunks, lambda index, slab: step(slab))
    assert store.traffic == before
    assert [value[1].item() for _, value in values(store, chunks)] == [2.0, 3.0, 4.0]


def test_error_in_the_work_leaves_nothing_under_way() -> None:
    store = SlowStore()
    chunks = filled(store, 6)
    pool = SlabPool(3, CHUNK_BYTES)

    def work(index: int, slab: Slab) -> None:
        step(slab)
        if index == 3:
            raise KeyError("of the optimizer")

    with pytest.raises(KeyError, match="of the optimizer"):
        ChunkStream(store, pool).run(chunks, work)
    assert not store.disk.pending
    assert pool.num_free == 3
    stepped = [value[0].item() != 0.0 for _, value in values(store, chunks)]
    assert stepped == [True, True, True, False, False, False]


@pytest.mark.parametrize("after", range(10))
def test_error_of_the_store_comes_out_whichever_transfer_it_hits(after: int) -> None:
    store = SlowStore()
    chunks = filled(store, 5)
    pool = SlabPool(3, CHUNK_BYTES)
    store.fail_after = after
    with pytest.raises(StorageError, match="on paper"):
        ChunkStream(store, pool).run(chunks, lambda index, slab: step(slab))
    assert not store.disk.pending
    assert pool.num_free == 3


def test_chunk_larger_than_a_slab_is_refused() -> None:
    store = SlowStore()
    chunks = filled(store, 2)
    with pytest.raises(StateError, match="does not fit"):
        ChunkStream(store, SlabPool(3, PAGE_BYTES)).run(chunks, lambda index, slab: None)
