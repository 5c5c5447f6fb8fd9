"""The fear: a disk that fails, fills up or is meddled with, and a run that goes on with wrong numbers or hangs."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shardwise.errors import ConfigError, StateError, StorageError
from shardwise.store.aligned import Slab, SlabPool
from shardwise.store.base import PAGE_BYTES, Extent
from shardwise.store.chunk_stream import Chunk, ChunkStream
from shardwise.store.direct_file import free_bytes
from shardwise.store.direct_io import DirectIO
from shardwise.store.io_settings import IOSettings
from shardwise.store.swap_file import SwapFile
from tests.stores import pattern, swap_file

SIZE = 40 * PAGE_BYTES
FEW = IOSettings(block_size=PAGE_BYTES, queue_depth=2)


def expect_lost(call: Callable[[], object], file: SwapFile, *words: str) -> None:
    """One clear error that names the file and what to do, now and from now on."""
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            call()
        text = str(caught.value)
        for word in (str(file.path), "last checkpoint", *words):
            assert word in text, text


# -- no room


def test_file_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    with pytest.raises(ConfigError) as caught, swap_file(tmp_path / "f", [2 * free]):
        pass
    assert str(tmp_path) in str(caught.value) and f"{2 * free:,}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of one megabyte."""
    place = tmp_path / "tiny"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_disk_that_fills_up_between_the_check_and_the_allocation(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shardwise.store.direct_file as module

    (tiny_disk / "other").write_bytes(bytes(600_000))
    monkeypatch.setattr(module, "free_bytes", lambda path: 10**12)
    with pytest.raises(ConfigError, match=r"room for .* but offloaded state needs"), swap_file(
        tiny_disk / "f", [800_000]
    ):  # fmt: skip
        pass
    assert [path.name for path in tiny_disk.iterdir()] == ["other"]


def test_disk_that_fills_up_while_the_run_writes(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the filesystem promises nothing by fallocate, as those that copy on write."""
    monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, begin, size: os.ftruncate(descriptor, begin + size))
    with swap_file(tiny_disk / "f", [800_000]) as (file, (extent,)):
        (tiny_disk / "other").write_bytes(bytes(600_000))
        slab = pattern(800_000)
        transfer = file.start_write(extent, 0, slab.memory)
        expect_lost(transfer.wait, file, "No space left", "free space on it")
        expect_lost(file.check, file, "No space left")
        expect_lost(lambda: file.read(extent, 0, slab.memory), file, "No space left")
    assert [path.name for path in tiny_disk.iterdir()] == ["other"]


def test_limits_of_the_process_on_files_and_on_memory_are_clear_errors(tmp_path: Path) -> None:
    """In a process of its own: the limits would bind this one, too."""
    code = f"""
import resource
from pathlib import Path
from shardwise.errors import ConfigError, StorageError
from shardwise.store.aligned import SlabPool
from tests.stores import swap_file
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with swap_file(Path({str(tmp_path)!r}) / "f", [200_000]):
        raise SystemExit("the file was allocated")
except ConfigError as error:
    assert "ulimit -f" in str(error), error
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
SlabPool(2, 1 << 20)
try:
    SlabPool(2, 64 << 20)
except StorageError as error:
    assert "buffer_count" in str(error)
else:
    raise SystemExit("the slabs were allocated")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


# -- meddled with


@pytest.mark.parametrize(
    ("meddle", "noticed_by"),
    [
        *itertools.product(["truncate", "append", "write", "remove", "replace"], ["check", "read", "write"]),
        ("rename", "check"),  # transfers go on: the bytes are safe
    ],
)
def test_file_that_another_process_touched(tmp_path: Path, meddle: str, noticed_by: str) -> None:
    with swap_file(tmp_path / "f", [SIZE], FEW) as (file, (extent,)):
        slab = pattern(SIZE)
        file.write(extent, 0, slab.memory)
        file.check()
        file.read(extent, 0, slab.memory)
        time.sleep(0.02)  # the clock of a filesystem ticks a few times in it
        if meddle == "truncate":
            os.truncate(file.path, SIZE // 2)
        elif meddle == "append":
            with file.path.open("ab") as other:
                other.write(b"x")
        elif meddle == "write":
            with file.path.open("r+b") as other:
                other.write(b"x")
        elif meddle == "remove":
            file.path.unlink()
        elif meddle == "replace":
            (tmp_path / "other").write_bytes(bytes(SIZE))
            (tmp_path / "other").rename(file.path)
        elif meddle == "rename":
            file.path.rename(tmp_path / "elsewhere")
        calls = {
            "check": file.check,
            "read": lambda: file.read(extent, 0, slab.memory),
            "write": lambda: file.write(extent, 0, slab.memory),
        }
        expect_lost(calls[noticed_by], file)


def test_own_reads_and_writes_are_not_taken_for_meddling(tmp_path: Path) -> None:
    with swap_file(tmp_path / "f", [SIZE, SIZE], FEW) as (file, (first, second)):
        slab = pattern(SIZE)
        for _ in range(50):
            file.start_write(first, 0, slab.memory)
            file.start_write(second, 100, slab.bytes(0, 5000))
            file.check()
            file.read(second, 0, Slab.allocate(SIZE).memory)
            file.check()


def test_stream_over_a_truncated_file_stops(tmp_path: Path) -> None:
    """The file loses its tail while the stream runs."""
    with swap_file(tmp_path / "f", [SIZE] * 8, FEW) as (file, extents):
        pool = SlabPool(3, SIZE)

        def work(index: int, slab: Slab) -> None:
            if index == 1:
                os.truncate(file.path, 6 * SIZE)

        with pytest.raises(StorageError, match=r"bytes instead of|truncated"):
            ChunkStream(file, pool).run([Chunk(extent) for extent in extents], work)
        assert pool.num_free == 3


def test_checksums_find_what_the_file_system_does_not_tell(tmp_path: Path) -> None:
    with swap_file(tmp_path / "f", [SIZE], FEW, verify=True) as (file, (extent,)):
        slab = pattern(SIZE)
        file.write(extent, 0, slab.memory)
        file.read(extent, 0, slab.memory)
        found = os.stat(file.path)
        with file.path.open("r+b") as other:
            other.seek(20 * PAGE_BYTES + 77)
            other.write(bytes([slab.memory[20 * PAGE_BYTES + 77] ^ 1]))
        os.utime(file.path, ns=(found.st_atime_ns, found.st_mtime_ns))
        file.check()
        file.read(extent, 0, slab.bytes(0, 20 * PAGE_BYTES))
        expect_lost(lambda: file.read(extent, 0, slab.memory), file, f"byte {20 * PAGE_BYTES} ", "changed it")


# -- failing system calls


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., int]], None]:
    """Replace os.preadv or os.pwritev; the stand-in gets the true call first."""

    def replace(name: str, stand_in: Callable[..., int]) -> None:
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments: stand_in(call, *arguments))

    return replace


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_disk_that_fails_is_one_error_that_names_file_and_place(
    tmp_path: Path, name: str, failing: Callable[[str, Callable[..., int]], None]
) -> None:
    with swap_file(tmp_path / "f", [SIZE, SIZE], FEW) as (file, (extent, other)):
        slab = pattern(SIZE)
        file.write(extent, 0, slab.memory)

        def fail(call: Callable[..., int], descriptor: int, memory: list[memoryview], offset: int) -> int:
            if offset == 7 * PAGE_BYTES:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(descriptor, memory, offset)

        failing(name, fail)
        start = file.start_read if name == "preadv" else file.start_write
        transfers = [start(extent, 0, slab.memory), start(other, 0, slab.memory)]
        expect_lost(transfers[0].wait, file, f"byte {7 * PAGE_BYTES}", "Input/output error", "system's log")
        expect_lost(file.check, file, "Input/output error")
        expect_lost(lambda: start(other, 0, slab.memory), file, "Input/output error")


