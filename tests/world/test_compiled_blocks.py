"""torch.compile around blocks: hooks stand outside the compiled code, and compiled blocks train the same bits."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from tests.grids import grid
from tests.references import MLP, Recipe
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World


def build_compiled(how: str, backend: str) -> nn.Module:
    """Blocks compiled in place (`module.compile()`), or wrapped (`torch.compile(module)`), which renames parameters."""
    torch._dynamo.reset()
    model: Any = models.build_mlp()
    for index, block in enumerate(model.blocks):
        if how == "in place":
            block.compile(backend=backend)
        else:
            model.blocks[index] = torch.compile(block, backend=backend)
    return model  # type: ignore[no-any-return]


def recipe_of(how: str, backend: str) -> Recipe:
    return dataclasses.replace(MLP, model=functools.partial(build_compiled, how, backend), steps=2)


@pytest.mark.parametrize(
    ("stage", "how"),
    grid(
        STAGES,
        ["in place", "wrapped"],
        quick=[(0, "wrapped"), (1, "in place"), (2, "wrapped"), (3, "in place"), (3, "wrapped")],
    ),
)
def test_compiled_blocks(world2: World, stage: int, how: str) -> None:
    world2.run(equals_reference, recipe_of(how, "aot_eager"), config_of(stage))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++ here")
@pytest.mark.parametrize("stage", [0, 3])
def test_compiled_by_inductor(world2: World, stage: int) -> None:
    world2.run(equals_reference, recipe_of("in place", "inductor"), config_of(stage))
