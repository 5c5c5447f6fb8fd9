"""Elementwise optimizers of torch: stepping shards gives the bits of stepping whole parameters."""

from __future__ import annotations

import dataclasses

import pytest

from tests.optimizers import Maker, maker
from tests.references import MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World

ELEMENTWISE = [
    maker("SGD"),
    maker("SGD", momentum=0.9, nesterov=True, weight_decay=0.01),
    maker("Adam", weight_decay=0.01),
    maker("AdamW", amsgrad=True),
    maker("AdamW", fused=True),
    maker("AdamW", foreach=True),
    maker("AdamW", maximize=True),
    maker("RMSprop", momentum=0.9, centered=True),
    maker("Adagrad"),
    maker("Adadelta"),
    maker("Adamax"),
    maker("NAdam"),
    maker("RAdam"),
    maker("Rprop"),
    maker("ASGD"),
]


@pytest.mark.parametrize("optimizer", ELEMENTWISE, ids=str)
def test_elementwise_optimizers(world2: World, optimizer: Maker) -> None:
    recipe = dataclasses.replace(MLP, optimizer=optimizer, steps=4)
    for stage in STAGES:
        world2.run(equals_reference, recipe, config_of(stage))


@pytest.mark.parametrize("optimizer", [maker("SGD", momentum=0.9), maker("AdamW", fused=True)], ids=str)
def test_three_ranks(world3: World, optimizer: Maker) -> None:
    for stage in STAGES:
        world3.run(equals_reference, dataclasses.replace(MLP, optimizer=optimizer), config_of(stage))
