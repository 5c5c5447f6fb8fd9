"""A collective that some ranks do not enter is an error in seconds that names the ranks; a late rank is awaited."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shardwise import operations, roll_call
from shardwise.errors import CollectiveError
from shardwise.process import PartialState
from tests.scripts import run_on_ranks
from tests.worlds import World

both = pytest.mark.parametrize("world", [2, 3], indirect=True)


@contextmanager
def impatient(seconds: float = 0.2) -> Iterator[PartialState]:
    PartialState._reset_state()
    before = roll_call.PATIENCE_SECONDS, roll_call.LOOK_AGAIN_SECONDS
    roll_call.PATIENCE_SECONDS, roll_call.LOOK_AGAIN_SECONDS = seconds, 0.05
    try:
        yield PartialState(cpu=True)
    finally:
        roll_call.PATIENCE_SECONDS, roll_call.LOOK_AGAIN_SECONDS = before


def meet_elsewhere() -> None:
    with impatient() as state:
        state.wait_for_everyone()
        if state.is_main_process:
            operations.gather(torch.ones(2))
        else:
            state.wait_for_everyone()


def gather_in_main_process_first() -> None:
    with impatient() as state, state.main_process_first():
        if state.is_main_process:
            operations.gather(torch.ones(2))


def leave_early() -> None:
    with impatient() as state:
        if state.is_last_process:
            roll_call.leave()  # what happens at the end of its script
        else:
            operations.broadcast(torch.ones(2))


def train_on() -> None:
    """The first process alone gathers; the others are in their next step already and wait there."""
    with impatient() as state:
        roll_call.passed_step()
        state.wait_for_everyone()
        if state.is_main_process:
            operations.gather_object([1])
        else:
            roll_call.passed_step()


def come_late() -> list[float]:
    """All are in one step before they meet: who has begun it first is not to blame."""
    with impatient(0.05) as state:
        for late in range(state.num_processes):
            if state.process_index == late:
                time.sleep(0.3)
            roll_call.passed_step()
            gathered = operations.gather(torch.tensor(float(late)))
        return gathered.tolist()


def stay_away(timeout_seconds: float) -> None:
    store = dist.distributed_c10d._get_default_store()
    with impatient() as state:
        try:
            if state.is_main_process:
                operations.reduce(torch.ones(2))
            else:
                store.wait(["given up"], timedelta(seconds=60))
        finally:
            store.set("given up", "")


def meet_often() -> int:
    """Two errors that all ranks catch spoil nothing; old keys are forgotten."""
    store = dist.distributed_c10d._get_default_store()
    with impatient() as state:
        state.wait_for_everyone()
        before = store.num_keys()
        for _ in range(2):
            with pytest.raises(CollectiveError):
                operations.gather(torch.ones(2 + state.process_index))
            # They caught it one after the other: the first to come must not take the others for gone.
            assert operations.gather(torch.ones(1)).numel() == state.num_processes
        for _ in range(100):
            state.wait_for_everyone()
        return int(store.num_keys()) - before


def assert_told(
    world: World, case: Callable[..., None], told: dict[int, tuple[str, ...]], reusable: bool = False
) -> None:
    """``reusable``: every rank has answered as many roll calls as the others."""
    failures = world.run_expecting_errors(case, reusable=reusable)
    for rank, words in told.items():
        failure = failures[rank]
        assert failure is not None, f"rank {rank} went on"
        assert isinstance(failure.exception, CollectiveError), failure.traceback
        assert all(word in failure.message for word in words), failure.message
        assert "all ranks" in failure.message and len(failure.message.splitlines()) == 1


@both
def test_another_collective(world: World) -> None:
    others = dict.fromkeys(range(1, world.size), ("is in wait_for_everyone", "rank 0 is in gather of float32[2]"))
    # Rank 0 names those that it met there by then: all of them, or the first that came.
    assert_told(world, meet_elsewhere, {0: ("rank 0 is in gather", "is in wait_for_everyone")} | others, True)


def test_a_collective_while_one_goes_first(world2: World) -> None:
    assert_told(world2, gather_in_main_process_first, {0: ("main_process_first",), 1: ("gather",)}, True)


@both
def test_a_slow_rank_is_no_absent_one(world: World) -> None:
    assert world.run(come_late) == [[float(world.size - 1)] * world.size] * world.size


@both
def test_many_roll_calls_leave_a_handful_of_keys(world: World) -> None:
    assert all(keys < 12 * world.size for keys in world.run(meet_often))


def test_a_rank_that_has_left(own_world: Callable[..., World]) -> None:
    assert_told(own_world(3), leave_early, {rank: ("broadcast", "rank 2 has left its script") for rank in (0, 1)})


def test_a_rank_that_trains_on(own_world: Callable[..., World]) -> None:
    assert_told(own_world(2), train_on, {0: ("gather_object", "rank 1 has begun step")})


def test_a_rank_that_never_comes(own_world: Callable[..., World]) -> None:
    failures = own_world(2, timeout_seconds=2.0).run_expecting_errors(stay_away, 2.0)
    assert failures[1] is None, failures[1]
    assert failures[0] is not None and isinstance(failures[0].exception, CollectiveError)
    assert "rank 1 did not come" in failures[0].message and "reduce (mean)" in failures[0].message


SCRIPT = """
import sys
from shardwise.process import PartialState
state = PartialState(cpu=True)
state.wait_for_everyone()
if state.process_index == int(sys.argv[1]):
    state.wait_for_everyone()
"""


@pytest.mark.parametrize("alone", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_end_of_a_real_script(alone: int) -> None:
    """Also where the rank that ends is the one that keeps the store."""
    ranks = run_on_ranks(2, SCRIPT, str(alone))
    assert ranks[1 - alone].returncode == 0, ranks[1 - alone].stderr
    assert ranks[alone].returncode == 1
    told = ranks[alone].stderr
    assert "CollectiveError" in told and "wait_for_everyone" in told, told
    assert "has left its script" in told or "has ended" in told, told
