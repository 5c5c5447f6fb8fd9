"""Checkpoints that forks of the test write together: what is in them tells one save from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.checkpoint import save as saving
from shardwise.checkpoint import shard_file
from shardwise.checkpoint.load import Checkpoint, locate
from shardwise.checkpoint.manifest import complete_tags, read_manifest
from shardwise.checkpoint.save import Content

SIZE, KEPT, NUMEL = 3, 2, 30_011


def value_of(number: int, rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return {"number": number, "tensor": torch.randint(0, 100, (NUMEL,), generator=generator)}


def content_of(number: int, rank: int) -> Content:
    """What `rank` saves."""
    return Content([], value_of(number, -1), value_of(number, rank))


def read(directory: Path, tag: str | None = None) -> int:
    """The number of the checkpoint, all of which is as it was written; 0 where there is none."""
    own = locate(directory, tag)
    if own is None:
        return 0
    with Checkpoint(own) as checkpoint:
        found = checkpoint.shared()
        number = int(found["number"])
        assert checkpoint.manifest.world == SIZE
        assert torch.equal(found["tensor"], value_of(number, -1)["tensor"])
        for rank in range(SIZE):
            mine = checkpoint.of_rank(rank)
            assert mine["number"] == number
            assert torch.equal(mine["tensor"], value_of(number, rank)["tensor"])
    return number


def left_in(directory: Path) -> list[Path]:
    """What is there and belongs to no checkpoint."""
    left = [path for path in directory.iterdir() if path.name not in (".claimed", "latest", "zero_to_fp32.py")]
    for tag in complete_tags(directory):
        left.remove(directory / tag)
        named = {"manifest.json", *(file.name for file in read_manifest(directory / tag).files)}
        left += [path for path in (directory / tag).iterdir() if path.name not in named]
    return [path for each in left for path in (each.iterdir() if each.is_dir() else [each])]


@pytest.fixture
def many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small checkpoints of many writes, and no patience with a rank that has died."""
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr("shardwise.checkpoint.manifest.BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(saving, "PATIENCE_SECONDS", 0.3)
    torch.set_num_threads(1)  # forks have no others
