#!/usr/bin/env python
"""Make ordinary weights of a checkpoint that shardwise has written: whole tensors, in fp32, for anybody to load.

::

    ./zero_to_fp32.py . pytorch_model.bin            one file for torch.load
    ./zero_to_fp32.py . model.safetensors            one file of safetensors
    ./zero_to_fp32.py . weights --max_shard_size 2GB a directory of shards with an index, as transformers reads it

Needs torch, no GPU, no configuration and no shardwise: a copy of this file lies beside every checkpoint. What it reads
is checked against its checksums; memory is that of the largest parameter, for tensors are written as they are read.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

try:
    from shardwise.errors import CheckpointError
except ImportError:  # a copy beside a checkpoint stands alone

    class CheckpointError(ValueError):  # type: ignore[no-redef]
        """A checkpoint that cannot be read."""


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors, by their names there."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VERSION = 1
MAX_MANIFEST_BYTES = 1 << 29
MAX_BLOCK_BYTES = 1 << 26
_NAME = re.compile(r"[\w][\w.+=@-]{0,199}", re.ASCII)
_HEAD_BYTES = len('{"checksum": "",\n"manifest": ') + 64
_TAIL_BYTES = 2
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


# --- reading ----------------------------------------------------------------------------------------------------------


class _File:
    """One safetensors file of the checkpoint, read by ranges; opening it checks all of it."""

    def __init__(self, path: Path, nbytes: int, checksums: list[int], block_bytes: int) -> None:
        self._path = path
        self._file = _open(path)
        self._check(nbytes, checksums, block_bytes)
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        try:
            header = json.loads(self._file.read(min(length, nbytes)))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: its header is not JSON.") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{path} is damaged: its header is no JSON object.")
        self._header: dict[str, Any] = header
        self._data_begin = 8 + length
        self._data_bytes = nbytes - self._data_begin

    def _check(self, nbytes: int, checksums: list[int], block_bytes: int) -> None:
        found = []
        while block := self._file.read(block_bytes):
            found.append(zlib.crc32(block))
        if self._file.tell() != nbytes or found != list(checksums):
            raise CheckpointError(
                f"{self._path} is damaged: it does not have the length or the checksums that it was written with."
            )

    def place(self, key: str) -> tuple[torch.dtype, tuple[int, ...], int]:
        """An entry's dtype, its shape, and the first byte of it among the data."""
        try:
            entry = self._header[key]
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], _whole_numbers(entry["shape"]), entry["data_offsets"]
            fits = 0 <= begin <= end <= self._data_bytes and end - begin == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(f"{self._path} is damaged: it does not hold {key[:80]!r} as the manifest says.")
        return dtype, shape, begin

    def read_into(self, key: str, out: torch.Tensor) -> None:
        """Fill ``out`` (1-D, of the entry's dtype)."""
        dtype, shape, begin = self.place(key)
        if dtype != out.dtype or math.prod(shape) != out.numel():
            raise CheckpointError(f"{self._path} is damaged: it does not hold {key[:80]!r} as the manifest says.")
        if out.nbytes:
            self._file.seek(self._data_begin + begin)
            array: Any = out.view(torch.uint8).numpy()
            view = memoryview(array)
            while view:
                count = self._file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self._path} ended early.")
                view = view[count:]


def _open(path: Path) -> io.FileIO:
    """A plain file, unbuffered: of a pipe or a device one would wait for ever, or never see the end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
    except OSError as error:
        raise CheckpointError(f"{path} of the checkpoint cannot be read: {error.strerror}.") from error
    return io.FileIO(descriptor, "rb")


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError("whole numbers were expected")
    return tuple(values)


class LazyTensor:
    """A tensor of the checkpoint that is read when it is asked for.

    Attributes:
        shape: of the whole tensor.
        dtype: that ``contiguous()`` gives.
        is_parameter: or a buffer.
    """

    def __init__(
        self,
        files: _Files,
        pieces: list[tuple[int, str, int, int]],
        shape: tuple[int, ...],
        stored: torch.dtype,
        dtype: torch.dtype,
        is_parameter: bool,
    ) -> None:
        self._files = files
        self._pieces = pieces
        self._stored = stored
        self.shape = shape
        self.dtype = dtype
        self.is_parameter = is_parameter

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel() * self.dtype.itemsize

    def contiguous(self) -> torch.Tensor:
        """Read it."""
        whole = torch.empty(self.numel(), dtype=self.dtype)
        for file, key, begin, end in self._pieces:
            if self._stored == self.dtype:
                self._files[file].read_into(key, whole[begin:end])
            else:
                narrow = torch.empty(end - begin, dtype=self._stored)
                self._files[file].read_into(key, narrow)
                whole[begin:end] = narrow
        return whole.view(self.shape)


class _Files:
    """The files of a checkpoint, opened when first needed."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self._directory = directory
        self._records = manifest["files"]
        self._block_bytes = manifest["block_bytes"]
        if type(self._block_bytes) is not int or not 0 < self._block_bytes <= MAX_BLOCK_BYTES:
            raise CheckpointError(f"the manifest has block_bytes {self._block_bytes!r:.40}.")
        self._open: dict[int, _File] = {}

    def __getitem__(self, number: int) -> _File:
        if number not in self._open:
            record = self._records[number]
            self._open[number] = _File(self._path(number), record["bytes"], record["checksums"], self._block_bytes)
        return self._open[number]

    def _path(self, number: int) -> Path:
        if type(number) is not int or not 0 <= number < len(self._records):
            raise CheckpointError(f"the manifest refers to a file {number!r:.20}, which it does not have.")
        name: str = self._records[number]["name"]
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"the manifest names the file {name[:80]!r}: expected a plain name.")
        return self._directory / name

    def hold(self, number: int, nbytes: int) -> bool:
        """Whether a file is large enough for so much."""
        path = self._path(number)
        try:
            return nbytes <= path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} of the checkpoint cannot be read: {error.strerror}.") from error


