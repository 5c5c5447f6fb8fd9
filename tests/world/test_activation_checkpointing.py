"""Blocks recomputed inside backward: the second forward must find whole weights and end no unit's backward."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from tests import models
from tests.models import Checkpointing
from tests.optimizers import maker
from tests.references import GPT, MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference, near_reference, stages_agree
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


@pytest.mark.parametrize("mode", ["non_reentrant", "one_region"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_shared_block_that_is_recomputed(world2: World, mode: Checkpointing, stage: int) -> None:
    model = functools.partial(models.build_gpt, shared_block=True, checkpointing=mode)
    world2.run(equals_reference, dataclasses.replace(GPT, model=model), config_of(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_shared_block_in_two_reentrant_regions(world2: World, stage: int) -> None:
    """Each region is a backward of its own inside the backward, so the block's gradient comes, and may travel, twice.

    Two means added are not the mean of the sum to the last bit. With plain SGD a rounding stays a rounding.
    """
    model = functools.partial(models.build_gpt, shared_block=True, checkpointing="reentrant")
    recipe = dataclasses.replace(GPT, model=model, optimizer=maker("SGD"))
    world2.run(near_reference, recipe, config_of(stage), rtol=1e-5, atol=1e-6)


def test_stages_agree_on_a_shared_block_in_two_reentrant_regions(world2: World) -> None:
    model = functools.partial(models.build_gpt, shared_block=True, checkpointing="reentrant")
    world2.run(stages_agree, dataclasses.replace(GPT, model=model))
