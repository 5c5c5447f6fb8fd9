"""The bytes of a file are those that were given, whatever its length, and whatever the file system refuses or cuts."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardwise.checkpoint import direct_file, host_copy, shard_file
from shardwise.checkpoint.direct_file import ALIGNMENT, Slab, aligned
from shardwise.checkpoint.host_copy import HostCopy
from shardwise.checkpoint.shard_file import Entry, FileRecord, ShardFile, write_shard_file
from shardwise.errors import CheckpointError
from shardwise.zero.rest import InMemory

BLOCK = 1 << 14
Write = Callable[[Path, list[Entry]], FileRecord]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, several pieces a block, several slabs a copy."""
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(shard_file, "SLAB_BYTES", BLOCK // 2)
    monkeypatch.setattr(host_copy, "SLAB_BYTES", BLOCK)


def at_once(path: Path, entries: list[Entry]) -> FileRecord:
    return write_shard_file(path, entries)


def of_a_copy(path: Path, entries: list[Entry]) -> FileRecord:
    """Half of it is copied later."""
    return write_shard_file(path, copy_of(entries[::2], entries[1::2], []).complete())


def copy_of(entries: list[Entry], later: list[Entry], slabs: list[Slab]) -> HostCopy:
    copy = HostCopy(slabs)
    copy.take(entries)
    copy.take_later(later)
    copy.wait()
    return copy


@pytest.fixture(params=[at_once, of_a_copy])
def write(request: pytest.FixtureRequest) -> Write:
    found: Write = request.param
    return found


def bytes_tensor(length: int) -> torch.Tensor:
    return torch.randint(256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(length))


def check_file(path: Path, record: FileRecord, wanted: dict[str, torch.Tensor]) -> None:
    content = path.read_bytes()
    assert len(content) == record.nbytes
    blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    assert record.checksums == tuple(map(zlib.crc32, blocks))
    found, ours = load_file(path), ShardFile(path.parent, record)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        later = torch.empty_like(value)
        ours.read_later(name, 0, later.view(-1))
        ours.settle()
        assert torch.equal(later, value), name
        assert torch.equal(ours.read(name), value), name


def write_and_check(write: Write, path: Path, wanted: dict[str, torch.Tensor]) -> None:
    check_file(path, write(path, [Entry.of(name, value) for name, value in wanted.items()]), wanted)


def length_for(file_bytes: int) -> int:
    """Bytes of an entry that make the whole file so long, its header included."""
    length = file_bytes
    while True:
        excess = length + len(shard_file.layout_of([Entry.of("x", bytes_tensor(length))])[0]) - file_bytes
        if not excess:
            return length
        length -= excess


@pytest.mark.parametrize("edge", [4096, BLOCK // 2, BLOCK, 2 * BLOCK, 3 * BLOCK + 4096])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 512])
def test_lengths_around_pages_slabs_and_blocks(write: Write, edge: int, beyond: int, tmp_path: Path) -> None:
    write_and_check(write, tmp_path / "file", {"x": bytes_tensor(length_for(edge + beyond))})
    assert (tmp_path / "file").stat().st_size == edge + beyond


def test_odd_shapes_dtypes_parts_and_nothing(write: Write, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = {
        "wide": torch.randn(3, 10007),
        "half": torch.randn(1021, 7).bfloat16(),
        "none": torch.empty(0, 5),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "truth": torch.rand(1023) > 0.5,
        "complex": torch.randn(333, dtype=torch.complex64),
        "turned": torch.randn(129, 65).t().contiguous(),
    }
    entries = [Entry.of(name, value) for name, value in wanted.items() if name not in ("wide", "turned")]
    flat = wanted["wide"].reshape(-1)
    cuts = [0, 1, 1, 5000, 20011, flat.numel()]
    parts = tuple(InMemory(flat[begin:end]) for begin, end in itertools.pairwise(cuts))
    entries.append(Entry("wide", torch.float32, (3, 10007), parts))
    entries.append(Entry.of("turned", wanted["turned"].t().contiguous().t()))  # not contiguous
    check_file(tmp_path / "file", write(tmp_path / "file", entries), wanted)


def test_no_entry_at_all(write: Write, tmp_path: Path) -> None:
    write_and_check(write, tmp_path / "file", {})


# -- what a file system may do


@pytest.fixture
def wanted() -> dict[str, torch.Tensor]:
    return {"x": bytes_tensor(5 * BLOCK + 777)}


@pytest.mark.parametrize("most", [1, 1000, 4096, 5000])
def test_short_writes(
    write: Write, most: int, wanted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: plain(fd, memoryview(data)[:most], at))
    write_and_check(write, tmp_path / "file", wanted)


def test_short_reads(wanted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: plain(fd, [memoryview(to[0])[:1000]], at))
    write_and_check(at_once, tmp_path / "file", wanted)


def test_direct_io_is_refused_at_once(
    write: Write, wanted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_file, "_set_direct", lambda descriptor, direct: False)
    write_and_check(write, tmp_path / "file", wanted)


@pytest.mark.parametrize("after", [0, 2])
def test_direct_io_is_refused_by_a_write(
    write: Write, after: int, wanted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems take the flag and refuse the write; with threads, some pieces are on their way by then."""
    import fcntl

    plain, lock, count = os.pwrite, threading.Lock(), 0

    def picky(descriptor: int, data: Any, at: int) -> int:
        nonlocal count
        with lock:
            count += 1
            refused = count > after and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        if refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", picky)
    write_and_check(write, tmp_path / "file", wanted)


def test_no_reservation(
    write: Write, wanted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_file, "reserve", lambda descriptor, nbytes: None)
    write_and_check(write, tmp_path / "file", wanted)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no /dev/shm here")
def test_memory_as_a_file_system(write: Write, wanted: dict[str, torch.Tensor]) -> None:
    path = Path(f"/dev/shm/shardwise-test-{os.getpid()}")
    try:
        write_and_check(write, path, wanted)
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("call", ["reserve", "pwrite", "ftruncate", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_names_the_file(
    write: Write, call: str, number: int, wanted: dict[str, torch.Tensor], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = threading.active_count()
    monkeypatch.setattr(direct_file if call == "reserve" else os, call, fail)
    with pytest.raises(OSError, match="file") as caught:
        write(tmp_path / "file", [Entry.of(name, value) for name, value in wanted.items()])
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "file"))
    assert threading.active_count() == before, "a thread was left"


def test_a_reservation_that_does_not_fit_fails_before_anything_is_written(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reserves on Linux only")
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match=r"large|space"):
        direct_file.reserve(file.fileno(), 1 << 60)


def test_a_file_that_is_there_is_not_written(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"here")
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", [])
    assert (tmp_path / "file").read_bytes() == b"here"


def test_signals_while_it_is_written(write: Write, wanted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A handler that returns interrupts nothing."""
    taken = 0

    def handler(*_: Any) -> None:
        nonlocal taken
        taken += 1

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for number in range(20):
            write_and_check(write, tmp_path / f"file{number}", wanted)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert taken


# -- copies, slabs, and reading


def test_a_copy_is_the_moment_of_its_making(tmp_path: Path) -> None:
    slabs: list[Slab] = []
    value = torch.randn(30011)
    wanted = value.clone()
    copy = copy_of([Entry.of("x", value)], [], slabs)
    value.zero_()
    check_file(tmp_path / "one", write_shard_file(tmp_path / "one", copy.complete()), {"x": wanted})
    addresses = [slab.address for slab in slabs]
    larger = torch.randn(50021)
    copied = copy_of([Entry.of("x", larger)], [], slabs).complete()
    check_file(tmp_path / "two", write_shard_file(tmp_path / "two", copied), {"x": larger})
    assert [slab.address for slab in slabs][: len(addresses)] == addresses, "memory was not used again"
    assert sum(slab.nbytes for slab in slabs) < larger.nbytes + 2 * BLOCK
    copy_of([Entry.of("x", wanted)], [], slabs).complete()
    assert len(slabs) == len(addresses), "more is kept than the last save needed"


def test_what_is_steady_is_copied_when_it_is_asked_for() -> None:
    steady, other = torch.randn(70001), torch.randn(30)
    copy = copy_of([Entry.of("y", other)], [Entry.of("x", steady)], [])
    steady.data.fill_(3.0)  # unseen by anybody
    other.fill_(3.0)
    values = {entry.key: torch.cat([part.load() for part in entry.parts]) for entry in copy.complete()}
    assert values["x"].eq(3.0).all() and not values["y"].eq(3.0).any()


def test_slabs_are_pages() -> None:
    for nbytes in (0, 1, 4095, 4096, 4097):
        slab = Slab(nbytes)
        assert slab.address % ALIGNMENT == 0
        assert slab.nbytes >= nbytes and len(slab.view) == slab.nbytes == max(ALIGNMENT, aligned(nbytes))


def test_a_block_is_read_once_for_all_that_is_wanted_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {f"x{n}": torch.randn(1009) for n in range(40)}
    record = write_shard_file(tmp_path / "file", [Entry.of(name, value) for name, value in values.items()])
    file = ShardFile(tmp_path, record)
    read = 0
    plain = os.preadv

    def counted(descriptor: int, to: Any, at: int) -> int:
        nonlocal read
        count = plain(descriptor, to, at)
        read += count
        return count

    outs = {name: torch.empty(500, dtype=torch.float64) for name in values}
    for name, out in outs.items():
        file.check(name, 0, 1009)
        file.read_later(name, 301, out)
    monkeypatch.setattr(os, "preadv", counted)
    file.settle()
    assert read <= record.nbytes
    for name, out in outs.items():
        assert torch.equal(out, values[name][301:801].double()), name
    file.settle()
    assert read <= record.nbytes, "what was done was done again"


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    record = write_shard_file(tmp_path / "file", [Entry.of("x", torch.randn(10 * BLOCK))])
    for change, told in ((lambda c: c[:-100], "ended early"), (lambda c: c[:-100] + b"~" * 100, "checksum")):
        content = (tmp_path / "file").read_bytes()
        file = ShardFile(tmp_path, record)
        (tmp_path / "file").write_bytes(change(content))
        file.check("x", 0, 10 * BLOCK)
        with pytest.raises(CheckpointError, match=told):
            file.settle()
        (tmp_path / "file").write_bytes(content)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("shardwise-")]
    assert not left
