"""init_distributed joins the world that the environment describes, once; without one there is a single process."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

import shardwise
from shardwise.errors import ConfigError
from tests.references import MLP
from tests.scripts import run_on_ranks
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World


def join_twice() -> tuple[int, int, str]:
    shardwise.init_distributed(timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    shardwise.init_distributed()
    assert dist.group.WORLD is group
    found = dist.get_rank(), dist.get_world_size(), dist.get_backend()
    dist.destroy_process_group()
    return found


def without_an_environment() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    saved = {name: os.environ.pop(name) for name in names}
    try:
        shardwise.init_distributed()
        assert not dist.is_initialized()
        for stage in STAGES:
            equals_reference(MLP, config_of(stage))
        os.environ["RANK"] = "0"
        with pytest.raises(ConfigError, match="MASTER_ADDR"):
            shardwise.init_distributed()
    finally:
        os.environ.update(saved)


def test_joining(own_world: Callable[..., World]) -> None:
    assert own_world(2, process_group=False).run(join_twice) == [(0, 2, "gloo"), (1, 2, "gloo")]


def test_a_single_process(own_world: Callable[..., World]) -> None:
    own_world(1, process_group=False).run(without_an_environment)


LIFE = """
import gc, torch, torch.distributed as dist, shardwise
from pathlib import Path
def gloo_threads():
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())
shardwise.init_distributed()
model = torch.nn.Linear(3, 5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # the first one of the process
engine, *_ = shardwise.initialize(model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1})
engine.backward(engine(torch.ones(1, 3)).sum())
engine.step()
engine.close()
assert gloo_threads() > 0
dist.destroy_process_group()
del engine, _
gc.collect()
assert gloo_threads() == 0, "the group was kept"
print("left")
"""


def test_a_group_that_was_ended_leaves_no_thread_behind() -> None:
    """One that still runs at the process's exit may abort it."""
    for rank in run_on_ranks(2, LIFE):
        assert (rank.returncode, rank.stdout) == (0, "left\n"), rank.stderr


END = """
import atexit, torch, torch.distributed as dist, shardwise
from pathlib import Path
def gloo_threads():
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())
atexit.register(lambda: print("left with", gloo_threads()))  # the first to be registered is the last to run
def main():
    shardwise.init_distributed()
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = shardwise.initialize(model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1})
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    assert gloo_threads() > 0
"""


@pytest.mark.parametrize("last_words", ["", pytest.param("    dist.destroy_process_group()\n", marks=pytest.mark.slow)])
def test_a_script_that_ends_takes_the_groups_threads_along(last_words: str) -> None:
    """Its engine was never closed, and the group was ended under it, or not at all."""
    for rank in run_on_ranks(2, f"{END}{last_words}main()\n"):
        assert (rank.returncode, rank.stdout) == (0, "left with 0\n"), rank.stderr
