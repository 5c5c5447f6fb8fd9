"""Forwards that no backward follows: evaluation between steps, no_grad, inference mode, a graph that is dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from tests import models
from tests.references import MLP, assert_same, train_alone
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, reference_of
from tests.worlds import World

RECIPE = dataclasses.replace(MLP, model=models.build_mlp, steps=3)
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "graph dropped": nullcontext,
}
EVALUATION_BATCH = 1000  # an index that training does not reach


def evaluate(model: Any, mode: str) -> torch.Tensor:
    with MODES[mode]():
        return RECIPE.loss(model, RECIPE.batch(EVALUATION_BATCH, 0)).detach().clone()


def evaluations_alone() -> list[torch.Tensor]:
    """Evaluation losses after 0, 1, 2, 3 steps of the run in one process."""
    found = []
    for steps in range(RECIPE.steps + 1):
        record = train_alone(dataclasses.replace(RECIPE, steps=steps), torch.distributed.get_world_size())[0]
        model = RECIPE.model()
        model.load_state_dict(record.weights)
        found.append(evaluate(model, "no_grad"))
    return found


def evaluate_between_steps(stage: int, mode: str) -> None:
    reference, evaluations = reference_of(RECIPE, "once"), evaluations_alone()
    record = dataclasses.replace(reference, losses=[], weights={})
    model = RECIPE.model()
    with open_engine(model, RECIPE.optimizer(model), config_of(stage)) as engine:
        for step in range(RECIPE.steps):
            engine.eval()
            assert not model.training
            found = evaluate(engine, mode)
            assert torch.equal(found, evaluations[step]), f"before step {step}: {found} not {evaluations[step]}"
            engine.train()
            assert model.training
            loss = RECIPE.loss(engine, RECIPE.batch(step, rank()))
            record.losses.append(loss.detach().clone())
            evaluate(engine, mode)  # between forward and backward
            engine.backward(loss)
            evaluate(engine, mode)  # between backward and step
            engine.step()
        assert torch.equal(evaluate(engine, mode), evaluations[-1])
        record.weights = engine.state_dict()
    assert_same(record, reference, f"stage {stage} with evaluation ({mode})")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_between_steps(world2: World, stage: int, mode: str) -> None:
    world2.run(evaluate_between_steps, stage, mode)


def evaluate_only(stage: int) -> torch.Tensor:
    model = RECIPE.model()
    with open_engine(model, RECIPE.optimizer(model), config_of(stage)) as engine:
        engine.eval()
        return evaluate(engine, "no_grad")


def test_evaluation_before_any_training(world3: World) -> None:
    wanted = evaluate(RECIPE.model(), "no_grad")
    for stage in STAGES:
        assert all(torch.equal(found, wanted) for found in world3.run(evaluate_only, stage))
