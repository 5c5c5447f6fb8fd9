"""A file that ``torch.save`` has written, mapped: its value without its tensors' bytes, and those when asked for."""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shardwise.checkpoint.foreign.unpickler import MAX_PICKLE_BYTES, Build, read_pickle
from shardwise.checkpoint.shard_file import bytes_of
from shardwise.errors import CheckpointError

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGES = {
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
}
_TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_INERT = frozenset([*_STORAGES, *_TENSOR_CLASSES])


class _Storage(NamedTuple):
    """Bytes of the file that tensors lie in."""

    begin: int
    nbytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, as a place in it."""

    file: TorchFile
    begin: int
    """First byte."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def tensor(self) -> torch.Tensor:
        """A view of the mapped file, in its shape."""
        return self.file.view(self)

    def flat(self, begin: int, end: int) -> torch.Tensor:
        """Elements ``begin`` to ``end``, as if it were flat: of the mapped file, a copy where it is not contiguous."""
        return self.tensor().reshape(-1)[begin:end]


class TorchFile:
    """A file of ``torch.save``, open for reading.

    Args:
        path: of the file.

    Attributes:
        value: what was saved, with ``Stored`` in the places of tensors.

    Raises:
        CheckpointError: it is no such file, is damaged, or holds what only running foreign code could bring back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: torch.UntypedStorage | None = None
        self._nbytes = 0
        self._records: dict[str, zipfile.ZipInfo] = {}
        self._places: dict[str, int] = {}
        try:
            self.value: Any = self._read()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
        # zipfile says in many ways that a file is none, or none of this kind.
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, LookupError, EOFError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} is damaged, or was not written by torch.save in its zip format: {error}."
            ) from error

    def _read(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            self._nbytes = self.path.stat().st_size
            infos = archive.infolist()
            pickles = [info for info in infos if info.filename.partition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(f"{self.path} holds no data.pkl of a sensible size: torch.save did not write it.")
            prefix = pickles[0].filename.partition("/")[0]
            self._records = {info.filename.removeprefix(f"{prefix}/"): info for info in infos}
            order = self._records.get("byteorder")
            if order is not None and archive.read(order) != b"little":
                raise CheckpointError(f"{self.path} was written on a big-endian machine: expected little-endian data.")
            data = archive.read(pickles[0])
        tensors: dict[str, Build] = {
            "torch._utils._rebuild_tensor_v2": self._rebuild,
            "torch._utils._rebuild_tensor_v3": self._rebuild_with_dtype,
            "torch._utils._rebuild_parameter": lambda arguments: arguments[0],
            "torch._utils._rebuild_parameter_with_state": lambda arguments: arguments[0],
            "torch._tensor._rebuild_from_type_v2": self._rebuild_with_attributes,
        }
        return read_pickle(data, tensors, self._find_storage, _INERT, str(self.path))

    def _find_storage(self, reference: Any) -> _Storage:
        word, kind, key, _, numel = reference
        info = self._records[f"data/{key}"]
        dtype = _STORAGES[kind.text]
        if word != "storage" or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("storage")
        if info.file_size != numel * dtype.itemsize:
            raise CheckpointError(
                f"{self.path} is damaged: its data/{key} has {info.file_size} bytes for {numel} elements."
            )
        return _Storage(self._begin_of(info), info.file_size, dtype)

    def _begin_of(self, info: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin: its own header, which has a name and padding of its own, stands before it."""
        if info.filename not in self._places:
            with self.path.open("rb") as file:
                file.seek(info.header_offset)
                head = file.read(30)
            begin = info.header_offset + 30 + int.from_bytes(head[26:28], "little")
            begin += int.from_bytes(head[28:30], "little")
            if head[:4] != b"PK\x03\x04" or begin + info.file_size > self._nbytes:
                raise CheckpointError(f"{self.path} is damaged: {info.filename} does not lie in it.")
            self._places[info.filename] = begin
        return self._places[info.filename]

    def _rebuild(self, arguments: tuple[Any, ...]) -> Stored:
        storage, offset, shape, stride = arguments[:4]
        return self._stored(storage, storage.dtype, offset, shape, stride)

    def _rebuild_with_dtype(self, arguments: tuple[Any, ...]) -> Stored:
        storage, offset, shape, stride, _, _, dtype = arguments[:7]
        return self._stored(storage, dtype, offset, shape, stride)

    def _rebuild_with_attributes(self, arguments: tuple[Any, ...]) -> Stored:
        """A tensor that attributes were put on; these are not wanted."""
        function, kind, inner, _ = arguments
        if function.text != "torch._utils._rebuild_tensor_v2" or kind.text not in _TENSOR_CLASSES:
            raise CheckpointError(f"{self.path} was not read: it holds a tensor of the class {kind.text[:80]!r}.")
        return self._rebuild(inner)

    def _stored(self, storage: _Storage, dtype: torch.dtype, offset: int, shape: Any, stride: Any) -> Stored:
        shape, stride = tuple(shape), tuple(stride)
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError("shape")
        # Elements that lie in one another, as in expanded tensors, could claim any size.
        last = offset + sum((dim - 1) * step for dim, step in zip(shape, stride, strict=True))
        held = storage.nbytes // dtype.itemsize
        begin = storage.begin + offset * dtype.itemsize
        if math.prod(shape) > held or (math.prod(shape) and last >= held) or begin % dtype.itemsize:
            raise CheckpointError(f"{self.path} is damaged: a tensor of shape {shape} does not lie in its data.")
        return Stored(self, begin, dtype, shape, stride)

    def view(self, stored: Stored) -> torch.Tensor:
        """A tensor over the mapped file."""
        if not stored.numel:
            return torch.empty(stored.shape, dtype=stored.dtype)
        if self._mapped is None:
            self._mapped = torch.from_file(str(self.path), False, self._nbytes, dtype=torch.uint8).untyped_storage()
        at = stored.begin // stored.dtype.itemsize
        return torch.empty(0, dtype=stored.dtype).set_(self._mapped, at, stored.shape, stored.stride)

    def verify(self) -> None:
        """Check the bytes of all tensors against the checksums that the file has of them.

        Raises:
            CheckpointError: one is not what was written.
        """
        whole = Stored(self, 0, torch.uint8, (self._nbytes,), (1,)).tensor()
        for name, info in self._records.items():
            if name.startswith("data/") and info.file_size:
                begin = self._begin_of(info)
                if zlib.crc32(bytes_of(whole[begin : begin + info.file_size])) != info.CRC:
                    raise CheckpointError(
                        f"{self.path} is damaged: its {name} does not have the checksum that it was written with. "
                        "Bring the file back from a copy."
                    )

    def close(self) -> None:
        """Let the mapping go, once nobody holds a view of it; the next read maps anew."""
        self._mapped = None
