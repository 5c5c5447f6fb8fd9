"""Blocks recomputed inside backward: the second forward must find whole weights and end no unit's backward."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from tests import models
from tests.models import Checkpointing
from tests.references import GPT, MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World

MODES: tuple[Checkpointing, ...] = ("non_reentrant", "reentrant", "one_region")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_blocks(world2: World, mode: Checkpointing, stage: int) -> None:
    recipe = dataclasses.replace(GPT, model=functools.partial(models.build_gpt, checkpointing=mode), accumulation=2)
    world2.run(equals_reference, recipe, config_of(stage, accumulation=2))


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_blocks_over_messages(world3: World, mode: Checkpointing) -> None:
    recipe = dataclasses.replace(MLP, model=functools.partial(models.build_mlp, checkpointing=mode))
    world3.run(equals_reference, recipe, config_of(3, shardwise={"transport": "process_group"}))


@pytest.mark.parametrize("mode", MODES)
def test_a_shared_block_that_is_recomputed(world2: World, mode: Checkpointing) -> None:
    model = functools.partial(models.build_gpt, shared_block=True, checkpointing=mode)
    world2.run(equals_reference, dataclasses.replace(GPT, model=model), config_of(3))