def find_tag(directory: Path, tag: str | None) -> str:
    """The tag that is asked for, or that the file ``latest`` names."""
    asked = tag is not None
    if tag is None:
        try:
            with _open(directory / "latest") as file:
                tag = file.read(300).decode(errors="replace").strip()
        except CheckpointError:
            if (directory / "latest").exists():
                raise
            raise CheckpointError(
                f"{directory} holds no checkpoint: there is no file `latest` in it. Pass the directory that was given "
                "to save_checkpoint, or name the tag."
            ) from None
    if not _NAME.fullmatch(tag):
        what = repr(tag[:80]) if asked else f"what {directory / 'latest'} holds"
        raise CheckpointError(f"{what} is no tag of a checkpoint.")
    return tag


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in ``directory``, checked against its own checksum."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no complete checkpoint: there is no file manifest.json in it.")
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is larger than 512 MiB, which no manifest is.")
        text = file.readall()
    body = text[_HEAD_BYTES:-_TAIL_BYTES]
    if hashlib.sha256(body).hexdigest().encode() not in text[:_HEAD_BYTES]:
        raise CheckpointError(f"{path} is damaged, or no manifest of shardwise: its checksum is not that of its text.")
    try:
        manifest: dict[str, Any] = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no manifest of shardwise.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "shardwise":
        raise CheckpointError(f"{path} is no manifest of shardwise.")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {manifest.get('version')!r:.40}: this script reads {VERSION}.")
    return manifest


