"""Files of weights, read by ranges: what ``save_pretrained`` and ``torch.save`` write, not our own checkpoints.

A rank reads the bytes that it will hold, straight to where they will rest. Nothing is mapped, so neither a limit on
memory nor the file's later removal is in the way.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from shardwise.checkpoint.shard_file import BLOCK_BYTES, MAX_HEADER_BYTES, bytes_of
from shardwise.checkpoint.tree import DTYPES
from shardwise.errors import CheckpointError

logger = logging.getLogger(__name__)

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class WeightsFile(Protocol):
    """A file of tensors by name."""

    path: Path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors."""

    def dtype(self, name: str) -> torch.dtype:
        """As it is in the file."""

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` (1-D, any dtype and device) with a tensor's elements from ``begin`` on, cast on the way."""


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file


class SafetensorsFile:
    """One safetensors file.

    Raises:
        CheckpointError: it cannot be read, or its header makes no sense.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        try:
            with path.open("rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                self._entries = self._read_header(file.read(8), file)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is no whole safetensors file: {what}. Bring it back from a copy.")

    def _read_header(self, prefix: bytes, file: Any) -> dict[str, _Entry]:
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, self._size - 8):
            raise self._fault(f"its header claims {length} bytes of {self._size}")
        try:
            header = json.loads(file.read(length))
            self.metadata = header.pop("__metadata__", None) or {}
            return {name: self._entry(words, 8 + length) for name, words in header.items()}
        except (ValueError, RecursionError, AttributeError) as error:
            raise self._fault("its header is not the JSON of one") from error

    def _entry(self, words: Any, data_begin: int) -> _Entry:
        try:
            dtype, shape, (begin, end) = DTYPES[words["dtype"]], tuple(words["shape"]), words["data_offsets"]
            assert all(type(dim) is int and dim >= 0 for dim in shape)
            assert 0 <= begin <= end <= self._size - data_begin
            assert end - begin == math.prod(shape) * dtype.itemsize
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise self._fault(f"its header says {json.dumps(words)[:100]} of a tensor") from error
        return _Entry(dtype, shape, data_begin + begin)

    def dtype(self, name: str) -> torch.dtype:
        """As it is in the file."""
        return self._entries[name].dtype

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out``; through a block of 16 MiB where bytes cannot go straight into it."""
        entry = self._entries[name]
        assert begin + out.numel() <= math.prod(entry.shape)
        at = entry.begin + begin * entry.dtype.itemsize
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if out.dtype == entry.dtype and out.device.type == "cpu" and out.is_contiguous():
                self._read(descriptor, at, out)
                return
            block = torch.empty(max(1, min(out.numel(), BLOCK_BYTES // entry.dtype.itemsize)), dtype=entry.dtype)
            for part in out.split(block.numel()):
                read = block[: part.numel()]
                self._read(descriptor, at, read)
                part.copy_(read)
                at += read.nbytes
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, at: int, out: torch.Tensor) -> None:
        if not out.numel():
            return
        room = bytes_of(out)
        while room:
            num_read = os.preadv(descriptor, [room], at)
            if not num_read:
                raise self._fault("it ends too early: it was cut while it was read")
            room, at = room[num_read:], at + num_read


class TorchFile:
    """What ``torch.save`` wrote of a state dict; mapped, and unpickled without running anything.

    Raises:
        CheckpointError: it cannot be read, or is no dict of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = self._load()
        except Exception as error:  # torch raises whatever a damaged file leads to
            raise CheckpointError(f"{path} cannot be read as weights: {str(error).splitlines()[0][:200]}") from error
        if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise CheckpointError(f"{path} does not hold a state dict: a dict of tensors by name.")
        self._tensors: Mapping[str, torch.Tensor] = found
        self.shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}

    def _load(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
        logger.warning("%s is in torch's old format, which cannot be mapped: each rank reads all of it.", self.path)
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def dtype(self, name: str) -> torch.dtype:
        """As it is in the file."""
        return self._tensors[name].dtype

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` from the mapping."""
        out.copy_(self._tensors[name].reshape(-1)[begin : begin + out.numel()])


class FileSource:
    """A tensor of a file as bytes of ``dtype``."""

    def __init__(self, file: WeightsFile, name: str, dtype: torch.dtype) -> None:
        self._file = file
        self._name = name
        self._dtype = dtype

    def read(self, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` [bytes, uint8] from byte ``begin`` on; both at an element's boundary."""
        self._file.read_into(self._name, begin // self._dtype.itemsize, out.view(self._dtype))


class Weights:
    """All tensors of one model: a file, or a directory of files with an index.

    Args:
        path: ``*.safetensors``, ``*.bin``, an index of such, or a directory that holds one of them.

    Raises:
        CheckpointError: there is none, or one is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        files = [_open(file) for file in _files_of(self.path)]
        self._files: dict[str, WeightsFile] = {}
        for file in files:
            for name in file.shapes:
                if name in self._files:
                    raise CheckpointError(f"{name!r} is both in {self._files[name].path} and in {file.path}.")
                self._files[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._files[name].shapes[name]

    def source(self, name: str, dtype: torch.dtype) -> FileSource:
        """One tensor as bytes of ``dtype``."""
        return FileSource(self._files[name], name, dtype)

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` (1-D) with a tensor's elements from ``begin`` on."""
        if out.numel():
            self._files[name].read_into(name, begin, out)


def _open(path: Path) -> WeightsFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        for name in (SAFETENSORS, SAFETENSORS_INDEX, BIN, BIN_INDEX):
            if (path / name).exists():
                return _files_of(path / name)
        raise CheckpointError(
            f"there are no weights in {path}: expected {SAFETENSORS}, {SAFETENSORS_INDEX}, {BIN} or {BIN_INDEX}. "
            "Checkpoints of engine.save_checkpoint() are loaded by engine.load_checkpoint()."
        )
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: expected a file of weights, or a directory of them.")
    if path.suffix == ".json":
        return _files_of_index(path)
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise CheckpointError(f"{path}: expected a name that ends in .safetensors, .bin, .pt or .index.json.")
    return [path]


def _files_of_index(path: Path) -> list[Path]:
    try:
        named = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of weights: it has no weight_map of names and files.") from error
    for name in named:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path} names the file {name!r}. Expected files beside the index.")
    return [path.parent / name for name in named]
