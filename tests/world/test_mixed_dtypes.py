"""bf16 and fp32 parameters in one block: each keeps its dtype, the narrow ones are stepped as fp32 masters."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import models
from tests.mixed_precision import train_with_masters
from tests.references import MLP, assert_same
from tests.world.engine_runs import STAGES, config_of, rank, train_with_engine, world_size
from tests.worlds import World

RECIPE = dataclasses.replace(MLP, model=models.build_mixed)


def equals_masters_of_the_narrow_ones(stage: int) -> None:
    record = train_with_engine(RECIPE, config_of(stage))
    dtypes = {name: value.dtype for name, value in RECIPE.model().state_dict().items()}
    assert {name: value.dtype for name, value in record.weights.items()} == dtypes
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    reference = train_with_masters(RECIPE, world_size())[rank()]
    rounded = {name: value.to(dtypes[name]) for name, value in reference.weights.items()}
    assert_same(record, dataclasses.replace(reference, weights=rounded), f"stage {stage} against masters")


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_mixed_dtypes(world: World, stage: int) -> None:
    world.run(equals_masters_of_the_narrow_ones, stage)
