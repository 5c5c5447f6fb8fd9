"""Several forwards before a backward: a block within one forward, or the whole model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests import models
from tests.references import GPT, MLP, Recipe
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World


def two_forwards_one_backward(model: Any, batch: models.Batch) -> Tensor:
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets) + F.mse_loss(model(inputs.flip(0)), targets)


def two_forwards_two_backwards(model: Any, batch: models.Batch) -> tuple[Tensor, ...]:
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets), F.mse_loss(model(inputs.flip(0)), targets)


def two_forwards_backwards_in_reverse(model: Any, batch: models.Batch) -> tuple[Tensor, ...]:
    first, second = two_forwards_two_backwards(model, batch)
    return second, first


def output_fed_back(model: Any, batch: models.Batch) -> Tensor:
    """The second forward takes the first one's output, so the model's root is below itself in the graph."""
    inputs, targets = batch
    first = model(inputs)
    padded = F.pad(first, (0, inputs.shape[1] - first.shape[1]))
    return F.mse_loss(model(inputs + padded), targets)


LOSSES = (two_forwards_one_backward, two_forwards_two_backwards, two_forwards_backwards_in_reverse, output_fed_back)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_whole_model_twice(world2: World, loss: Any, stage: int) -> None:
    world2.run(equals_reference, dataclasses.replace(MLP, loss=loss), config_of(stage))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_whole_model_twice_recomputed(world2: World, loss: Any) -> None:
    model = functools.partial(models.build_mlp, checkpointing="non_reentrant")
    recipe: Recipe = dataclasses.replace(MLP, model=model, loss=loss)
    world2.run(equals_reference, recipe, config_of(3))


@pytest.mark.parametrize("stage", STAGES)
def test_one_block_twice_in_a_forward(world2: World, stage: int) -> None:
    model = functools.partial(models.build_gpt, shared_block=True)
    world2.run(equals_reference, dataclasses.replace(GPT, model=model), config_of(stage))
