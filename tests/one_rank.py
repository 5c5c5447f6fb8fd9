"""Checkpoints of values alone, written by one rank without an engine: for tests of files and directories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.load import Checkpoint, locate
from shardwise.checkpoint.save import Content, Place, save


@dataclass(frozen=True)
class Alone:
    """The meeting of one rank."""

    rank: int = 0
    size: int = 1

    def exchange(self, subject: str, payload: bytes) -> list[bytes]:
        return [payload]


def value_of(number: int) -> dict[str, Any]:
    """Something to save that tells one save from another."""
    return {"number": number, "tensor": torch.arange(number, number + 5000), "text": f"save {number}"}


def write(directory: Path, tag: str, number: int, **place: Any) -> None:
    """A checkpoint of `value_of(number)`."""
    save(Place(directory, tag, **place), Content([], value_of(number), {"mine": torch.tensor([number])}), Alone())


def read(directory: Path, tag: str | None = None) -> int:
    """The number of the checkpoint that is found, once all of it was read and is as it was written."""
    own = locate(directory, tag)
    assert own is not None
    with Checkpoint(own) as checkpoint:
        found, mine = checkpoint.shared(), checkpoint.of_rank(0)
    wanted = value_of(found["number"])
    assert found.keys() == wanted.keys()
    assert found["text"] == wanted["text"]
    assert torch.equal(found["tensor"], wanted["tensor"])
    assert mine["mine"].item() == found["number"]
    return int(found["number"])
