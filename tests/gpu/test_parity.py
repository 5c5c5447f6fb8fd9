"""The parity of tests/world on GPUs with NCCL: stages agree with each other and with one process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from tests.references import GPT, MLP, WIDE, Recipe
from tests.world.engine_runs import STAGES, config_of, equals_reference, near_reference, stages_agree
from tests.world.test_unused_parameters import parts_unused_on_some_ranks, with_choice
from tests.worlds import World

ORDERED = {"shardwise": {"reduction": "ordered"}}


def build_on_gpu(build: Callable[[], nn.Module]) -> nn.Module:
    """Seeded on the CPU, so that all devices start alike."""
    return build().cuda()


def batch_on_gpu(batch: Callable[[int, int], Any], index: int, rank: int) -> Any:
    return tuple(part.cuda() if isinstance(part, torch.Tensor) else part for part in batch(index, rank))


def on_gpu(recipe: Recipe) -> Recipe:
    return dataclasses.replace(
        recipe,
        model=functools.partial(build_on_gpu, recipe.model),
        batch=functools.partial(batch_on_gpu, recipe.batch),
    )


RECIPES = {
    "mlp": MLP,
    "gpt": GPT,
    "wide": WIDE,
    "accumulation": dataclasses.replace(MLP, accumulation=3),
    "recomputed": dataclasses.replace(GPT, model=functools.partial(models.build_gpt, checkpointing="non_reentrant")),
    "temperature": dataclasses.replace(MLP, model=models.build_temperature),
    "adapters": dataclasses.replace(MLP, model=models.build_lora),
    "unused": dataclasses.replace(
        MLP, model=models.build_optional, batch=parts_unused_on_some_ranks, loss=with_choice, steps=4
    ),
}


@pytest.mark.parametrize("gpu_world", [1, 2, 4], indirect=True)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("stage", STAGES)
def test_equals_one_process(gpu_world: World, recipe: Recipe, stage: int) -> None:
    settings = {} if gpu_world.size == 1 else ORDERED
    gpu_world.run(equals_reference, on_gpu(recipe), config_of(stage, accumulation=recipe.accumulation, **settings))


@pytest.mark.parametrize("gpu_world", [2, 4], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_nccls_own_reduction_is_near(gpu_world: World, stage: int) -> None:
    gpu_world.run(near_reference, on_gpu(MLP), config_of(stage), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gpu_world", [1, 2], indirect=True)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stages_agree_in_16_bits(gpu_world: World, precision: str) -> None:
    settings = {} if gpu_world.size == 1 else ORDERED
    gpu_world.run(stages_agree, on_gpu(GPT), gradient_clipping=0.5, **{precision: {"enabled": True}}, **settings)
