"""Several backward calls a step: two losses over one graph, the same loss again, a graph that is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests import models
from tests.references import MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World


def two_losses_over_one_graph(model: Any, batch: models.Batch) -> tuple[Tensor, ...]:
    inputs, targets = batch
    prediction = model(inputs)
    return F.mse_loss(prediction, targets), F.l1_loss(prediction, targets)


def early_loss_then_last_loss(model: Any, batch: models.Batch) -> tuple[Tensor, ...]:
    """The first backward ends at the first block: the later units get nothing from it."""
    inputs, targets = batch
    early, last = model(inputs)
    return F.mse_loss(early, targets), F.mse_loss(last, targets)


def last_loss_then_early_loss(model: Any, batch: models.Batch) -> tuple[Tensor, ...]:
    early, last = early_loss_then_last_loss(model, batch)
    return last, early


def the_same_loss_three_times(model: Any, batch: models.Batch) -> tuple[Tensor, ...]:
    inputs, targets = batch
    loss = F.mse_loss(model(inputs), targets)
    return loss, loss, loss


@pytest.mark.parametrize("loss", [two_losses_over_one_graph, the_same_loss_three_times])
@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_several_backwards(world: World, loss: Any, stage: int) -> None:
    world.run(equals_reference, dataclasses.replace(MLP, loss=loss), config_of(stage))


@pytest.mark.parametrize("loss", [early_loss_then_last_loss, last_loss_then_early_loss])
@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_reaches_part_of_the_model(world2: World, loss: Any, stage: int) -> None:
    recipe = dataclasses.replace(MLP, model=models.build_early_exit, loss=loss)
    world2.run(equals_reference, recipe, config_of(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_several_backwards_with_accumulation(world2: World, stage: int) -> None:
    recipe = dataclasses.replace(MLP, loss=two_losses_over_one_graph, accumulation=2)
    world2.run(equals_reference, recipe, config_of(stage, accumulation=2))
