"""One file of a checkpoint: safetensors, written and read piece by piece, with a checksum for each block of it.

safetensors' own functions take and give whole dicts of tensors. A checkpoint streams: entries may be joined from
several views of live memory, and a reader asks for the byte ranges that it needs, and checks only the blocks of these.

::

    write   fill a slab | checksum it | write it, around the page cache    each beside the next; a few slabs in all
    read    notes of what is wanted; then each block once: read it | checksum it | copy out what was wanted of it
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self

import torch

from shardwise.checkpoint.copies import Filling, cut, wait_for_devices
from shardwise.checkpoint.direct_file import NewFile, Slab
from shardwise.checkpoint.plain_file import reading
from shardwise.checkpoint.tree import DTYPE_NAMES, DTYPES
from shardwise.errors import CheckpointError
from shardwise.zero.rest import InMemory, Rest

BLOCK_BYTES = 1 << 24
"""Bytes that one checksum covers: what is read at least."""
SLAB_BYTES = 1 << 22
"""Bytes that are copied, written or read in one go."""
WRITERS = 2
"""Threads that write one file: one more than a disk needs that takes one piece at a time."""
SLABS = WRITERS + 2
"""Slabs of a save: those that are being written, one that is checksummed, one that is filled."""
READERS = 4
"""Threads that read blocks: two at the disk, two at their checksums."""
MAX_HEADER_BYTES = 100_000_000
"""The limit that safetensors itself sets."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: ``parts`` joined, under ``key``."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Rest, ...]

    @classmethod
    def of(cls, key: str, tensor: torch.Tensor) -> Entry:
        """One whole tensor."""
        return cls(key, tensor.dtype, tuple(tensor.shape), (InMemory(tensor.detach().reshape(-1)),))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    name: str
    nbytes: int
    checksums: tuple[int, ...]
    """CRC-32 of each block of ``BLOCK_BYTES``, the last one shorter."""


# --- writing ----------------------------------------------------------------------------------------------------------


def layout_of(entries: Sequence[Entry]) -> tuple[bytes, list[Entry], int]:
    """The header, the order in which the entries' bytes follow it, and how many bytes all of it has.

    Wide dtypes come first, so that all are aligned.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {}
    at = 0
    for entry in ordered:
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{entry.key!r} has dtype {entry.dtype}, which safetensors does not know.")
        end = at + entry.nbytes
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered, 8 + len(text) + at


class _Contents:
    """What a file will hold, from its first byte on."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        header, self._ordered, self.nbytes = layout_of(entries)
        self._header = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self.on_device = any(
            isinstance(part, InMemory) and part.tensor.device.type != "cpu"
            for entry in self._ordered
            for part in entry.parts
        )

    def cut(self, slab_bytes: int) -> Iterator[Filling]:
        return cut(self._sources(), slab_bytes)

    def _sources(self) -> Iterator[torch.Tensor]:
        yield self._header
        for entry in self._ordered:
            for part in entry.parts:
                yield from part.memory() or (part.load(),)


