"""kill -9 at any instant of a save, of all ranks or of one: the newest complete checkpoint is there, bit for bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.checkpoint import save as saving
from shardwise.checkpoint import shard_file
from shardwise.checkpoint.load import Checkpoint, locate
from shardwise.checkpoint.manifest import complete_tags, read_manifest
from shardwise.checkpoint.save import Background, Content, Place, save
from tests.linked_processes import PEER_HAS_DIED, Job, Star

SIZE, TAGS, KEPT = 3, 4, 2
NUMEL = 30_011
SEED = time.time_ns() % 10**6  # printed; another one each time


def value_of(number: int, rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return {"number": number, "tensor": torch.randint(0, 100, (NUMEL,), generator=generator)}


def save_on_and_on(directory: Path, first: int, last: int | None, async_save: bool) -> Callable[..., None]:
    """What each rank does: save after save, each under one of few tags; rank 0 says what has begun and what is done."""

    def work(star: Star, say: Callable[[bytes], None]) -> None:
        background, number = Background(), first
        while last is None or number <= last:
            content = Content([], value_of(number, -1), value_of(number, star.rank))
            place = Place(directory, f"tag{number % TAGS}", keep_last=KEPT)
            if star.rank == 0:
                say(b"begun %d" % number)
            if async_save:
                background.start(place, content, star)
            else:
                save(place, content, star, background.claims)
            if star.rank == 0 and number - async_save >= first:  # a start has waited for the save before it
                say(b"done %d" % (number - async_save))
            number += 1
        background.finish(star)

    return work


def read(directory: Path, tag: str | None = None) -> int:
    """The number of the checkpoint, all of which is as it was written; 0 where there is none."""
    own = locate(directory, tag)
    if own is None:
        return 0
    with Checkpoint(own) as checkpoint:
        found = checkpoint.shared()
        number = int(found["number"])
        assert checkpoint.world == SIZE
        assert torch.equal(found["tensor"], value_of(number, -1)["tensor"])
        for rank in range(SIZE):
            mine = checkpoint.of_rank(rank)
            assert mine["number"] == number
            assert torch.equal(mine["tensor"], value_of(number, rank)["tensor"])
    return number


def assert_survives(directory: Path, kills: int, async_save: bool, alone: bool, seed: int) -> None:
    """`alone`: one rank is killed, and the others must notice and end."""
    draw = random.Random(seed)
    last, newest, seconds, outcomes = 0, 0, 0.2, set()
    for _ in range(kills):
        job = Job(SIZE, save_on_and_on(directory, last + 1, None, async_save))
        heard, start = [], time.monotonic()
        deadline = None
        while deadline is None or time.monotonic() < deadline:
            word = job.hear(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if word is None:
                break
            heard.append(word.split())
            if deadline is None:  # it has begun: from here on any instant is as good as any other
                deadline = time.monotonic() + draw.uniform(0.0, 2.5) * seconds
        job.kill(*([draw.randrange(SIZE)] if alone else range(SIZE)))
        while (word := job.hear()) is not None:
            heard.append(word.split())
        codes = job.end()
        assert -9 in codes and set(codes) <= {-9, PEER_HAS_DIED}, codes
        begun = max(int(number) for what, number in heard if what == b"begun")
        done = max([newest, *(int(number) for what, number in heard if what == b"done")])
        if done > last:
            seconds = 0.7 * seconds + 0.3 * (time.monotonic() - start) / (begun - last)
        newest = found = read(directory)
        assert done <= found <= begun, f"{found} was found where {done} was done and {begun} begun"
        for tag in complete_tags(directory):
            read(directory, tag)
        outcomes.add(len(left_in(directory)))
        last = begun
    assert kills < 20 or len(outcomes) > 2, f"kills came at few moments only: they left {outcomes} files"
    assert Job(SIZE, save_on_and_on(directory, last + 1, last + 1, async_save)).end() == [0] * SIZE
    assert read(directory) == last + 1
    assert not left_in(directory)


def left_in(directory: Path) -> list[Path]:
    """What is there and belongs to no checkpoint."""
    left = [path for path in directory.iterdir() if path.name not in (".claimed", "latest", "zero_to_fp32.py")]
    for tag in complete_tags(directory):
        left.remove(directory / tag)
        named = {"manifest.json", *(file.name for file in read_manifest(directory / tag).files)}
        left += [path for path in (directory / tag).iterdir() if path.name not in named]
    return [path for each in left for path in (each.iterdir() if each.is_dir() else [each])]


WAYS = pytest.mark.parametrize("alone", [False, True], ids=["all", "one"])
MODES = pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])


@pytest.fixture(autouse=True)
def many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small checkpoints of many writes, and no patience with a rank that has died."""
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr("shardwise.checkpoint.manifest.BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(saving, "PATIENCE_SECONDS", 0.3)
    torch.set_num_threads(1)  # forks have no others


@WAYS
@MODES
def test_kills_at_random(tmp_path: Path, async_save: bool, alone: bool) -> None:
    print(f"seed {SEED}")
    assert_survives(tmp_path, 5, async_save, alone, SEED)


@pytest.mark.slow
@WAYS
@MODES
def test_two_hundred_kills_at_random(tmp_path: Path, async_save: bool, alone: bool) -> None:
    print(f"seed {SEED}")
    assert_survives(tmp_path, 50, async_save, alone, SEED)
