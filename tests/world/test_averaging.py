"""Gradients are divided where the configuration says: before the sum, after it, partly both, or never."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.world.engine_runs import STAGES, config_of, open_engine, rank, world_size
from tests.worlds import World

NUMEL = 1021
FP16_LIMIT = 65_504.0


class Weights(nn.Module):
    """Its gradient is the input, to the bit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUMEL))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.weight * batch).sum()


def gradient_of(of_rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(of_rank)
    return torch.randn(NUMEL, generator=generator) * torch.logspace(-3, 3, NUMEL)


def one_step(gradient: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """The reduced gradient: what plain SGD with rate 1 takes from zeros."""
    model = Weights()
    with open_engine(model, torch.optim.SGD(model.parameters(), lr=1.0), config, device="cpu") as engine:
        engine.backward(engine(gradient))
        engine.step()
        return -engine.state_dict()["weight"] if engine.was_step_applied() else torch.full((NUMEL,), torch.nan)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"prescale_gradients": True},
    {"gradient_predivide_factor": 3.0},
    {"gradient_predivide_factor": 0.7},
    {"gradient_allreduce_op": "sum"},
    {"gradient_allreduce_op": "sum", "gradient_predivide_factor": 3.0},
    {"prescale_gradients": True, "gradient_predivide_factor": 3.0},
]


def expected_of(settings: dict[str, Any], world: int) -> torch.Tensor:
    """DeepSpeed's definition, by hand: rank order, one multiplication on each side of the sum."""
    factor = settings.get("gradient_predivide_factor", 1.0)
    mean = settings.get("gradient_allreduce_op", "mean") == "mean"
    before, after = 1.0 / factor, factor * (1.0 / world) if mean else factor
    if settings.get("prescale_gradients"):
        before, after = 1.0 / world, 1.0
    total = gradient_of(0) * before
    for other in range(1, world):
        total = total + gradient_of(other) * before
    return total * after


def equals_the_hand(stage: int, settings: dict[str, Any]) -> None:
    found = one_step(gradient_of(rank()), config_of(stage, **settings))
    assert torch.equal(found, expected_of(settings, world_size()))


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_the_division_is_where_it_was_asked_for(world: World, stage: int, settings: dict[str, Any]) -> None:
    world.run(equals_the_hand, stage, settings)


def one_fp16_step(value: float, settings: dict[str, Any]) -> torch.Tensor:
    config = config_of(
        2, fp16={"enabled": True, "loss_scale": 1}, shardwise={"reduction": "native"}, **settings
    )  # the ordered sum widens its addends, and has no such trouble
    return one_step(torch.full((NUMEL,), value), config)


@pytest.mark.parametrize("settings", [{"prescale_gradients": True}, {"gradient_predivide_factor": 2.0}], ids=str)
def test_dividing_first_keeps_a_sum_within_fp16(world2: World, settings: dict[str, Any]) -> None:
    value = FP16_LIMIT / 2**0.5 // 32 * 32  # fp16 holds it, but not twice it
    for found in world2.run(one_fp16_step, value, {}):
        assert found.isnan().all(), "the plain mean should overflow here, or this test tests nothing"
    for found in world2.run(one_fp16_step, value, settings):
        assert torch.equal(found, torch.full((NUMEL,), value))


def alone(settings: dict[str, Any]) -> torch.Tensor:
    return one_step(gradient_of(0), config_of(0, **settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_one_rank_divides_nothing(world1: World, settings: dict[str, Any]) -> None:
    (found,) = world1.run(alone, settings)
    assert torch.equal(found, gradient_of(0))
