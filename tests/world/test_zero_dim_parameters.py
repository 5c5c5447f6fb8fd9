"""0-dim parameters: a learned temperature, a gate a block, and a model that has nothing else."""

from __future__ import annotations

import dataclasses

import pytest

from tests import models
from tests.references import MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference, stages_agree
from tests.worlds import World

TEMPERATURE = dataclasses.replace(MLP, model=models.build_temperature)
ONLY_SCALARS = dataclasses.replace(MLP, model=models.OnlyScalars)


@pytest.mark.parametrize("world", [2, 3, 4], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_among_larger_ones(world: World, stage: int) -> None:
    world.run(equals_reference, TEMPERATURE, config_of(stage))


@pytest.mark.parametrize("world", [2, 4], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_else(world: World, stage: int) -> None:
    world.run(equals_reference, ONLY_SCALARS, config_of(stage))


def test_in_bf16(world2: World) -> None:
    world2.run(stages_agree, TEMPERATURE, bf16={"enabled": True})
