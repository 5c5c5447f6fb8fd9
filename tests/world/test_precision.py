"""16-bit training: bf16 and fp16 compute beside fp32 masters, the same at every stage; fp16 survives overflow."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.grids import grid
from tests.mixed_precision import train_with_masters
from tests.references import GPT, MLP, Recipe, assert_same
from tests.world.engine_runs import (
    STAGES,
    config_of,
    open_engine,
    rank,
    run_steps,
    stages_agree,
    train_with_engine,
    world_size,
)
from tests.worlds import World

BF16 = {"bf16": {"enabled": True}}
STATIC_SCALE = 128.0
FP16 = {"fp16": {"enabled": True, "loss_scale": STATIC_SCALE}}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def equals_masters(recipe: Recipe, stage: int, settings: dict[str, Any], dtype: torch.dtype, scale: float) -> None:
    record = train_with_engine(recipe, config_of(stage, **settings))
    reference = train_with_masters(recipe, world_size(), dtype, scale)[rank()]
    # The state dict holds weights in the dtype that the model computes in; the reference holds masters.
    reference = dataclasses.replace(
        reference, weights={name: value.to(record.weights[name].dtype) for name, value in reference.weights.items()}
    )
    assert_same(record, reference, f"{dtype} at stage {stage} against fp32 masters in one process")


def overflow_then_learn(stage: int) -> tuple[int, int, list[float], dict[str, torch.Tensor]]:
    settings = {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 4}}
    recipe = dataclasses.replace(MLP, steps=16)
    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), config_of(stage, **settings)) as engine:
        record = run_steps(recipe, engine)
        return engine.skipped_steps, engine.global_steps, [loss.item() for loss in record.losses], record.weights


def static_overflow(stage: int) -> None:
    """A static scale that is far too high: every step is skipped and no weight moves."""
    model = MLP.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"fp16": {"enabled": True, "loss_scale": 2.0**40}}
    with open_engine(model, MLP.optimizer(model), config_of(stage, **settings)) as engine:
        run_steps(MLP, engine)
        assert engine.skipped_steps == MLP.steps
        for name, value in engine.state_dict().items():
            assert torch.equal(value, before[name].to(value.dtype)), f"{name} moved although every step overflowed"


@pytest.mark.parametrize(
    ("world", "name", "stage"),
    grid(
        [1, 2, 3],
        ["bf16", "fp16"],
        STAGES,
        quick=[
            (1, "bf16", 3),
            (1, "fp16", 3),
            *((2, "bf16", stage) for stage in STAGES),
            *((3, "fp16", stage) for stage in STAGES),
        ],
    ),
    indirect=["world"],
)
def test_equals_fp32_masters_in_one_process(world: World, name: str, stage: int) -> None:
    settings, scale = (BF16, 1.0) if name == "bf16" else (FP16, STATIC_SCALE)
    world.run(equals_masters, GPT, stage, settings, DTYPES[name], scale)


@pytest.mark.parametrize("settings", [BF16, FP16], ids=["bf16", "fp16"])
def test_stages_agree_with_clipping(world3: World, settings: dict[str, Any]) -> None:
    world3.run(stages_agree, GPT, gradient_clipping=0.5, **settings)


def test_stages_agree_where_gradients_travel_in_fp32(world2: World) -> None:
    world2.run(stages_agree, GPT, communication_data_type="fp32", **BF16)


def test_dynamic_scale_skips_alike_at_every_stage_and_then_learns(world2: World) -> None:
    runs = {stage: world2.run(overflow_then_learn, stage) for stage in STAGES}
    skipped, steps, losses, weights = runs[0][0]
    assert 0 < skipped < steps
    assert losses[-1] < losses[0]
    for stage, ranks in runs.items():
        for number, (other_skipped, other_steps, other_losses, other_weights) in enumerate(ranks):
            assert (other_skipped, other_steps) == (skipped, steps), f"stage {stage}, rank {number}"
            assert all(torch.equal(other_weights[name], weights[name]) for name in weights), f"stage {stage}"
            assert other_losses == runs[0][number][2], f"stage {stage}, rank {number}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_static_scale_that_overflows_skips_every_step(world2: World, stage: int) -> None:
    world2.run(static_overflow, stage)
