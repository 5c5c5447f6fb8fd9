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
