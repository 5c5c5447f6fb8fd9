"""Tied weights: one parameter under several names, also where the names belong to different units."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from tests import models
from tests.references import GPT, MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference, open_engine
from tests.worlds import World


@pytest.mark.parametrize("stage", STAGES)
def test_head_tied_to_the_embedding(world2: World, stage: int) -> None:
    world2.run(equals_reference, GPT, config_of(stage))


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_weights_tied_across_units(world: World, stage: int) -> None:
    world.run(equals_reference, dataclasses.replace(MLP, model=models.build_half_tied), config_of(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_one_module_in_two_places(world2: World, stage: int) -> None:
    model = functools.partial(models.build_gpt, shared_block=True)
    world2.run(equals_reference, dataclasses.replace(GPT, model=model), config_of(stage))


def ties_of(stage: int) -> list[bool]:
    model: Any = models.build_gpt()
    with open_engine(model, GPT.optimizer(model), config_of(stage)) as engine:
        inside = engine.module.head.weight is engine.module.token.weight
        state = engine.state_dict()
        return [inside, bool((state["head.weight"] == state["token.weight"]).all())]


@pytest.mark.parametrize("stage", STAGES)
def test_the_tie_survives_in_the_module_and_in_the_state_dict(world2: World, stage: int) -> None:
    assert world2.run(ties_of, stage) == [[True, True], [True, True]]