def test_failed_write_is_not_followed_by_a_read_of_old_bytes(
    tmp_path: Path, failing: Callable[[str, Callable[..., int]], None]
) -> None:
    def fail(call: Callable[..., int], *arguments: object) -> int:
        release.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with swap_file(tmp_path / "f", [SIZE], FEW) as (file, (extent,)):
        slab = pattern(SIZE)
        file.write(extent, 0, slab.memory)
        release = threading.Event()
        failing("pwritev", fail)
        file.start_write(extent, 0, slab.memory)
        read = file.start_read(extent, 0, Slab.allocate(SIZE).memory)
        assert not read.done
        release.set()
        expect_lost(read.wait, file, "could not be written")


def test_short_calls_are_gone_on_with(tmp_path: Path, failing: Callable[[str, Callable[..., int]], None]) -> None:
    """As a signal or a full device queue makes them; with O_DIRECT only whole pages can be gone on from."""

    def short(call: Callable[..., int], descriptor: int, memory: list[memoryview], offset: int) -> int:
        (block,) = memory
        count = call(descriptor, [block[: max(PAGE_BYTES, block.nbytes // 2 // PAGE_BYTES * PAGE_BYTES)]], offset)
        return count - 100 if count > PAGE_BYTES else count

    failing("preadv", short)
    failing("pwritev", short)
    with swap_file(tmp_path / "f", [SIZE], IOSettings(block_size=16 * PAGE_BYTES)) as (file, (extent,)):
        slab, found = pattern(SIZE), Slab.allocate(SIZE)
        file.write(extent, 0, slab.memory)
        file.read(extent, 0, found.memory)
        assert found.memory == slab.memory


def test_surprise_in_a_thread_is_an_error_and_no_hang(
    tmp_path: Path, failing: Callable[[str, Callable[..., int]], None]
) -> None:
    def fail(call: Callable[..., int], *arguments: object) -> int:
        raise MemoryError("of the system call")

    with swap_file(tmp_path / "f", [SIZE], FEW) as (file, (extent,)):
        failing("preadv", fail)
        with pytest.raises(StorageError, match="of the system call"):
            file.read(extent, 0, Slab.allocate(SIZE).memory)


def test_process_that_gets_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = 0
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        nonlocal started
        started += 1
        if started > allowed:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    slab = pattern(SIZE)
    allowed = 1
    with swap_file(tmp_path / "one", [SIZE], FEW) as (file, (extent,)):
        file.write(extent, 0, slab.memory)  # one thread does the work of two
    allowed = started = 0
    with swap_file(tmp_path / "none", [SIZE], FEW) as (file, (extent,)), pytest.raises(StorageError, match="ulimit -u"):
        file.write(extent, 0, slab.memory)


# -- memory, and use out of turn


def test_memory_that_the_system_has_not_is_one_clear_error() -> None:
    with pytest.raises(StorageError, match="host memory could not be had"):
        Slab.allocate(1 << 60)


def test_path_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("another run's")
    with pytest.raises(ConfigError, match="run id"), swap_file(tmp_path / "f", [1]):
        pass
    assert (tmp_path / "f").read_text() == "another run's"


def test_closing_removes_only_what_is_ours(tmp_path: Path) -> None:
    with swap_file(tmp_path / "f", [1]) as (file, _):
        file.path.unlink()
        file.path.write_text("another's")
    assert (tmp_path / "f").read_text() == "another's"


def test_fork_leaves_the_file_to_its_process(tmp_path: Path) -> None:
    with swap_file(tmp_path / "f", [SIZE], FEW) as (file, (extent,)):
        slab = pattern(SIZE)
        file.write(extent, 0, slab.memory)
        child = os.fork()
        if child == 0:
            file.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        file.check()
        found = Slab.allocate(SIZE)
        file.read(extent, 0, found.memory)
        assert found.memory == slab.memory


def test_use_after_the_threads_ended(tmp_path: Path) -> None:
    io = DirectIO()
    file = SwapFile(tmp_path / "f", io)
    extent: Extent = file.reserve(100)
    file.allocate()
    io.close()
    io.close()
    with pytest.raises(StateError, match="threads were closed"):
        file.start_write(extent, 0, memoryview(bytearray(1)))
    file.close()
    with pytest.raises(StateError, match="closed"):
        file.check()


def test_peak_memory_is_the_slabs(tmp_path: Path) -> None:
    """A file sixteen times the slabs goes through, and the process grows by the slabs alone."""
    chunk_bytes, num_chunks = 1 << 20, 48
    with swap_file(tmp_path / "f", [chunk_bytes] * num_chunks) as (file, extents):
        pool = SlabPool(3, chunk_bytes)
        stream = ChunkStream(file, pool)
        chunks = [Chunk(extent) for extent in extents]
        stream.run(chunks, lambda index, slab: None)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def work(index: int, slab: Slab) -> None:
            slab.tensor(torch.float32, 0, chunk_bytes // 4).add_(1)

        stream.run(chunks, work)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < chunk_bytes * num_chunks // 4
        assert pool.num_bytes + file.host_bytes == 3 * chunk_bytes