def open_weights(
    directory: Path, manifest: Mapping[str, Any], model: int = 0, dtype: str = "fp32", with_frozen: bool = True
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The state dict to be, in its order, without names that are ties, and the ties: name to name."""
    if dtype not in FLOATS:
        raise CheckpointError(f"dtype {dtype!r} is unknown: expected one of {', '.join(FLOATS)}.")
    try:
        if not 0 <= model < len(manifest["models"]):
            raise CheckpointError(f"{directory} holds {len(manifest['models'])} model(s): there is no model {model}.")
        return _open_weights(_Files(directory, manifest), manifest["models"][model], model, FLOATS[dtype], with_frozen)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        why = f"{type(error).__name__} {str(error)[:80]}"
        raise CheckpointError(f"the manifest in {directory} makes no sense: {why}.") from error


def _open_weights(
    files: _Files, record: Mapping[str, Any], model: int, dtype: torch.dtype, with_frozen: bool
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    lazy: dict[str, LazyTensor] = {}
    ties: dict[str, str] = {}
    first_names: dict[str, str] = {}
    for name, parameter in record["names"].items():
        if parameter in first_names:
            ties[name] = first_names[parameter]
            continue
        described = record["parameters"].get(parameter)
        if described is None or not (with_frozen or described["trainable"]):
            continue
        first_names[parameter] = name
        pieces = [(f, f"{model}/weight/{parameter}/{begin}", begin, end) for f, begin, end in described["pieces"]]
        stored, shape = DTYPES[described["dtype"]], _whole_numbers(described["shape"])
        _check_pieces(files, pieces, shape, stored, name)
        lazy[name] = LazyTensor(files, pieces, shape, stored, _wanted(stored, dtype), True)
    for name, (owner, *_) in record["buffers"].items():
        key = f"{model}/buffer/{name}/0"
        stored, shape, _ = files[owner].place(key)
        pieces = [(owner, key, 0, math.prod(shape))]
        lazy[name] = LazyTensor(files, pieces, shape, stored, _wanted(stored, dtype), False)
    if "__metadata__" in (*lazy, *ties):
        raise CheckpointError("the manifest names a parameter __metadata__, which safetensors has for itself.")
    return lazy, ties


def _check_pieces(
    files: _Files, pieces: list[tuple[int, str, int, int]], shape: tuple[int, ...], stored: torch.dtype, name: str
) -> None:
    """They can be there, and cover the parameter in order, without a gap: nothing is left as memory happened to be."""
    at = 0
    for file, _, begin, end in pieces:
        if begin != at or type(end) is not int or not files.hold(file, (end - begin) * stored.itemsize):
            break
        at = end
    if at != math.prod(shape):
        raise CheckpointError(f"the manifest does not cover the elements of {name[:80]!r}.")


def _wanted(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    return dtype if stored.is_floating_point else stored


# --- writing ----------------------------------------------------------------------------------------------------------


def parse_size(size: int | str) -> int:
    """Bytes: ``5GB`` is 5 * 10**9, ``5GiB`` is 5 * 2**30."""
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)", str(size).strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise CheckpointError(f"{size!r} is no size: expected a number of bytes, or one with KB, MB, GB or GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def split_into_shards(weights: Mapping[str, Any], max_bytes: int) -> list[list[str]]:
    """Names for each file: in order, as many as fit; what is larger alone has a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def write_safetensors(path: Path, weights: Mapping[str, Any], ties: Mapping[str, str]) -> None:
    """Write tensors one after the other; each is made by its ``contiguous()`` when its turn comes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **ties}}
    ordered = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    at = 0
    for name in ordered:
        tensor = weights[name]
        offsets = [at, at + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            _write_bytes(file, weights[name].contiguous())


def write_torch(path: Path, weights: Mapping[str, Any], ties: Mapping[str, str]) -> None:
    """Write a file for ``torch.load``, tensor by tensor.

    ``torch.save`` first writes it with holes: memory that is never touched stands for the tensors.
    """
    blanks = {name: torch.empty(tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in weights.items()}
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as new, torch.serialization.skip_data():
        torch.save({**blanks, **{name: blanks[kept] for name, kept in ties.items()}}, new)
    with zipfile.ZipFile(temporary) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    with temporary.open("r+b") as file:
        for number, name in enumerate(weights):  # storages are numbered as they are met
            info = records[f"data/{number}"]
            if info.file_size != weights[name].nbytes:
                raise CheckpointError(f"torch.save has laid out {name!r} in an unknown way; write safetensors instead.")
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
            skip = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            file.seek(info.header_offset + 30 + skip)
            _write_bytes(file, weights[name].contiguous())
    os.replace(temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".new")


class _new_file:
    """A file that takes its name when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> BinaryIO:
        temporary = _temporary(self._path)
        temporary.unlink(missing_ok=True)  # it may be a link that leads elsewhere
        self._file: BinaryIO = temporary.open("xb")
        return self._file

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None:
            os.replace(_temporary(self._path), self._path)
        else:
            _temporary(self._path).unlink(missing_ok=True)


def _write_bytes(file: BinaryIO, tensor: torch.Tensor) -> None:
    if tensor.numel():
        whole = tensor.detach().cpu().contiguous()
        # Not by way of numpy(), after which torch refuses to resize the storage for good.
        file.write((ctypes.c_char * whole.nbytes).from_address(whole.data_ptr()))


def write_weights(
    output: Path, weights: Mapping[str, Any], ties: Mapping[str, str], max_bytes: int, safetensors: bool
) -> list[Path]:
    """Write one file where ``output`` is the name of one, else a directory of shards; returns the files."""
    if output.suffix in (".bin", ".pt", ".pth") and not output.is_dir():
        write_torch(output, weights, ties)
        return [output]
    if output.suffix == ".safetensors" and not output.is_dir():
        write_safetensors(output, weights, ties)
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", ".safetensors") if safetensors else ("pytorch_model", ".bin")
    write = write_safetensors if safetensors else write_torch
    shards = split_into_shards(weights, max_bytes)
    if len(shards) == 1:
        write(output / f"{stem}{suffix}", weights, ties)
        return [output / f"{stem}{suffix}"]
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = output / f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
        own_ties = {name: kept for name, kept in ties.items() if kept in names}
        write(file, {name: weights[name] for name in names}, own_ties)
        written.append(file)
        weight_map |= dict.fromkeys([*names, *([] if safetensors else own_ties)], file.name)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with _new_file(output / f"{stem}{suffix}.index.json") as index_file:
        index_file.write(json.dumps(index, indent=2).encode() + b"\n")
    return written


# --- what one calls ---------------------------------------------------------------------------------------------------


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """The whole state dict in fp32, on the CPU.

    Args:
        checkpoint_dir: what was given to ``save_checkpoint``.
        tag: of the checkpoint; None: the one that ``latest`` names.
        exclude_frozen_parameters: leave frozen parameters out.
        lazy_mode: values are read when their ``contiguous()`` is called.
    """
    directory = Path(checkpoint_dir)
    own = directory / find_tag(directory, tag)
    lazy, ties = open_weights(own, read_manifest(own), with_frozen=not exclude_frozen_parameters)
    state: dict[str, Any] = dict(lazy) if lazy_mode else {name: tensor.contiguous() for name, tensor in lazy.items()}
    return {**state, **{name: state[kept] for name, kept in ties.items()}}


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> torch.nn.Module:
    """Give ``model`` the whole weights in fp32, on the CPU; an engine that trained it is of no use afterwards.

    Args:
        model: the module that was trained, or one like it. It gets new parameters, tied as they were.
        checkpoint_dir: what was given to ``save_checkpoint``.
        tag: of the checkpoint; None: the one that ``latest`` names.
    """
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    owners: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    model.load_state_dict(state, strict=False, assign=True)
    for places in owners.values():
        kept = getattr(*places[0])
        for module, name in places[1:]:
            setattr(module, name, kept)
    return model


def _return_freed_memory() -> None:
    """Tensors of a megabyte or more go back to the system as they are freed, in this process from now on.

    glibc would keep them once it has seen some, and with small ones in the gaps its heap grows beyond what is held.
    """
    try:
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    except (OSError, AttributeError):
        return  # another C library


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    dtype: str = "fp32",
    model: int = 0,
) -> None:
    """Write the whole weights: one file for the name of one (``*.bin``, ``*.safetensors``), else a directory of shards.

    Args:
        checkpoint_dir: what was given to ``save_checkpoint``.
        output_dir: file or directory.
        max_shard_size: bytes of a shard, such as ``5GB``; None: no limit.
        safe_serialization: shards of safetensors instead of files for ``torch.load``.
        tag: of the checkpoint; None: the one that ``latest`` names.
        exclude_frozen_parameters: leave frozen parameters out.
        dtype: fp32, fp16 or bf16.
        model: which one, where several were saved together.
    """
    _return_freed_memory()
    directory, output = Path(checkpoint_dir), Path(output_dir)
    tag = find_tag(directory, tag)
    print(f"Processing zero checkpoint at {os.path.normpath(directory / tag)}")
    manifest = read_manifest(directory / tag)
    weights, ties = open_weights(directory / tag, manifest, model, dtype, not exclude_frozen_parameters)
    stage, world = manifest["models"][model].get("stage"), manifest.get("world")
    print(f"Detected checkpoint of type zero stage {stage!r:.20}, world_size: {world!r:.20}")
    total = sum(tensor.numel() for tensor in weights.values() if tensor.is_parameter)
    print(f"Saving {dtype} state dict to {output_dir} (total_numel={total})")
    write_weights(output, weights, ties, sys.maxsize if max_shard_size is None else parse_size(max_shard_size),
                  safe_serialization)  # fmt: skip


