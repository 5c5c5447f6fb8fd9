"""The manifest of a checkpoint, and the directory that checkpoints lie in.

The manifest is what makes files a checkpoint: it is written last, under a temporary name, and takes its own by one
rename. Files that no manifest names are leftovers of a save that never ended; they are nobody's, whatever they hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from shardwise.checkpoint import checked
from shardwise.checkpoint.plain_file import reading
from shardwise.checkpoint.shard_file import BLOCK_BYTES, FileRecord
from shardwise.errors import CheckpointError

FORMAT = "shardwise"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
TEMPORARY = ".new"  # ends the name of what is not whole yet
MAX_MANIFEST_BYTES = 1 << 29
_NAME = re.compile(r"[\w][\w.+=@-]{0,199}", re.ASCII)
_HEAD = '{"checksum": "%s",\n"manifest": '
_HEAD_BYTES = len(_HEAD % ("0" * 64))
_TAIL = b"}\n"


@dataclass(frozen=True)
class ParameterRecord:
    """What the files hold of one parameter."""

    shape: tuple[int, ...]
    dtype: str
    """Of the values as saved: the master's, in safetensors' words."""
    compute: str
    """What the run computed in."""
    trainable: bool
    group: int
    pieces: tuple[tuple[int, int, int], ...]
    """``(file, begin, end)``: which file holds which elements, in order, without a gap."""
    state: Mapping[str, str] = field(default_factory=dict)
    """Kinds of the optimizer's elementwise state and their dtypes; cut as the parameter is."""
    others: Any = None
    """The rest of the optimizer's state, such as its step count, as a tree."""
    gradient: Any = None
    """Of a step that was under way: ``{"reduced": dtype, "unreduced": dtype, "ranks": [files]}``, what there is of it.
    The averaged part is cut as the parameter is; what was not averaged is whole in the files of the ranks named."""


@dataclass(frozen=True)
class ModelRecord:
    """What the files hold of one model and its training."""

    name: str
    stage: int
    parameters: Mapping[str, ParameterRecord]
    names: Mapping[str, str]
    """Names of the state dict, in its order, and the parameter that each is; ties have several."""
    buffers: Mapping[str, tuple[int, ...]]
    """Buffers of the state dict, and the files that hold a rank's own; rank 0's always."""
    excluded: tuple[str, ...]
    """Frozen parameters that were left out on purpose."""
    optimizer: Any
    """Class and groups as a tree; None without an optimizer."""
    scheduler: Any
    scaler: Any
    counters: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    save_id: str
    world: int
    files: tuple[FileRecord, ...]
    models: tuple[ModelRecord, ...]
    shared: Any
    """What was given to be kept, one for all ranks."""
    ranks: tuple[Any, ...]
    """What each rank keeps for itself."""


def check_tag(tag: str) -> str:
    """The tag, if it can be the name of a directory.

    Raises:
        CheckpointError: it could lead elsewhere, or to a hidden or temporary name.
    """
    if not _NAME.fullmatch(tag) or tag in (LATEST, MANIFEST) or tag.endswith(TEMPORARY):
        raise CheckpointError(
            f"checkpoint tag {tag[:80]!r} cannot name a directory: expected letters, digits and . _ - + = @, beginning "
            "with a letter or a digit, such as 'global_step100'."
        )
    return tag


