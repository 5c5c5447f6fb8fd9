"""Parameters without a gradient: passed by where no rank has one, zeros of a rank where only that rank has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests import models
from tests.references import Recipe, adamw_in_two_groups, assert_same, train_with_ddp
from tests.world.engine_runs import STAGES, config_of, equals_reference, reference_of
from tests.worlds import World

Choice = tuple[Tensor, Tensor, str]


def with_choice(model: Any, batch: Choice) -> Tensor:
    inputs, targets, choice = batch
    return F.mse_loss(model(inputs, choice), targets)


def same_branch_on_all_ranks(index: int, rank: int) -> Choice:
    return *models.vectors(index, rank), ("a", "none", "b", "both")[index % 4]


def parts_unused_everywhere(index: int, rank: int) -> Choice:
    return *models.vectors(index, rank), ("...", "x..", "..x", "xxx")[index % 4]


def parts_unused_on_some_ranks(index: int, rank: int) -> Choice:
    on_rank_zero, on_the_others = (("x..", "..x"), ("xxx", "..."), ("...", "x.x"), (".x.", ".x."))[index % 4]
    return *models.vectors(index, rank), on_rank_zero if rank == 0 else on_the_others


def output_thrown_away(model: Any, batch: models.Batch) -> Tensor:
    """A whole forward whose result the loss does not use, then one that it does."""
    inputs, targets = batch
    model(inputs + 1.0, "both")
    return F.mse_loss(model(inputs, "a"), targets)


def ddp_agrees(recipe: Recipe) -> None:
    record = train_with_ddp(recipe, find_unused_parameters=True)
    assert_same(record, reference_of(recipe, "once"), "DDP(find_unused_parameters=True) against one process")


def branches(batch: Any, accumulation: int = 1, steps: int = 4) -> Recipe:
    return Recipe(models.build_branches, batch, with_choice, adamw_in_two_groups, steps, accumulation)


def parts(batch: Any, accumulation: int = 1, steps: int = 4) -> Recipe:
    return Recipe(models.build_optional, batch, with_choice, adamw_in_two_groups, steps, accumulation)


RECIPES = {
    "a whole unit, on all ranks": branches(same_branch_on_all_ranks),
    "part of a unit, on all ranks": parts(parts_unused_everywhere),
    "part of a unit, on some ranks": parts(parts_unused_on_some_ranks),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_reference_is_what_ddp_does(world2: World, recipe: Recipe) -> None:
    world2.run(ddp_agrees, recipe)


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("stage", STAGES)
def test_unused(world: World, recipe: Recipe, stage: int) -> None:
    world.run(equals_reference, recipe, config_of(stage))


@pytest.mark.parametrize(
    "recipe",
    [branches(same_branch_on_all_ranks, accumulation=2, steps=3), parts(parts_unused_on_some_ranks, 2, steps=3)],
    ids=["unit", "part"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_unused_in_one_micro_batch_only(world2: World, recipe: Recipe, stage: int) -> None:
    world2.run(equals_reference, recipe, config_of(stage, accumulation=2))


@pytest.mark.parametrize("stage", STAGES)
def test_a_forward_whose_output_is_thrown_away(world2: World, stage: int) -> None:
    recipe = Recipe(models.build_branches, models.vectors, output_thrown_away, adamw_in_two_groups)
    world2.run(equals_reference, recipe, config_of(stage))