def _arguments() -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    yield ("checkpoint_dir",), {"help": "what was given to save_checkpoint: where `latest` lies"}
    yield ("output",), {"help": "a file (*.bin, *.safetensors), or a directory for shards"}
    yield ("-t", "--tag"), {"help": "which checkpoint; default: the one that `latest` names"}
    yield ("--max_shard_size",), {"default": "5GB", "help": "of a file in a directory (default: %(default)s)"}
    yield ("--safe_serialization",), {"action": "store_true", "help": "shards of safetensors"}
    yield ("--exclude_frozen_parameters",), {"action": "store_true", "help": "leave frozen parameters out"}
    yield ("--dtype",), {"default": "fp32", "choices": list(FLOATS), "help": "of the result (default: %(default)s)"}
    yield ("--model",), {"default": 0, "type": int, "help": "which one, where several were saved together"}
    yield ("-d", "--debug"), {"action": "store_true", "help": "show where an error comes from"}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make ordinary weights of a checkpoint that shardwise has written.")
    for names, options in _arguments():
        parser.add_argument(*names, **options)
    asked = parser.parse_args()
    try:
        convert_zero_checkpoint_to_fp32_state_dict(
            asked.checkpoint_dir, asked.output, asked.max_shard_size, asked.safe_serialization, asked.tag,
            asked.exclude_frozen_parameters, asked.dtype, asked.model,
        )  # fmt: skip
    except (CheckpointError, OSError) as error:
        if asked.debug:
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