# --- one manifest -----------------------------------------------------------------------------------------------------


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Make the directory's files a checkpoint, in one instant; an earlier checkpoint there ends in that instant."""
    body = json.dumps({"format": FORMAT, "version": VERSION, "block_bytes": BLOCK_BYTES, **_to_json(manifest)}).encode()
    head = _HEAD % hashlib.sha256(body).hexdigest()
    replace_file(directory / MANIFEST, head.encode() + body + _TAIL)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the checkpoint in ``directory``.

    Raises:
        CheckpointError: there is none, or it is damaged, or no manifest of ours.
    """
    path = directory / MANIFEST
    try:
        with reading(path) as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
        if len(text) > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is larger than 512 MiB, which no manifest is.")
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} holds no checkpoint: there is no {MANIFEST} in it. A save that did not end leaves none."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    body = text[_HEAD_BYTES : -len(_TAIL)]
    if text[:_HEAD_BYTES].decode(errors="replace") != _HEAD % hashlib.sha256(body).hexdigest():
        raise CheckpointError(
            f"{path} is damaged, or no manifest of shardwise: its checksum is not that of its text. Load another "
            "checkpoint of the directory, by its tag, or bring this file back from a copy."
        )
    try:
        return _from_json(json.loads(body), path)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, IndexError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        why = str(error) if type(error) is ValueError else f"{type(error).__name__} {str(error)[:80]}"
        raise CheckpointError(f"{path} is no manifest of shardwise: {why[:200]}.") from error


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "id": manifest.save_id,
        "world": manifest.world,
        "files": [{"name": f.name, "bytes": f.nbytes, "checksums": f.checksums} for f in manifest.files],
        "models": [_model_to_json(model) for model in manifest.models],
        "shared": manifest.shared,
        "ranks": manifest.ranks,
    }


def _model_to_json(model: ModelRecord) -> dict[str, Any]:
    plain = {key: value for key, value in vars(model).items() if key != "parameters"}
    return {**plain, "parameters": {name: vars(record) for name, record in model.parameters.items()}}


def _from_json(data: Any, path: Path) -> Manifest:
    said = (data["format"], data["version"], data["block_bytes"])
    if said != (FORMAT, VERSION, BLOCK_BYTES):
        shown = ", ".join(map(checked.found, said))
        raise CheckpointError(
            f"{path} has format, version and block_bytes {shown}: expected {FORMAT!r}, {VERSION}, {BLOCK_BYTES}."
        )
    data = checked.record(data, "format", "version", "block_bytes", "id", "world", "files", "models", "shared", "ranks")
    world = checked.integer(data["world"], 1)
    files = checked.members(data["files"], _file_from_json)
    models = checked.members(data["models"], lambda model: _model_from_json(model, world, path))
    ranks = checked.members(data["ranks"], checked.anything)
    if len(ranks) != world or len(files) != world:
        raise CheckpointError(f"{path} names {world} ranks, {len(files)} files and {len(ranks)} states of ranks.")
    return Manifest(checked.text(data["id"]), world, files, models, data["shared"], ranks)


def _file_from_json(data: Any) -> FileRecord:
    data = checked.record(data, "name", "bytes", "checksums")
    name = checked.text(data["name"])
    if not _NAME.fullmatch(name):
        raise ValueError(f"the file {name[:80]!r}, where a plain name was expected")
    checksums = checked.members(data["checksums"], lambda each: checked.integer(each, 0, 0xFFFFFFFF))
    return FileRecord(name, checked.integer(data["bytes"]), checksums)


def _model_from_json(data: Any, world: int, path: Path) -> ModelRecord:
    data = checked.record(data, *(each.name for each in fields(ModelRecord)))
    parameters = {
        name: _parameter_from_json(record, world, name, path)
        for name, record in checked.table(data["parameters"], checked.anything).items()
    }
    excluded = checked.members(data["excluded"], checked.text)
    names = checked.table(data["names"], checked.text)
    if unknown := set(names.values()) - set(parameters) - set(excluded):
        raise ValueError(f"a name of the parameter {checked.found(min(unknown))}, which is none")
    file = partial(checked.integer, high=world - 1)
    buffers = checked.table(data["buffers"], lambda owners: checked.members(owners, file))
    if not all(owners and owners[0] == 0 for owners in buffers.values()):
        raise ValueError("a buffer that rank 0 did not write")
    optimizer = checked.optional(data["optimizer"], lambda told: checked.table(told, checked.anything))
    if optimizer is not None:
        # Others' files do not name the class: of what was converted from them, those that make such state are listed.
        listed = ("classes",) if "classes" in optimizer else ()
        checked.record(optimizer, "class", "groups", *listed)
        checked.text(optimizer["class"])
        if listed:
            checked.members(optimizer["classes"], checked.text)
        checked.members(optimizer["groups"], lambda group: checked.table(group, checked.anything))
    counters = checked.table(data["counters"], checked.integer)
    if missing := {"global_steps", "micro_steps", "skipped_steps", "num_passes"} - set(counters):
        raise ValueError(f"no counter {min(missing)!r}")
    return ModelRecord(
        name=checked.text(data["name"]),
        stage=checked.integer(data["stage"], 0, 3),
        parameters=parameters,
        names=names,
        buffers=buffers,
        excluded=excluded,
        optimizer=optimizer,
        scheduler=data["scheduler"],
        scaler=data["scaler"],
        counters=counters,
    )


def _parameter_from_json(data: Any, world: int, name: str, path: Path) -> ParameterRecord:
    data = checked.record(data, *(each.name for each in fields(ParameterRecord)))
    record = ParameterRecord(
        shape=checked.members(data["shape"], checked.integer),
        dtype=checked.dtype_name(data["dtype"]),
        compute=checked.dtype_name(data["compute"]),
        trainable=checked.truth(data["trainable"]),
        group=checked.integer(data["group"], -1),
        pieces=checked.members(data["pieces"], _piece_from_json),
        state=checked.table(data["state"], checked.dtype_name),
        others=data["others"],
        gradient=checked.optional(data["gradient"], lambda told: _gradient_from_json(told, world)),
    )
    _check_cover(name, record, world, path)
    return record


def _piece_from_json(data: Any) -> tuple[int, int, int]:
    file, begin, end = checked.members(data, checked.integer)
    return file, begin, end


def _gradient_from_json(data: Any, world: int) -> dict[str, Any]:
    data = checked.record(data, "reduced", "unreduced", "ranks")
    ranks = checked.members(data["ranks"], lambda rank: checked.integer(rank, 0, world - 1))
    kinds = {kind: checked.optional(data[kind], checked.dtype_name) for kind in ("reduced", "unreduced")}
    return {**kinds, "ranks": ranks}


def _check_cover(name: str, record: ParameterRecord, num_files: int, path: Path) -> None:
    at = 0
    for file, begin, end in record.pieces:
        if begin != at or end <= begin or not 0 <= file < num_files:
            break
        at = end
    numel = math.prod(record.shape)
    if at != numel:
        raise CheckpointError(
            f"{path} covers {at} of {checked.found(numel)} elements of parameter {checked.found(name)}."
        )


# --- the directory ----------------------------------------------------------------------------------------------------


def find_tag(directory: Path) -> str | None:
    """The tag that ``latest`` names; None where no checkpoint was ever completed.

    Raises:
        CheckpointError: ``latest`` makes no sense.
    """
    path = directory / LATEST
    try:
        with reading(path) as file:
            text = file.read(300).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Give the tag by name.") from error
    if not _NAME.fullmatch(text):
        raise CheckpointError(f"{path} does not hold the name of a checkpoint. Give the tag by name.")
    return text


def complete_tags(directory: Path) -> list[str]:
    """Tags of the checkpoints that have a manifest, oldest first."""
    found = []
    for manifest in directory.glob(f"*/{MANIFEST}"):
        if manifest.is_file():
            found.append((manifest.stat().st_mtime_ns, manifest.parent.name))
    return [tag for _, tag in sorted(found)]


def write_latest(directory: Path, tag: str) -> None:
    """Let ``latest`` name the checkpoint, in one instant."""
    replace_file(directory / LATEST, tag.encode())


def replace_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file so that at each instant either the old one or the new one is there, whole, also after a crash."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Bring the directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_files(directory: Path, keep: Sequence[str]) -> None:
    """Remove data files that belong to no checkpoint: leftovers, and those of a checkpoint that was replaced."""
    for path in directory.iterdir():
        if path.name not in keep and path.name != MANIFEST and is_ours(path.name):
            path.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what saves that never ended have left under any tag; call it while nobody else saves there."""
    for own in [path for path in directory.iterdir() if path.is_dir() and not path.is_symlink()]:
        if not (own / MANIFEST).exists():
            remove_files(own, keep=())
            with suppress(OSError):  # something else lies there
                own.rmdir()
        elif _holds_several_saves(own):
            with suppress(CheckpointError):  # damaged: whose files these are nobody knows
                remove_files(own, keep=[file.name for file in read_manifest(own).files])


def _holds_several_saves(directory: Path) -> bool:
    """Told by names alone: manifests are long."""
    ours = [path.name for path in directory.iterdir() if is_ours(path.name)]
    ids = {name.split(".")[1] for name in ours}
    return len(ids) > 1 or not all(name.endswith(".safetensors") for name in ours)


def is_ours(name: str) -> bool:
    """Whether a file of that name in a checkpoint's directory was made by a save."""
    return name.endswith(TEMPORARY) or re.fullmatch(r"rank_\d{5,}\.[0-9a-f]{8}\.(safetensors|done)", name) is not None


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint, its manifest first: what is half removed is none. Files of others stay."""
    (directory / MANIFEST).unlink(missing_ok=True)
    remove_files(directory, keep=())
    with suppress(OSError):  # something else lies there
        directory.rmdir()