class _Writing:
    """A file that is being written, in order: checksummed here, brought to the disk by other threads. A context."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self._name = path.name
        self._at = 0
        self._checksums: list[int] = []
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Not an executor, which takes no work once the script has ended, where a save beside training may still run.
        self._threads = [threading.Thread(target=self._run, name=f"shardwise-write-{n}") for n in range(WRITERS)]
        self._file = NewFile(path, nbytes)
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def write(self, data: memoryview, nbytes: int) -> Future[None]:
        """The next ``nbytes``, which lie at the beginning of ``data``; they may be changed when the future is done."""
        if self._at % BLOCK_BYTES == 0:
            self._checksums.append(0)
        self._checksums[-1] = zlib.crc32(data[:nbytes], self._checksums[-1])
        future: Future[None] = Future()
        offset = self._at

        def work() -> None:
            try:
                self._file.write(data, offset, nbytes)
                future.set_result(None)
            except BaseException as error:  # raised where the future is asked
                future.set_exception(error)

        self._work.put(work)
        self._at += nbytes
        return future

    def finish(self) -> FileRecord:
        """When all futures were waited for: the disk has everything."""
        self._file.finish()
        return FileRecord(self._name, self._at, tuple(self._checksums))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Empty):  # after a failure there is work that nobody wants any more
            while True:
                self._work.get_nowait()
        for _thread in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()  # before the file goes: a descriptor's number may come again
        self._file.close()


def _slab_bytes() -> int:
    return min(SLAB_BYTES, BLOCK_BYTES)


def write_shard_file(path: Path, entries: Sequence[Entry]) -> FileRecord:
    """Write ``entries`` as a new safetensors file, and wait until it is on the disk.

    Raises:
        OSError: the file exists, or the disk does not take it.
    """
    contents = _Contents(entries)
    num_slabs = min(SLABS, -(-contents.nbytes // _slab_bytes()))
    free = [Slab(_slab_bytes(), contents.on_device) for _ in range(num_slabs)]
    under_way: deque[tuple[Future[None], Slab]] = deque()
    with _Writing(path, contents.nbytes) as writing:
        for filling in contents.cut(_slab_bytes()):
            if not free:
                oldest, slab = under_way.popleft()
                oldest.result()
                free.append(slab)
            slab = free.pop()
            filling.fill(slab)
            wait_for_devices([filling])
            under_way.append((writing.write(slab.view, filling.nbytes), slab))
        for future, _ in under_way:
            future.result()
        return writing.finish()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, valid as long as the tensor is.

    Not by way of ``numpy()``, after which torch refuses to resize the storage for good: units resize theirs.
    """
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Wish:
    """Bytes ``begin`` to ``end`` of the file: to be checked, and copied to ``out`` where there is one."""

    begin: int
    end: int
    dtype: torch.dtype
    out: torch.Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether the file's bytes are those of ``out``."""
        return (
            self.out is not None
            and self.out.dtype == self.dtype
            and self.out.device.type == "cpu"
            and self.out.is_contiguous()
        )

    def take(self, data: Slab, at: int, nbytes: int) -> None:
        """Copy what ``data``, the file's ``nbytes`` from ``at`` on, has of it; elements are cut nowhere."""
        begin, end = max(self.begin, at), min(self.end, at + nbytes)
        if self.out is None or begin >= end:
            return
        size = self.dtype.itemsize
        part = self.out[(begin - self.begin) // size : (end - self.begin) // size]
        if self.is_plain:
            # Of ctypes, for it lets other threads run, and torch's would start threads of its own in each.
            ctypes.memmove(part.data_ptr(), data.address + begin - at, end - begin)
        else:
            with torch.no_grad():  # each thread has its own such mode
                part.copy_(data.tensor[begin - at : end - at].view(self.dtype))


class ShardFile:
    """A file of a checkpoint, open for reading; what is read was checked against its checksums first.

    ``check`` and ``read_later`` take notes, which ``settle`` carries out: each block is read once, by several threads.

    Args:
        directory: of the checkpoint.
        record: what the manifest says of the file.

    Raises:
        CheckpointError: it is missing, has another length, or a header that makes no sense.
    """

    def __init__(self, directory: Path, record: FileRecord) -> None:
        self.path = directory / record.name
        self._record = record
        self._checked: set[int] = set()
        self._wishes: dict[int, list[_Wish]] = {}
        try:
            with reading(self.path) as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise self._unreadable(error) from error
        if size != record.nbytes:
            raise self._fault(f"it has {size} bytes where {record.nbytes} were written: it was cut or replaced")
        self._data_begin, self._entries = self._read_header()

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path} of the checkpoint cannot be read: {error.strerror}.")

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged: {what}. Load another checkpoint of the directory, by its tag, or bring this file "
            "back from a copy."
        )

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        if self._record.nbytes < 8:
            raise self._fault("it is too short for a header")
        length = int.from_bytes(self._read_bytes(0, 8), "little")
        if length > min(MAX_HEADER_BYTES, self._record.nbytes - 8):
            raise self._fault(f"its header claims {length} bytes")
        try:
            header = json.loads(self._read_bytes(8, 8 + length))
        except (ValueError, RecursionError) as error:
            raise self._fault("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._fault("its header is not a JSON object")
        return 8 + length, header

    def _read_bytes(self, begin: int, end: int) -> bytes:
        out = torch.empty(end - begin, dtype=torch.uint8)
        self._read_now(_Wish(begin, end, torch.uint8, out))
        return bytes(bytes_of(out))

    # --- notes

    def check(self, key: str, begin: int, end: int) -> None:
        """Note that the blocks of elements ``begin`` to ``end`` of an entry are to be checked."""
        dtype, _, at = self._place(key, begin, end)
        self._note(_Wish(at, at + (end - begin) * dtype.itemsize, dtype, None))

    def read_later(self, key: str, begin: int, out: torch.Tensor) -> None:
        """Note that ``out`` (1-D, any dtype and device) is to be filled with the elements from ``begin`` on."""
        dtype, _, at = self._place(key, begin, begin + out.numel())
        self._note(_Wish(at, at + out.numel() * dtype.itemsize, dtype, out))

    def read_into(self, key: str, begin: int, out: torch.Tensor) -> None:
        """The same, at once: for little things, whose blocks are not read again for each of them."""
        dtype, _, at = self._place(key, begin, begin + out.numel())
        self._read_now(_Wish(at, at + out.numel() * dtype.itemsize, dtype, out))

    def read(self, key: str) -> torch.Tensor:
        """A whole entry, in its shape."""
        dtype, shape, _ = self._place(key, 0, 0)
        tensor = torch.empty(shape, dtype=dtype)
        self.read_into(key, 0, tensor.view(-1))
        return tensor

    def _read_now(self, wish: _Wish) -> None:
        self._note(replace(wish, out=None))
        self.settle()
        if wish.out is None or wish.begin == wish.end:
            return
        whole = wish.out if wish.is_plain else torch.empty(wish.out.numel(), dtype=wish.dtype)
        try:
            with reading(self.path) as file:
                self._read_exactly(file.fileno(), bytes_of(whole), wish.begin)
        except OSError as error:
            raise self._unreadable(error) from error
        if whole is not wish.out:
            wish.out.copy_(whole)

    def _note(self, wish: _Wish) -> None:
        for number in range(wish.begin // BLOCK_BYTES, -(-wish.end // BLOCK_BYTES)):
            if wish.out is not None or number not in self._checked:
                self._wishes.setdefault(number, []).append(wish)

    def _place(self, key: str, begin: int, end: int) -> tuple[torch.dtype, list[int], int]:
        entry = self._entries.get(key)
        try:
            assert isinstance(entry, dict)
            dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            numel = 1
            for dim in shape:
                assert type(dim) is int and dim >= 0
                numel *= dim
            assert 0 <= begin <= end <= numel
            assert 0 <= first <= last <= self._record.nbytes - self._data_begin
            assert last - first == numel * dtype.itemsize
            assert (self._data_begin + first) % dtype.itemsize == 0 or not numel
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise self._fault(f"it has no elements {begin} to {end} of {key!r}") from error
        return dtype, shape, self._data_begin + first + begin * dtype.itemsize

    # --- blocks

    def settle(self) -> None:
        """Do everything that was noted.

        Raises:
            CheckpointError: the file is damaged or cannot be read; what was to be filled holds anything then.
        """
        settle([self])

    def take_blocks(self) -> list[Callable[[Slab], None]]:
        """What is noted, as one piece of work a block, each to be given some memory; nothing is noted any more."""
        noted, self._wishes = self._wishes, {}
        return [partial(self._do_block, number, wishes) for number, wishes in sorted(noted.items())]

    def _do_block(self, number: int, wishes: Sequence[_Wish], slab: Slab) -> None:
        begin, end = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self._record.nbytes)
        found = 0
        try:
            with reading(self.path) as file:
                for at in range(begin, end, slab.nbytes):
                    nbytes = min(slab.nbytes, end - at)
                    self._read_exactly(file.fileno(), slab.view[:nbytes], at)
                    found = zlib.crc32(slab.view[:nbytes], found)
                    for wish in wishes:
                        wish.take(slab, at, nbytes)
        except OSError as error:
            raise self._unreadable(error) from error
        if number >= len(self._record.checksums) or found != self._record.checksums[number]:
            raise self._fault(f"bytes {begin} to {end} do not have the checksum that they were written with")
        self._checked.add(number)

    def _read_exactly(self, descriptor: int, out: memoryview, at: int) -> None:
        # By way of the page cache: the weights are read twice, once to check them and once to take them.
        while out:
            count = os.preadv(descriptor, [out], at)
            if not count:
                raise self._fault("it ended early: it was cut while it was read")
            out, at = out[count:], at + count


def settle(files: Iterable[ShardFile]) -> None:
    """Do what was noted for these files, several blocks at once.

    Raises:
        CheckpointError: a file is damaged or cannot be read; what was to be filled holds anything then.
    """
    blocks = [block for file in files for block in file.take_blocks()]
    slabs: SimpleQueue[Slab] = SimpleQueue()

    def do(block: Callable[[Slab], None]) -> None:
        slab = slabs.get()
        try:
            block(slab)
        finally:
            slabs.put(slab)

    num_threads = min(READERS, len(blocks))
    for _ in range(max(1, num_threads)):
        slabs.put(Slab(_slab_bytes()))
    if num_threads <= 1:
        for block in blocks:
            do(block)
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="shardwise-read") as pool:
        try:
            for future in [pool.submit(do, block) for block in blocks]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
