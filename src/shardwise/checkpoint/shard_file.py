"""One file of a checkpoint: safetensors, written and read piece by piece, with a checksum for each block of it.

safetensors' own functions take and give whole dicts of tensors. A checkpoint streams: entries may be joined from
several views of live memory, and a reader maps the byte ranges that it needs, checking only the blocks of these.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.plain_file import reading
from shardwise.checkpoint.tree import DTYPE_NAMES, DTYPES
from shardwise.errors import CheckpointError
from shardwise.zero.rest import InMemory, Rest

BLOCK_BYTES = 1 << 24
"""Bytes that one checksum covers: what is written in one go, and what is read at least."""
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
        return sum(part.numel * part.dtype.itemsize for part in self.parts)

    def on_host(self) -> Entry:
        """The same, copied to host memory: training may go on and change the original."""
        return Entry(self.key, self.dtype, self.shape, tuple(_host_copy(part) for part in self.parts))


def _host_copy(part: Rest) -> InMemory:
    return InMemory(part.load().detach().to("cpu", copy=True).contiguous())


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    name: str
    nbytes: int
    checksums: tuple[int, ...]
    """CRC-32 of each block of ``BLOCK_BYTES``, the last one shorter."""


class _BlockWriter:
    """Gathers bytes into blocks; each is written, and its checksum noted, when it is full."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._block = memoryview(bytearray(BLOCK_BYTES))
        self._filled = 0
        self.nbytes = 0
        self.checksums: list[int] = []

    def write(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            taken = min(len(data) - at, BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + taken] = data[at : at + taken]
            self._filled += taken
            at += taken
            if self._filled == BLOCK_BYTES:
                self.flush()

    def flush(self) -> None:
        block = self._block[: self._filled]
        if not block:
            return
        self.checksums.append(zlib.crc32(block))
        self.nbytes += len(block)
        while block:
            block = block[os.write(self._descriptor, block) :]
        self._filled = 0


def layout_of(entries: Sequence[Entry]) -> tuple[bytes, list[Entry]]:
    """The header and the order in which the entries' bytes follow it: wide dtypes first, so that all are aligned."""
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {}
    at = 0
    for entry in ordered:
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{entry.key!r} has dtype {entry.dtype}, which safetensors does not know.")
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def write_shard_file(path: Path, entries: Sequence[Entry]) -> FileRecord:
    """Write ``entries`` as a new safetensors file, and wait until it is on the disk.

    Raises:
        OSError: the file exists, or the disk does not take it.
    """
    header, ordered = layout_of(entries)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        writer = _BlockWriter(descriptor)
        writer.write(memoryview(header))
        for entry in ordered:
            for part in entry.parts:
                for data in _bytes_of(part.load()):
                    writer.write(data)
        writer.flush()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(path.name, writer.nbytes, tuple(writer.checksums))


def _bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes; what rests on a device comes to the host in blocks, never whole."""
    flat = tensor.detach().reshape(-1)
    step = max(1, BLOCK_BYTES // tensor.itemsize)
    pieces = [flat] if flat.device.type == "cpu" else flat.split(step)
    for piece in pieces:
        if piece.numel():
            on_host = piece.cpu().contiguous()  # lives until the next piece is asked for
            yield bytes_of(on_host)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, valid as long as the tensor is.

    Not by way of ``numpy()``, after which torch refuses to resize the storage for good: units resize theirs.
    """
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class ShardFile:
    """A file of a checkpoint, mapped for reading; what is read was checked against its checksums first.

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
        try:
            with reading(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != record.nbytes:
                    raise self._fault(f"it has {size} bytes where {record.nbytes} were written: it was cut or replaced")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path} of the checkpoint cannot be read: {error.strerror}.") from error
        try:
            self._data_begin, self._entries = self._read_header()
        except BaseException:
            self._map.close()
            raise

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged: {what}. Load another checkpoint of the directory, by its tag, or bring this file "
            "back from a copy."
        )

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        if self._record.nbytes < 8:
            raise self._fault("it is too short for a header")
        self._check_blocks(0, 8)
        length = int.from_bytes(self._map[:8], "little")
        if length > min(MAX_HEADER_BYTES, self._record.nbytes - 8):
            raise self._fault(f"its header claims {length} bytes")
        self._check_blocks(8, 8 + length)
        try:
            header = json.loads(self._map[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise self._fault("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._fault("its header is not a JSON object")
        return 8 + length, header

    def _check_blocks(self, begin: int, end: int) -> None:
        for number in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if number in self._checked:
                continue
            block = memoryview(self._map)[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            found = zlib.crc32(block)
            block.release()
            if number >= len(self._record.checksums) or found != self._record.checksums[number]:
                raise self._fault(
                    f"bytes {number * BLOCK_BYTES} to {min((number + 1) * BLOCK_BYTES, self._record.nbytes)} "
                    "do not have the checksum that they were written with"
                )
            self._checked.add(number)

    def check(self, key: str, begin: int, end: int) -> tuple[torch.dtype, int]:
        """Check the blocks of elements ``begin`` to ``end`` of an entry; its dtype, and the first byte of them."""
        dtype, _, at = self._place(key, begin, end)
        self._check_blocks(at, at + (end - begin) * dtype.itemsize)
        return dtype, at

    def read_into(self, key: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` (1-D, any dtype and device) with the elements from ``begin`` on."""
        if not out.numel():
            return
        dtype, at = self.check(key, begin, begin + out.numel())
        view = memoryview(self._map)[at : at + out.numel() * dtype.itemsize]
        # The copy is over before the view goes: nothing of the mapping outlives it, and nothing writes to it.
        out.copy_(_read_only(view, dtype))
        view.release()

    def read(self, key: str) -> torch.Tensor:
        """A whole entry, in its shape."""
        dtype, shape, _ = self._place(key, 0, 0)
        tensor = torch.empty(shape, dtype=dtype)
        self.read_into(key, 0, tensor.view(-1))
        return tensor

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
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise self._fault(f"it has no elements {begin} to {end} of {key!r}") from error
        return dtype, shape, self._data_begin + first + begin * dtype.itemsize

    def close(self) -> None:
        """Take the mapping away."""
        self._map.close()


def _read_only(view: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over mapped memory; torch warns of memory that it must not write, and nobody writes here."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(view, dtype=dtype)
