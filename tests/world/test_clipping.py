"""Clipping uses the norm over all parameters of all ranks, the same on each rank; off means off."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.references import MLP
from tests.world.engine_runs import STAGES, config_of, near_reference, train_with_engine
from tests.worlds import World

LIMIT = 0.1


def norms_of_a_run(stage: int, gradient_clipping: float) -> list[float]:
    return train_with_engine(MLP, config_of(stage, gradient_clipping=gradient_clipping)).norms


@pytest.mark.parametrize("world", [1, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_clipped_training_follows_clip_grad_norm(world: World, stage: int) -> None:
    recipe = dataclasses.replace(MLP, clip=LIMIT)
    world.run(near_reference, recipe, config_of(stage, gradient_clipping=LIMIT), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_sees_one_norm_from_before_the_clipping(world2: World, stage: int) -> None:
    first, second = world2.run(norms_of_a_run, stage, LIMIT)
    assert first == second
    assert all(norm > LIMIT for norm in first), "the limit should have acted in this run"


@pytest.mark.parametrize("stage", STAGES)
def test_without_clipping_the_norm_is_reported_all_the_same(world2: World, stage: int) -> None:
    world2.run(near_reference, MLP, config_of(stage), rtol=2e-5, atol=1e-6)


def test_the_limit_changes_the_run(world2: World) -> None:
    free, clipped = world2.run(norms_of_a_run, 3, 0.0)[0], world2.run(norms_of_a_run, 3, LIMIT)[0]
    assert free[0] == pytest.approx(clipped[0])
    assert not torch.equal(torch.tensor(free[1:]), torch.tensor(clipped[1:]))
