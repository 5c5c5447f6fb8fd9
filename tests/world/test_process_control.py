"""Who is first, who is last, who waits for whom: the control that a script has over its processes."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwise import random
from shardwise.errors import ConfigError
from shardwise.logging import get_logger
from shardwise.memory import find_executable_batch_size
from shardwise.process import DistributedType, PartialState
from tests.worlds import World

both = pytest.mark.parametrize("world", [2, 3], indirect=True)


def open_state() -> PartialState:
    PartialState._reset_state()
    return PartialState(cpu=True)


def facts() -> tuple[Any, ...]:
    state = open_state()
    assert state.distributed_type is DistributedType.MULTI_CPU
    with pytest.raises(ConfigError, match="gloo already"):
        PartialState(backend="nccl")
    return repr(state), state.is_main_process, state.is_local_main_process, state.is_last_process


def run_on_one() -> dict[str, Any]:
    state = open_state()

    @state.on_process(process_index=1)
    def second() -> int:
        return state.process_index

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        state.print("from", state.process_index)
    return {
        "main": state.on_main_process(lambda: state.process_index)(),
        "local main": state.on_local_main_process(lambda: state.process_index)(),
        "last": state.on_last_process(lambda: state.process_index)(),
        "second": second(),
        "local second": state.on_local_process(lambda: state.process_index, local_process_index=1)(),
        "printed": printed.getvalue(),
    }


def write_in_turn(directory: str) -> list[bool]:
    """The first process is slow; each says what it finds when it enters the block."""
    state = open_state()
    found = []
    for name, first in (("all", state.main_process_first()), ("local", state.local_main_process_first())):
        file = Path(directory) / name
        with first:
            found.append(file.exists())
            if state.is_main_process:
                time.sleep(0.2)
                file.touch()
    return found


def wait_for_the_slowest(directory: str) -> int:
    state = open_state()
    time.sleep(0.1 * state.process_index)
    (Path(directory) / str(state.process_index)).touch()
    state.wait_for_everyone()
    return len(list(Path(directory).iterdir()))


def split_prompts() -> list[str]:
    state = open_state()
    with state.split_between_processes(list("abcd"), apply_padding=True) as mine:
        assert isinstance(mine, list)
        return mine


def draw() -> dict[str, float]:
    """Each process starts from numbers of its own."""
    rank = open_state().process_index
    generator = torch.Generator().manual_seed(rank)
    random.set_seed(3, device_specific=True)
    own = torch.rand(1).item()
    random.synchronize_rng_states(["torch", random.RNGType.GENERATOR], generator)
    return {"own": own, "torch": torch.rand(1).item(), "generator": torch.rand(1, generator=generator).item()}


def log_in_order(path: str) -> None:
    state = open_state()
    handler = logging.FileHandler(path)
    logger = get_logger("tests.process_control", log_level="INFO")
    logger.logger.addHandler(handler)
    time.sleep(0.05 * (state.num_processes - state.process_index))  # without turns the last would be the first
    try:
        logger.info("rank %d", state.process_index, in_order=True)
        logger.info("main %d", state.process_index)
        state.wait_for_everyone()
        logger.warning("all", main_process_only=False)
    finally:
        logger.logger.removeHandler(handler)
        handler.close()


def shrink_together() -> int:
    open_state()

    def train(batch_size: int) -> int:
        if batch_size > 8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return batch_size

    size = find_executable_batch_size(train, starting_batch_size=10)()
    assert isinstance(size, int)
    return size


def make_and_destroy() -> tuple[str, bool]:
    PartialState._reset_state()
    state = PartialState(cpu=True, backend="gloo", timeout=timedelta(seconds=30))
    state.wait_for_everyone()
    told = repr(state).splitlines()[0]
    state.destroy_process_group()
    PartialState._reset_state()
    return told, dist.is_initialized()


@both
def test_the_facts(world: World) -> None:
    for rank, (text, is_main, is_local_main, is_last) in enumerate(world.run(facts)):
        assert text == (
            f"Distributed environment: MULTI_CPU  Backend: gloo\nNum processes: {world.size}\n"
            f"Process index: {rank}\nLocal process index: {rank}\nDevice: cpu\n"
        )
        assert is_main is is_local_main is (rank == 0)
        assert is_last is (rank == world.size - 1)


def test_a_function_runs_where_it_is_asked_to(world3: World) -> None:
    results = world3.run(run_on_one)
    assert [r["main"] for r in results] == [r["local main"] for r in results] == [0, None, None]
    assert [r["last"] for r in results] == [None, None, 2]
    assert [r["second"] for r in results] == [r["local second"] for r in results] == [None, 1, None]
    assert [r["printed"] for r in results] == ["from 0\n", "", ""]


@both
def test_the_first_process_goes_first(world: World, tmp_path: Path) -> None:
    assert world.run(write_in_turn, str(tmp_path)) == [[False] * 2] + [[True] * 2] * (world.size - 1)


@both
def test_everyone_is_waited_for(world: World, tmp_path: Path) -> None:
    assert world.run(wait_for_the_slowest, str(tmp_path)) == [world.size] * world.size


def test_every_process_gets_its_share(world3: World) -> None:
    assert world3.run(split_prompts) == [["a", "b"], ["c", "c"], ["d", "d"]]


@both
def test_generators_agree_after_synchronisation(world: World) -> None:
    results = world.run(draw)
    assert len({r["own"] for r in results}) == world.size
    assert len({r["torch"] for r in results}) == len({r["generator"] for r in results}) == 1
    assert results[0]["generator"] == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()


def test_processes_log_in_order(world3: World, tmp_path: Path) -> None:
    world3.run(log_in_order, str(tmp_path / "log"))
    assert (tmp_path / "log").read_text().split("\n") == ["rank 0", "rank 1", "rank 2", "main 0", *["all"] * 3, ""]


def test_all_processes_find_one_batch_size(world2: World) -> None:
    assert world2.run(shrink_together) == [8, 8]


def test_the_state_makes_the_group_and_ends_it(own_world: Callable[..., World]) -> None:
    world = own_world(2, process_group=False)
    assert world.run(make_and_destroy) == [("Distributed environment: MULTI_CPU  Backend: gloo", False)] * 2
