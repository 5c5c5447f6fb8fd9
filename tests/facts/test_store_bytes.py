"""The fear: a bit that comes back from the disk other than it went there, or in another order."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from shardwise.config.tools import AioConfig
from shardwise.errors import ConfigError, StateError
from shardwise.store.aligned import Slab, SlabPool
from shardwise.store.base import PAGE_BYTES, Store, round_up
from shardwise.store.direct_io import DirectIO
from shardwise.store.host_memory import HostMemory
from shardwise.store.io_settings import MOST_IN_FLIGHT, IOSettings
from shardwise.store.swap_file import SwapFile
from tests.stores import io_threads, pattern, swap_file

SMALL_BLOCKS = IOSettings(block_size=3 * PAGE_BYTES, queue_depth=3)
ODD_SIZES = [0, 1, 511, 512, 4095, 4096, 4097, 12_287, 12_288, 12_289, 100_003, 1_048_577]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("settings", [SMALL_BLOCKS, IOSettings()], ids=["small blocks", "default"])
def test_extents_of_odd_sizes_come_back(tmp_path: Path, settings: IOSettings, verify: bool) -> None:
    with swap_file(tmp_path / "f", ODD_SIZES, settings, verify) as (file, extents):
        assert file.is_direct, "the temporary directory is on a disk that refuses O_DIRECT"
        kept = [pattern(size, size) for size in ODD_SIZES]
        writes = [file.start_write(extent, 0, slab.memory) for extent, slab in zip(extents, kept, strict=True)]
        for write in writes:
            write.wait()
            assert write.done
        for extent, slab in zip(extents, kept, strict=True):
            found = Slab.allocate(slab.num_bytes)
            file.read(extent, 0, found.memory)
            assert found.memory == slab.memory
        file.check()
        assert os.path.getsize(file.path) == file.num_bytes == sum(map(round_up, ODD_SIZES))


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("verify", [False, True])
def test_random_parts_are_as_in_memory(
    tmp_path: Path, verify: bool, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many transfers under way, at odd places, of odd sizes, from odd memory: the reference is a bytearray."""
    if not is_direct:
        refuse_direct(monkeypatch)
    draw = random.Random(7)
    size = 200_000
    kept = bytearray(size)
    memory = pattern(size)
    with swap_file(tmp_path / "f", [PAGE_BYTES, size, 5], SMALL_BLOCKS, verify) as (file, (before, extent, after)):
        assert file.is_direct is is_direct
        reads = []
        for _ in range(400):
            begin = draw.randrange(size)
            length = min(draw.choice([1, 100, 4096, 5000, 20_000, 70_000]), size - begin)
            if draw.random() < 0.5:
                begin = begin // PAGE_BYTES * PAGE_BYTES
            if draw.random() < 0.5:
                source = memory.bytes(draw.randrange(size - length + 1), length)
                file.start_write(extent, begin, source)
                kept[begin : begin + length] = source
            else:
                target = bytearray(length)
                transfer = file.start_read(extent, begin, memoryview(target))
                reads.append((transfer, target, bytes(kept[begin : begin + length])))
        for transfer, target, expected in reads:
            transfer.wait()
            assert target == expected
        for neighbour in (before, after):
            found = bytearray(b"x" * neighbour.num_bytes)
            file.read(neighbour, 0, memoryview(found))
            assert found == bytes(neighbour.num_bytes)


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some filesystems do, and older kernels for tmpfs."""
    import fcntl

    call = fcntl.fcntl

    def refusing(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return call(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)


def test_page_cache_is_used_where_o_direct_is_refused_and_one_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_direct(monkeypatch)
    io = DirectIO()
    files = [SwapFile(tmp_path / name, io) for name in ("a", "b")]
    try:
        for file in files:
            extent = file.reserve(10_000)
            file.allocate()
            assert not file.is_direct
            kept = pattern(10_000)
            file.write(extent, 0, kept.memory)
            found = Slab.allocate(10_000)
            file.read(extent, 0, found.memory)
            assert found.memory == kept.memory
            file.check()
    finally:
        for file in files:
            file.close()
        io.close()
    (record,) = caplog.records
    assert "refuses O_DIRECT" in record.message and str(tmp_path) in record.message


@pytest.mark.parametrize("place", ["/dev/shm"])
def test_memory_filesystem_works_either_way(place: str) -> None:
    path = Path(place) / f"shardwise-test-{os.getpid()}"
    kept = pattern(300_001)
    with swap_file(path, [300_001], SMALL_BLOCKS) as (file, (extent,)):
        file.write(extent, 0, kept.memory)
        found = Slab.allocate(300_001)
        file.read(extent, 0, found.memory)
        assert found.memory == kept.memory
    assert not path.exists()


@pytest.mark.parametrize("settings", [
    IOSettings(block_size=1),
    IOSettings(block_size=5000, queue_depth=1),
    IOSettings(block_size=8192, queue_depth=2, num_threads=3),
    IOSettings(block_size=4096, single_submit=True),
    IOSettings(block_size=4096, queue_depth=2, overlap_events=False),
])  # fmt: skip
def test_settings_change_no_bit(tmp_path: Path, settings: IOSettings) -> None:
    kept = pattern(150_001)
    with swap_file(tmp_path / "f", [150_001], settings) as (file, (extent,)):
        file.start_write(extent, 0, kept.memory)
        found = Slab.allocate(150_001)
        file.read(extent, 0, found.memory)
        assert found.memory == kept.memory
        assert len(io_threads()) <= 2 * settings.num_in_flight


def test_single_submit_and_overlap_events_bound_what_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the system call: how many blocks of one transfer are under way at the most."""
    import threading

    call = os.preadv
    lock, under_way, most = threading.Lock(), 0, 0

    def counted(*arguments: object) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        pause.wait(0.002)
        try:
            return call(*arguments)  # type: ignore[arg-type]
        finally:
            with lock:
                under_way -= 1

    pause = threading.Event()
    monkeypatch.setattr(os, "preadv", counted)
    found = {}
    for name, settings in {
        "single": IOSettings(4096, 4, single_submit=True),
        "waves": IOSettings(4096, 4, overlap_events=False),
        "free": IOSettings(4096, 4),
    }.items():
        with swap_file(tmp_path / name, [40 * 4096], settings) as (file, (extent,)):
            most = 0
            file.read(extent, 0, Slab.allocate(40 * 4096).memory)
            found[name] = most
    assert found["single"] == 1
    assert 1 < found["waves"] <= 4 and 1 < found["free"] <= 4


