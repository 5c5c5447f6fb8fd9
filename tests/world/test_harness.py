"""The harness itself: results, errors, deaths, hangs and leaks of real ranks all reach the test."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks import Census
from tests.worlds import CaseError, HungError, LeakError, World


def sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), total


def identity() -> tuple[int, str, str, str, int]:
    return (
        os.getpid(),
        os.environ["RANK"],
        os.environ["LOCAL_RANK"],
        os.environ["WORLD_SIZE"],
        torch.get_num_threads(),
    )


def random_numbers() -> torch.Tensor:
    return torch.rand(3)


def fail_on(rank: int) -> str:
    if dist.get_rank() == rank:
        raise ValueError(f"a fault on purpose, rank {rank}")
    return "well"


def fail_while_others_wait(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("left the others waiting")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def hang_on_purpose() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def leak_a_group() -> None:
    dist.new_group([0, 1])


def is_initialised() -> bool:
    return dist.is_initialized()


@pytest.mark.parametrize("world", [1, 2, 3, 4], indirect=True)
def test_every_rank_answers_in_rank_order(world: World) -> None:
    results = world.run(sum_of_ranks, 10)
    assert [rank for rank, _ in results] == list(range(world.size))
    expected = float(sum(range(world.size)) + 10 * world.size)
    assert all(total.item() == expected for _, total in results)


def test_processes_are_reused_and_know_who_they_are(world2: World) -> None:
    first = world2.run(identity)
    second = world2.run(identity)
    assert first == second
    assert [entry[0] for entry in first] == world2.process_ids
    assert [entry[1:] for entry in first] == [("0", "0", "2", 1), ("1", "1", "2", 1)]


def test_every_case_starts_from_the_same_seed(world2: World) -> None:
    first, second = world2.run(random_numbers), world2.run(random_numbers)
    assert torch.equal(first[0], second[1])


def test_an_exception_comes_back_with_rank_and_traceback(own_world: Callable[..., World]) -> None:
    world = own_world(2)
    with pytest.raises(CaseError, match="failed on rank 1 of 2") as caught:
        world.run(fail_on, 1)
    assert "a fault on purpose, rank 1" in str(caught.value)
    assert "in fail_on" in str(caught.value)
    assert [failure.rank for failure in caught.value.failures] == [1]
    assert world.run(sum_of_ranks, 0)[0][1].item() == 1.0


def test_expected_errors_are_results_and_a_reusable_world_is_kept(world2: World) -> None:
    before = world2.run(identity)
    failures = world2.run_expecting_errors(fail_on, 0, reusable=True)
    assert failures[0] is not None
    assert failures[1] is None
    assert isinstance(failures[0].exception, ValueError)
    assert str(failures[0]) == "ValueError: a fault on purpose, rank 0"
    assert world2.run(identity) == before


def test_unequal_numbers_of_collectives_end_the_world(own_world: Callable[..., World]) -> None:
    world = own_world(2, timeout_seconds=2.0)
    before = world.run(identity)
    failures = world.run_expecting_errors(fail_while_others_wait, 0, reusable=True)
    assert failures[0] is not None
    assert failures[1] is not None, "the barrier of rank 1 should have timed out"
    assert world.run(identity) != before


def test_a_dead_rank_is_named_with_its_last_output(own_world: Callable[..., World]) -> None:
    world = own_world(2)
    with pytest.raises(CaseError, match=r"(?s)rank 1 of 2.*exit code -9.*last words"):
        world.run(die_on, 1)
    assert len(world.run(sum_of_ranks, 0)) == 2


def test_a_hung_rank_shows_its_stack_and_is_ended(own_world: Callable[..., World]) -> None:
    world = own_world(2, hang_seconds=60.0)
    world.run(identity)
    processes = [psutil.Process(pid) for pid in world.process_ids]
    object.__setattr__(world.settings, "hang_seconds", 3.0)  # the start above may take longer on a busy machine
    with pytest.raises(HungError, match=r"(?s)rank 1 of 2 did not answer.*hang_on_purpose"):
        world.run(hang_on_purpose)
    assert not any(process.is_running() for process in processes)


def test_a_leak_fails_the_case(own_world: Callable[..., World]) -> None:
    world = own_world(2)
    with pytest.raises(LeakError, match=r"leak_a_group left something behind\nrank 0: process group left behind"):
        world.run(leak_a_group)


def test_the_census_sees_a_thread() -> None:
    before, done = Census.take(), threading.Event()
    thread = threading.Thread(target=done.wait, name="forgotten")
    thread.start()
    leaks = Census.take().leaks_since(before)
    done.set()
    thread.join()
    assert leaks == (f"thread left running: forgotten ({thread.ident})",)
    assert Census.take().leaks_since(before) == ()


def test_the_census_sees_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Census.take()
    monkeypatch.setenv("FORGOTTEN_VARIABLE", "1")
    assert Census.take().leaks_since(before) == ("environment changed: FORGOTTEN_VARIABLE",)


def test_the_census_sees_shared_memory() -> None:
    before = Census.take()
    block = SharedMemory(create=True, size=4096)
    leaks = Census.take().leaks_since(before)
    block.close()
    block.unlink()
    assert leaks
    assert all(leak.startswith(f"shared memory still held: /dev/shm/{block.name}") for leak in leaks)
    assert Census.take().leaks_since(before) == ()


def test_the_census_sees_a_global_of_torch() -> None:
    before = Census.take()
    with torch.no_grad():
        leaks = Census.take().leaks_since(before)
    assert leaks == ("torch state changed: grad mode=False",)


def test_a_world_without_a_process_group(own_world: Callable[..., World]) -> None:
    assert own_world(1, process_group=False).run(is_initialised) == [False]
