"""Whether a directory is a checkpoint of somebody else, and what it holds."""

from __future__ import annotations

from pathlib import Path

from shardwise.checkpoint.foreign.deepspeed_files import MODEL, OPTIMIZER, SHARDED_MODEL, read_deepspeed
from shardwise.checkpoint.foreign.source import Source
from shardwise.checkpoint.foreign.universal import is_universal, read_universal
from shardwise.checkpoint.manifest import check_tag

_LATEST_UNIVERSAL = "latest_universal"


def is_foreign(own: Path) -> bool:
    """Whether it looks like one that this can read, or has an error for."""
    if not own.is_dir():
        return False
    return is_universal(own) or any(
        pattern.fullmatch(path.name) or path.name.startswith("layer_")
        for path in own.glob("*.pt")
        for pattern in (MODEL, SHARDED_MODEL, OPTIMIZER)
    )


def find_foreign(directory: Path) -> Path | None:
    """A foreign checkpoint that no file ``latest`` names: the directory itself, or the universal one in it."""
    if is_foreign(directory):
        return directory
    named = directory / _LATEST_UNIVERSAL
    if named.is_file():
        own = directory / check_tag(named.read_text(errors="replace").strip())
        return own if is_foreign(own) else None
    return None


def read_foreign(own: Path) -> Source:
    """What it holds.

    Raises:
        CheckpointError: it is damaged, or of a layout that this does not know.
    """
    return read_universal(own) if is_universal(own) else read_deepspeed(own)
