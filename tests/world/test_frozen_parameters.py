"""Frozen parts: no gradient, no state, no step, and gradients still flow through them."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from tests import models
from tests.references import MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World

FROZEN = {
    "first layers": ("stem", "blocks.0"),
    "a layer in the middle": ("blocks.1",),
    "last layers": ("blocks.2", "head"),
    "half of every block": ("blocks.0.up", "blocks.1.up", "blocks.2.up"),
    "all but the head": ("stem", "blocks"),
    "all but the stem": ("blocks", "head"),
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("stage", STAGES)
def test_frozen(world2: World, frozen: tuple[str, ...], stage: int) -> None:
    model = functools.partial(models.build_partly_frozen, frozen)
    world2.run(equals_reference, dataclasses.replace(MLP, model=model), config_of(stage))


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("stage", STAGES)
def test_adapters_on_a_frozen_base(world: World, base_dtype: torch.dtype, stage: int) -> None:
    model = functools.partial(models.build_lora, base_dtype)
    world.run(equals_reference, dataclasses.replace(MLP, model=model), config_of(stage))
