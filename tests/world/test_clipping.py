"""Clipping uses the norm over all parameters of all ranks, the same on each rank; off means off."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.references import MLP, losses_of
from tests.world.engine_runs import (
    STAGES,
    config_of,
    near_reference,
    open_engine,
    rank,
    train_with_engine,
    world_size,
)
from tests.worlds import World

LIMIT = 0.1


def norms_of_a_run(stage: int, gradient_clipping: float) -> list[float]:
    return train_with_engine(MLP, config_of(stage, gradient_clipping=gradient_clipping)).norms


@pytest.mark.parametrize("world", [1, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_clipped_training_follows_clip_grad_norm(world: World, stage: int) -> None:
    recipe = dataclasses.replace(MLP, clip=LIMIT)
    world.run(near_reference, recipe, config_of(stage, gradient_clipping=LIMIT), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_sees_one_norm_from_before_the_clipping(world2: World, stage: int) -> None:
    first, second = world2.run(norms_of_a_run, stage, LIMIT)
    assert first == second
    assert all(norm > LIMIT for norm in first), "the limit should have acted in this run"


@pytest.mark.parametrize("stage", STAGES)
def test_without_clipping_the_norm_is_reported_all_the_same(world2: World, stage: int) -> None:
    world2.run(near_reference, MLP, config_of(stage), rtol=2e-5, atol=1e-6)


def test_the_limit_changes_the_run(world2: World) -> None:
    free, clipped = world2.run(norms_of_a_run, 3, 0.0)[0], world2.run(norms_of_a_run, 3, LIMIT)[0]
    assert free[0] == pytest.approx(clipped[0])
    assert not torch.equal(torch.tensor(free[1:]), torch.tensor(clipped[1:]))


def clip_by_hand(max_norm: float, gradient_clipping: float, stage: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A run whose script clips between backward and step; the norms that the call returned, and the weights."""
    model = MLP.model()
    config = config_of(stage, gradient_clipping=gradient_clipping)
    norms = []
    with open_engine(model, MLP.optimizer(model), config) as engine:
        for step in range(MLP.steps):
            for index in MLP.micro_batches(step):
                (loss,) = losses_of(MLP, engine, index, rank())
                engine.backward(loss)
                norms.append(engine.clip_grad_norm_(max_norm))
                assert engine.clip_grad_norm_(float("inf")) == norms[-1], "asking changes nothing"
                engine.step()
                assert engine.get_global_grad_norm() == norms[-1]
        return norms, engine.state_dict()


def clipping_by_hand_is_that_of_the_config(stage: int) -> None:
    wanted = train_with_engine(MLP, config_of(stage, gradient_clipping=LIMIT))
    for max_norm, gradient_clipping in ((LIMIT, 0.0), (LIMIT, 10.0), (10.0, LIMIT)):
        norms, weights = clip_by_hand(max_norm, gradient_clipping, stage)
        assert norms == wanted.norms
        assert all(torch.equal(weights[name], value) for name, value in wanted.weights.items())


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_a_script_may_clip_by_itself_and_the_smaller_limit_holds(world: World, stage: int) -> None:
    world.run(clipping_by_hand_is_that_of_the_config, stage)


def step_with_clipped_values(stage: int, bound: float) -> None:
    """SGD with lr 1 shows the averaged, clipped gradient as the change of the weights."""
    torch.manual_seed(0)
    model = torch.nn.Linear(37, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = [torch.randn(4, 37, generator=torch.Generator().manual_seed(number)) for number in range(world_size())]
    reference = torch.nn.Linear(37, 5)
    reference.load_state_dict(before)
    torch.stack([reference(x).square().sum() for x in inputs]).mean().backward()
    with open_engine(model, torch.optim.SGD(model.parameters(), lr=1.0), config_of(stage)) as engine:
        engine.backward(engine(inputs[rank()]).square().sum())
        engine.clip_grad_value_(bound)
        engine.step()
        after = engine.state_dict()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > bound, "the bound should act"
        expected = before[name] - parameter.grad.clamp(-bound, bound)
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [1, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_values_are_clipped_after_they_were_averaged(world: World, stage: int) -> None:
    world.run(step_with_clipped_values, stage, 0.5)
