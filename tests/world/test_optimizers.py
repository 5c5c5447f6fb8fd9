"""Elementwise optimizers of torch: stepping shards gives the bits of stepping whole parameters."""

from __future__ import annotations

import dataclasses

import pytest

from tests.optimizers import Maker, maker
from tests.references import MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference, near_reference, stages_agree
from tests.worlds import World

ELEMENTWISE = [
    maker("SGD"),
    maker("SGD", momentum=0.9, nesterov=True, weight_decay=0.01),
    maker("Adam", weight_decay=0.01),
    maker("AdamW", amsgrad=True),
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


FUSED = [maker("AdamW", fused=True), maker("Adam", fused=True), maker("SGD", momentum=0.9, fused=True)]


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("optimizer", FUSED, ids=str)
def test_fused_optimizers(world: World, optimizer: Maker) -> None:
    """The fused CPU kernels round the last few elements of a tensor in another way than those before.

    Where a flat shard ends is not where a parameter ends. So a fused step is the same at every stage, for shards are
    cut at full vectors, and apart from parameter-by-parameter training by one rounding in the tails.
    """
    recipe = dataclasses.replace(MLP, optimizer=optimizer)
    world.run(stages_agree, recipe)
    world.run(near_reference, recipe, config_of(3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [maker("SGD", momentum=0.9), maker("NAdam")], ids=str)
def test_three_ranks(world3: World, optimizer: Maker) -> None:
    for stage in STAGES:
        world3.run(equals_reference, dataclasses.replace(MLP, optimizer=optimizer), config_of(stage))