def test_settings_come_from_the_json() -> None:
    settings = IOSettings.of(AioConfig(block_size=131_073, queue_depth=16, thread_count=2))
    assert (settings.block_bytes, settings.num_in_flight, settings.num_at_once) == (131_072 + PAGE_BYTES, 32, 0)
    assert IOSettings.of(AioConfig(intra_op_parallelism=3, queue_depth=2)).num_in_flight == 6
    assert IOSettings.of(AioConfig(intra_op_parallelism=100, queue_depth=100)).num_in_flight == MOST_IN_FLIGHT
    assert IOSettings.of(AioConfig(single_submit=True)).num_at_once == 1
    assert IOSettings.of(AioConfig(overlap_events=False)).num_at_once == 8


def test_only_what_is_odd_takes_a_detour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer from a slab whose length is odd copies its last page alone."""
    import shardwise.store.direct_file as module

    detours = []
    bounce = module._bounce

    def counted(memory: memoryview, offset: int) -> tuple[int, memoryview]:
        detours.append(memory.nbytes)
        return bounce(memory, offset)

    monkeypatch.setattr(module, "_bounce", counted)
    size = 5 * PAGE_BYTES + 100
    with swap_file(tmp_path / "f", [size]) as (file, (extent,)):
        file.write(extent, 0, pattern(size).memory)
        file.read(extent, 0, Slab.allocate(size).memory)
        file.read(extent, PAGE_BYTES, Slab.allocate(size).bytes(0, 2 * PAGE_BYTES))
    assert detours == [100, 100]


# -- order


def test_transfers_on_the_same_bytes_happen_in_the_order_of_their_start(tmp_path: Path) -> None:
    size = 50 * PAGE_BYTES
    slab, found = Slab.allocate(size), Slab.allocate(size)
    numbers = slab.tensor(torch.int32, 0, size // 4)
    with swap_file(tmp_path / "f", [size], IOSettings(PAGE_BYTES, 4)) as (file, (extent,)):
        sources = [pattern(size, seed) for seed in range(6)]
        reads = []
        for source in sources:
            file.start_write(extent, 0, source.memory)
            target = bytearray(size)
            reads.append((file.start_read(extent, 0, memoryview(target)), target))
        for (transfer, target), source in zip(reads, sources, strict=True):
            transfer.wait()
            assert target == source.memory
        # The slab's next read is behind the write from it.
        numbers.fill_(3)
        file.start_write(extent, 0, slab.memory)
        for half in (0, size // 2):
            file.start_read(extent, half, slab.bytes(0, size // 2)).wait()
        file.read(extent, 0, found.memory)
        assert torch.equal(found.tensor(torch.int32, 0, size // 4), numbers)


def test_order_in_memory_holds_across_files(tmp_path: Path) -> None:
    size = 64 * PAGE_BYTES
    io = DirectIO(IOSettings(PAGE_BYTES, 2))
    files = [SwapFile(tmp_path / name, io) for name in ("a", "b")]
    extents = [file.reserve(size) for file in files]
    try:
        for file in files:
            file.allocate()
        first, second = pattern(size, 1), pattern(size, 2)
        slab = Slab.allocate(size)
        files[1].write(extents[1], 0, second.memory)
        for _ in range(5):
            slab.memory[:] = first.memory
            files[0].start_write(extents[0], 0, slab.memory)
            files[1].start_read(extents[1], 0, slab.memory).wait()
            assert slab.memory == second.memory
            files[0].read(extents[0], 0, slab.memory)
            assert slab.memory == first.memory
    finally:
        for file in files:
            file.close()
        io.close()


# -- memory


def test_slab_shares_its_memory_with_tensors(tmp_path: Path) -> None:
    slab = Slab.allocate(10 * PAGE_BYTES)
    assert np.frombuffer(slab.memory, np.uint8).ctypes.data % PAGE_BYTES == 0
    halves = slab.tensor(torch.bfloat16, 6, 100)
    halves.fill_(2)
    assert slab.bytes(6, 200) == torch.full((100,), 2, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with swap_file(tmp_path / "f", [10 * PAGE_BYTES]) as (file, (extent,)):
        file.write(extent, 0, slab.memory)
        halves.zero_()
        file.read(extent, 0, slab.memory)
        assert halves.tolist() == [2.0] * 100
    part = slab.part(PAGE_BYTES, 100)
    part.tensor(torch.uint8, 0, 100).fill_(9)
    assert slab.tensor(torch.uint8, 0, slab.num_bytes)[PAGE_BYTES : PAGE_BYTES + 101].tolist() == [9] * 100 + [0]
    assert slab.tensor(torch.float64, 8, 0).numel() == 0


def test_tensor_outlives_its_slab_and_pool() -> None:
    pool = SlabPool(2, 100)
    slab = pool.take()
    tensor = slab.tensor(torch.int64, 0, 12)
    tensor.fill_(5)
    pool.give_back(slab)
    pool.close()
    del pool, slab
    assert tensor.tolist() == [5] * 12


def test_slab_refuses_what_it_does_not_hold() -> None:
    slab = Slab.allocate(100)
    for bad in (
        lambda: slab.tensor(torch.float32, 0, 26),
        lambda: slab.tensor(torch.float32, -4, 1),
        lambda: slab.tensor(torch.float32, 2, 1),
        lambda: slab.bytes(90, 11),
        lambda: slab.part(101, 0),
    ):
        with pytest.raises(StateError):
            bad()


def test_pool_hands_out_each_slab_once() -> None:
    pool = SlabPool(3, 5000)
    assert pool.num_bytes == 3 * 2 * PAGE_BYTES
    slabs = [pool.take() for _ in range(3)]
    for index, slab in enumerate(slabs):
        slab.tensor(torch.uint8, 0, 5000).fill_(index)
    assert [slab.memory[4999] for slab in slabs] == [0, 1, 2]
    with pytest.raises(StateError, match="All 3 slabs"):
        pool.take()
    pool.give_back(slabs[1])
    with pytest.raises(StateError, match="twice"):
        pool.give_back(slabs[1])
    assert pool.num_free == 1 and pool.take() is slabs[1]


# -- the interface


def test_host_memory_keeps_bytes_as_a_file_does() -> None:
    store = HostMemory()
    extents = [store.reserve(size) for size in ODD_SIZES]
    store.allocate()
    for extent in extents:
        kept = pattern(extent.num_bytes, 3)
        store.write(extent, 0, kept.memory)
        found = bytearray(extent.num_bytes)
        store.read(extent, 0, memoryview(found))
        assert found == kept.memory == store.in_place(extent).memory
    assert store.traffic.bytes_read == store.traffic.bytes_written == sum(ODD_SIZES)
    assert store.host_bytes == store.num_bytes
    store.close()
    with pytest.raises(StateError):
        store.read(extents[0], 0, memoryview(bytearray(1)))


def stores(tmp_path: Path) -> list[Store]:
    return [HostMemory(), SwapFile(tmp_path / "f", DirectIO())]


def test_new_extents_hold_zeros_and_end_where_they_end(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        with pytest.raises(StateError, match="before it was allocated"):
            store.read(store.reserve(10), 0, memoryview(bytearray(1)))
        extent = store.reserve(100)
        store.allocate()
        found = bytearray(b"x" * 100)
        store.read(extent, 0, memoryview(found))
        assert found == bytes(100)
        for begin, size in ((0, 101), (100, 1), (-1, 1)):
            with pytest.raises(StateError, match="extent of 100 bytes"):
                store.start_write(extent, begin, memoryview(bytearray(size)))
        with pytest.raises(StateError, match="after its store was allocated"):
            store.reserve(1)
        store.check()
        store.close()
        store.close()


def test_traffic_counts_what_was_moved(tmp_path: Path) -> None:
    with swap_file(tmp_path / "f", [1_000_000]) as (file, (extent,)):
        slab = pattern(1_000_000)
        before = file.traffic
        file.write(extent, 0, slab.memory)
        file.read(extent, 10, slab.bytes(0, 5000))
        moved = file.traffic.since(before)
        assert (moved.bytes_written, moved.bytes_read) == (1_000_000, 5000)
        assert moved.write_seconds > 0 and moved.read_seconds > 0


def test_no_thread_and_no_descriptor_is_left(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(3):
        with swap_file(tmp_path / "f", [500_000], SMALL_BLOCKS) as (file, (extent,)):
            file.start_write(extent, 0, pattern(500_000).memory)
            file.start_read(extent, 0, Slab.allocate(500_000).memory)
            assert io_threads()
    with pytest.raises(ConfigError):
        SwapFile(tmp_path / "missing" / "f", DirectIO()).allocate()
    assert not io_threads()
    assert descriptors() == before
    assert list(tmp_path.iterdir()) == []


def test_threads_end_with_an_io_that_nobody_closed(tmp_path: Path) -> None:
    io = DirectIO()
    file = SwapFile(tmp_path / "f", io)
    extent = file.reserve(100_000)
    file.allocate()
    file.write(extent, 0, pattern(100_000).memory)
    file.close()
    threads = io_threads()
    assert threads
    del io, file
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
