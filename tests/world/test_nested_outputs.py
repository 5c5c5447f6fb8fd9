"""Blocks that return tuples, dicts, lists and dataclasses: backward must still find the unit's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests import models
from tests.references import Recipe, adamw_in_two_groups
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World


def prediction_and_penalty(model: Any, batch: models.Batch) -> Tensor:
    inputs, targets = batch
    output = model(inputs)
    return F.mse_loss(output["prediction"], targets) + 0.1 * output["penalty"][0]


RECIPE = Recipe(models.build_nested, models.vectors, prediction_and_penalty, adamw_in_two_groups)
CLASSES = ["TupleBlock", "DictBlock", "DataclassBlock", "OnlyInADataclassBlock"]


@pytest.mark.parametrize("stage", STAGES)
def test_units_as_found(world2: World, stage: int) -> None:
    world2.run(equals_reference, RECIPE, config_of(stage))


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_every_block_a_unit(world: World, stage: int) -> None:
    world.run(equals_reference, RECIPE, config_of(stage, shardwise={"unit_classes": CLASSES}))
