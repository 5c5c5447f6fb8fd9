"""Optimizers that need whole matrices: right in stages 0, 1, 2, refused with the reason in stage 3."""

from __future__ import annotations

import dataclasses

import pytest

from shardwise.errors import ConfigError
from tests import models
from tests.optimizers import Maker, maker
from tests.references import MLP, Recipe
from tests.world.engine_runs import config_of, equals_reference, train_with_engine
from tests.worlds import World

WHOLE_MATRIX = [
    (maker("Lamb"), models.build_mlp),
    (maker("Adafactor", lr=1e-2), models.build_mlp),
    (maker("Muon", lr=1e-2), models.build_matrices),
]
RECIPES = {
    str(optimizer): dataclasses.replace(MLP, model=model, optimizer=optimizer) for optimizer, model in WHOLE_MATRIX
}


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_owner_steps_whole_matrices(world: World, recipe: Recipe, stage: int) -> None:
    world.run(equals_reference, recipe, config_of(stage))


@pytest.mark.parametrize("stage", [1, 2])
def test_more_ranks_than_most_units_have_matrices(world4: World, stage: int) -> None:
    recipe = RECIPES[str(maker("Lamb"))]
    world4.run(equals_reference, dataclasses.replace(recipe, accumulation=2), config_of(stage, accumulation=2))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_stage_3_refuses_and_says_which_stage_does_it(world2: World, recipe: Recipe) -> None:
    for failure in world2.run_expecting_errors(train_with_engine, recipe, config_of(3), reusable=True):
        assert failure is not None
        assert isinstance(failure.exception, ConfigError)
        assert isinstance(recipe.optimizer, Maker)
        assert recipe.optimizer.name in failure.message
        assert "stage 3" in failure.message
        assert "2" in failure.message
        assert len(failure.message.splitlines()) <= 6
