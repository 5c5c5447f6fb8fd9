"""From a directory of DeepSpeed's to a checkpoint of ours: no process group, no model, no device.

What a rank had written goes into one file, and one file after the other is mapped and written; so memory holds one
file's mapping, which the system may drop, and never the checkpoint.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from shardwise.checkpoint import manifest as manifests
from shardwise.checkpoint.foreign.open import is_foreign, read_foreign
from shardwise.checkpoint.foreign.source import Cell, Source
from shardwise.checkpoint.load import locate
from shardwise.checkpoint.save import write_script
from shardwise.checkpoint.shard_file import Entry, FileRecord, write_shard_file
from shardwise.errors import CheckpointError
from shardwise.zero.rest import InMemory


def find_source(directory: Path, tag: str | None) -> Path:
    """The checkpoint itself: of ``tag`` or ``latest`` in ``directory``, or ``directory`` if it is one.

    Raises:
        CheckpointError: there is none.
    """
    if tag is None and (directory / manifests.MANIFEST).is_file():
        return directory
    own = locate(directory, tag)
    if own is None:
        raise CheckpointError(
            f"{directory} holds no checkpoint: there is no file `latest` in it, and it is none itself. Pass the "
            "directory that was given to save_checkpoint, or name the tag."
        )
    return own


def convert_checkpoint(own: Path, directory: Path, wrote: Callable[[int, int], None] = lambda *_: None) -> Path:
    """Write the foreign checkpoint in ``own`` as one of ours in ``directory``, under the same tag; its own directory.

    Args:
        own: the checkpoint's own directory.
        directory: of checkpoints of ours.
        wrote: told after each file how many bytes it has, and how many files are left.

    Raises:
        CheckpointError: it cannot be read, or is ours already, or there is one of that tag.
    """
    if (own / manifests.MANIFEST).is_file():
        raise CheckpointError(f"{own} is a checkpoint of shardwise already: every world and stage reads it as it is.")
    source = read_foreign(own)
    try:
        return write_own(source, directory, own.name, wrote)
    finally:
        source.close()


def write_own(source: Source, directory: Path, tag: str, wrote: Callable[[int, int], None] = lambda *_: None) -> Path:
    """Write what ``source`` holds as a checkpoint of ours; it is there at once, when all of it is.

    Args:
        source: open.
        directory: of checkpoints.
        tag: of this one.
        wrote: told after each file how many bytes it has, and how many files are left.

    Returns:
        The checkpoint's own directory.

    Raises:
        CheckpointError: there is one of that tag; nothing was changed.
    """
    own = directory / manifests.check_tag(tag)
    if (own / manifests.MANIFEST).exists() or is_foreign(own):
        raise CheckpointError(f"{own} holds a checkpoint already. Give another directory, or remove that one.")
    own.mkdir(parents=True, exist_ok=True)
    manifests.sync_directory(directory)
    save_id = secrets.token_hex(4)
    records: list[FileRecord] = []
    try:
        for number, cells in enumerate(source.cells):
            for file in {id(cell.stored.file): cell.stored.file for cell in cells.values()}.values():
                file.verify()
            entries = [_entry(key, cell) for key, cell in cells.items()]
            if number == 0:
                entries += [Entry.of(key, tensor) for key, tensor in source.trees.items()]
            path = own / f"rank_{number:05d}.{save_id}.safetensors"
            records.append(write_shard_file(path, entries))
            del entries
            _unmap(cells)
            wrote(records[-1].nbytes, len(source.cells) - len(records))
    except BaseException:
        manifests.remove_files(own, keep=())
        raise
    manifests.sync_directory(own)
    write_script(directory)
    manifests.write_manifest(own, replace(source.manifest, save_id=save_id, files=tuple(records)))
    manifests.write_latest(directory, tag)
    manifests.remove_files(own, keep=[record.name for record in records])
    return own


def _entry(key: str, cell: Cell) -> Entry:
    values = cell.values(0, cell.numel)
    # A buffer keeps its shape; elements of a parameter are flat.
    shape = cell.stored.shape if "/buffer/" in key else tuple(values.shape)
    return Entry(key, values.dtype, shape, (InMemory(values.reshape(-1)),))


def _unmap(cells: Mapping[str, Cell]) -> None:
    for cell in cells.values():
        cell.stored.file.close()
