"""Sharding only moves data: in fp32 every stage gives the bits of one process, and of DDP with an ordered sum."""

from __future__ import annotations

import dataclasses

import pytest

from tests.grids import grid
from tests.references import GPT, MLP, WIDE, Recipe, assert_same, train_with_ddp
from tests.world.engine_runs import STAGES, config_of, equals_reference, reference_of, stages_agree
from tests.worlds import World


def ordered_ddp_equals_reference(recipe: Recipe) -> None:
    assert_same(train_with_ddp(recipe), reference_of(recipe, "once"), "ordered DDP against one process")


@pytest.mark.parametrize(
    ("world", "stage"),
    grid([1, 2, 3, 4], STAGES, quick=[(1, 3), *((2, stage) for stage in STAGES), (4, 3)]),
    indirect=["world"],
)
def test_twenty_steps_of_a_wide_model(world: World, stage: int) -> None:
    world.run(equals_reference, WIDE, config_of(stage))


@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)], indirect=True)
def test_twenty_steps_of_ordered_ddp(world: World) -> None:
    world.run(ordered_ddp_equals_reference, WIDE)


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", [MLP, GPT], ids=["mlp", "gpt"])
def test_other_shapes(world: World, stage: int, recipe: Recipe) -> None:
    world.run(equals_reference, recipe, config_of(stage))


@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_stages_agree_under_clipping(world: World) -> None:
    world.run(stages_agree, dataclasses.replace(GPT, steps=6), gradient_clipping=0.5)
