"""kill -9 at any instant of a save, of all ranks or of one: the newest complete checkpoint is there, bit for bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwise.checkpoint.manifest import complete_tags
from shardwise.checkpoint.save import Background, Place, save
from tests.linked_processes import PEER_HAS_DIED, Job, Star
from tests.shared_saves import KEPT, SIZE, content_of, left_in, many_calls, read

__all__ = ["many_calls"]

TAGS = 4
SEED = time.time_ns() % 10**6  # printed; another one each time
pytestmark = pytest.mark.usefixtures("many_calls")


def save_on_and_on(directory: Path, first: int, last: int | None, async_save: bool) -> Callable[..., None]:
    """What each rank does: save after save, each under one of few tags; rank 0 says what has begun and what is done."""

    def work(star: Star, say: Callable[[bytes], None]) -> None:
        background, number = Background(), first
        while last is None or number <= last:
            content = content_of(number, star.rank)
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


WAYS = pytest.mark.parametrize("alone", [False, True], ids=["all", "one"])
MODES = pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])


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
