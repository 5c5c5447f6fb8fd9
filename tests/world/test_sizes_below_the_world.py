"""Parameters, and whole units, with fewer elements than there are ranks: some ranks own nothing."""

from __future__ import annotations

import dataclasses

import pytest

from tests import models
from tests.references import MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World

RECIPE = dataclasses.replace(MLP, model=models.build_crumbs, accumulation=2)


@pytest.mark.parametrize("world", [2, 3, 4], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_crumbs(world: World, stage: int) -> None:
    world.run(equals_reference, RECIPE, config_of(stage, accumulation=2))


@pytest.mark.parametrize("stage", STAGES)
def test_crumbs_over_messages(world4: World, stage: int) -> None:
    world4.run(equals_reference, RECIPE, config_of(stage, accumulation=2, shardwise={"transport": "process_group"}))
