"""Ranks that take different branches of one shape: the right result, or one error that names units and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shardwise.errors import StateError
from tests import models
from tests.references import Recipe, adamw_in_two_groups, assert_same
from tests.world.engine_runs import config_of, equals_reference, open_engine, rank, reference_of, run_steps
from tests.world.test_unused_parameters import Choice, with_choice
from tests.worlds import World

TRANSPORTS = ["process_group", "shared_memory"]


def one_branch_a_rank(index: int, of_rank: int) -> Choice:
    return *models.vectors(index, of_rank), "a" if of_rank == 0 else "b"


def apart_in_the_second_step(index: int, of_rank: int) -> Choice:
    return *models.vectors(index, of_rank), "a" if of_rank == 0 or index != 1 else "b"


def branch_a_on_one_rank_only(index: int, of_rank: int) -> Choice:
    return *models.vectors(index, of_rank), "both" if of_rank == 0 else "none"


RECIPES = {
    batch.__name__: Recipe(models.build_branches, batch, with_choice, adamw_in_two_groups)
    for batch in (one_branch_a_rank, apart_in_the_second_step, branch_a_on_one_rank_only)
}
NAMED = {
    "one_branch_a_rank": ("branch_a", "branch_b"),
    "apart_in_the_second_step": ("branch_a", "branch_b"),
    "branch_a_on_one_rank_only": ("branch_a",),
}


def diverge(recipe: Recipe, config: dict[str, Any]) -> str:
    """Train apart. The right result is "right"; a StateError goes up; anything else fails here."""
    reference = reference_of(recipe, "once")
    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), config) as engine:
        record = run_steps(recipe, engine)
    assert_same(record, reference, "ranks in different branches")
    return "right"


def look_at_both_branches(config: dict[str, Any]) -> torch.Tensor:
    """Forward alone, without gradients: each rank its own branch."""
    model = models.build_branches()
    with open_engine(model, adamw_in_two_groups(model), config) as engine, torch.no_grad():
        output = engine(models.vectors(0, 0)[0], "a" if rank() == 0 else "b")
        assert isinstance(output, torch.Tensor)
        return output.clone()


def assert_right_or_loud(failures: list[Any], units: tuple[str, ...]) -> None:
    """No failure at all, or a StateError on every rank; at least one of them names the units and both ranks."""
    if failures == [None, None]:
        return
    for failure in failures:
        assert failure is not None, "one rank went on while the other stopped"
        assert isinstance(failure.exception, StateError), failure.traceback
        assert len(failure.message.splitlines()) <= 8, failure.message
    told = [failure.message for failure in failures]
    assert any(
        all(unit in message for unit in units) and "rank 0" in message and "rank 1" in message for message in told
    ), told


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_whole_parameters_are_right(world2: World, stage: int, name: str) -> None:
    """Nothing is gathered in forward here: every rank finds its parameters, and the mean counts zeros."""
    for transport in TRANSPORTS:
        world2.run(equals_reference, RECIPES[name], config_of(stage, shardwise={"transport": transport}))


@pytest.mark.parametrize("check", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "check_collectives"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", RECIPES)
def test_sharded_parameters_are_right_or_loud(
    own_world: Callable[..., World], name: str, transport: str, check: bool
) -> None:
    config = config_of(3, shardwise={"transport": transport, "check_collectives": check})
    assert_right_or_loud(own_world(2).run_expecting_errors(diverge, RECIPES[name], config), NAMED[name])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_forward_alone_is_right_or_loud(own_world: Callable[..., World], transport: str) -> None:
    world, config = own_world(2), config_of(3, shardwise={"transport": transport})
    failures = world.run_expecting_errors(look_at_both_branches, config)
    assert_right_or_loud(failures, ("branch_a", "branch_b"))
    if failures == [None, None]:
        model = models.build_branches()
        inputs = models.vectors(0, 0)[0]
        for output, branch in zip(world.run(look_at_both_branches, config), "ab", strict=True):
            assert torch.equal(output, model(inputs, branch))
