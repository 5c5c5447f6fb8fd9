"""Ways to say which optimizer: an object, a callable, the JSON; groups added later; schedulers that change rates."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardwise
from tests.optimizers import adamw_from_parameters, adamw_over_the_model, fused_adamw_over_the_model
from tests.references import MLP, Record, assert_same, give_gradients, ordered_mean, take_gradients
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, reference_of, run_steps, train_with_engine
from tests.worlds import World

RECIPE = dataclasses.replace(MLP, optimizer=adamw_over_the_model)
JSON = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}}}


def built_from(way: str, stage: int) -> None:
    model = RECIPE.model()
    arguments: dict[str, Any] = {}
    config = config_of(stage)
    if way == "object":
        optimizer: Any = adamw_over_the_model(model)
    elif way == "callable":
        optimizer = adamw_from_parameters
    elif way == "callable with model_parameters":
        optimizer, arguments = adamw_from_parameters, {"model_parameters": model.parameters()}
    else:
        optimizer, config = None, config_of(stage, **JSON)
        if way == "json with model_parameters":
            arguments = {"model_parameters": list(model.parameters())}
    with open_engine(model, optimizer, config, **arguments) as engine:
        record = run_steps(RECIPE, engine)
    if way.startswith("json"):  # which builds the fused kind
        fused = dataclasses.replace(RECIPE, optimizer=fused_adamw_over_the_model)
        wanted = train_with_engine(fused, config_of(stage))
    else:
        wanted = reference_of(RECIPE, "once")
    assert_same(record, wanted, f"optimizer from {way} at stage {stage}")


@pytest.mark.parametrize(
    "way", ["object", "callable", "callable with model_parameters", "json", "json with model_parameters"]
)
def test_ways_to_build(world2: World, way: str) -> None:
    for stage in STAGES:
        world2.run(built_from, way, stage)


def groups_of(model: Any) -> list[dict[str, Any]]:
    """One group a part of the model, each with rates of its own."""
    return [
        {"params": model.stem.parameters(), "lr": 1e-3, "weight_decay": 0.0},
        {"params": [*model.blocks[0].parameters(), *model.head.parameters()], "lr": 4e-3, "betas": (0.8, 0.99)},
        {"params": model.blocks[1].parameters(), "lr": 2e-3},
    ]


def adamw_in_many_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Groups that run across units, and one block that no group has: it must not move."""
    return torch.optim.AdamW(groups_of(model), lr=9e-3)


def groups_across_units(stage: int) -> None:
    recipe = dataclasses.replace(MLP, optimizer=adamw_in_many_groups)
    model = recipe.model()
    left_out = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("blocks.2")}
    with open_engine(model, recipe.optimizer(model), config_of(stage)) as engine:
        record = run_steps(recipe, engine)
    assert left_out
    assert all(torch.equal(record.weights[name], value) for name, value in left_out.items())
    assert_same(record, reference_of(recipe, "once"), f"groups across units at stage {stage}")


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_groups_across_units_and_a_block_without_one(world: World, stage: int) -> None:
    world.run(groups_across_units, stage)


def alone_with_changes(change: Any) -> Record:
    """Four steps in one process; `change(optimizer, model)` comes after the second."""
    model = RECIPE.model()
    optimizer: Any = torch.optim.AdamW(model.blocks.parameters(), lr=3e-3, weight_decay=0.1)  # type: ignore[union-attr]
    record = Record()
    for step in range(4):
        of_rank = []
        for number in range(dist.get_world_size()):
            model.zero_grad()
            loss = RECIPE.loss(model, RECIPE.batch(step, number))
            if number == rank():
                record.add_losses((loss,))  # type: ignore[arg-type]
            loss.backward()  # type: ignore[union-attr]
            of_rank.append(take_gradients(model))
        give_gradients(model, ordered_mean(of_rank))
        optimizer.step()
        if step == 1:
            change(optimizer, model)
    record.weights = dict(model.state_dict())
    return record


def change_rate(optimizer: Any, model: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.25


def add_head(optimizer: Any, model: Any) -> None:
    optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 1e-3})


def change_while_training(stage: int, change: Any) -> None:
    model: Any = RECIPE.model()
    built = torch.optim.AdamW(model.blocks.parameters(), lr=3e-3, weight_decay=0.1)
    engine, optimizer, _, _ = shardwise.initialize(model=model, optimizer=built, config=config_of(stage))
    record = Record()
    with engine:
        for step in range(4):
            loss = RECIPE.loss(engine, RECIPE.batch(step, rank()))
            record.add_losses((loss,))
            engine.backward(loss)
            engine.step()
            if step == 1:
                change(optimizer, model)
        record.weights = engine.state_dict()
    assert_same(record, alone_with_changes(change), f"{change.__name__} at stage {stage}")


@pytest.mark.parametrize("change", [change_rate, add_head])
@pytest.mark.parametrize("stage", STAGES)
def test_changes_while_training(world2: World, stage: int, change: Any) -> None:
    world2.run(change_while_training, stage, change)


def halve(step: int) -> float:
    return 0.5**step


def rates_of_a_run(stage: int, kind: str) -> list[list[float]]:
    model = RECIPE.model()
    built = adamw_over_the_model(model)
    arguments: dict[str, Any] = {}
    config = config_of(stage, accumulation=2)
    if kind == "object":
        arguments["lr_scheduler"] = torch.optim.lr_scheduler.LambdaLR(built, halve)
    else:
        arguments["lr_scheduler"] = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=halve)
    engine, _, _, scheduler = shardwise.initialize(model=model, optimizer=built, config=config, **arguments)
    rates = []
    with engine:
        for index in range(6):
            engine.backward(RECIPE.loss(engine, RECIPE.batch(index, rank())))
            engine.step()
            rates.append(engine.get_lr())
        assert scheduler.get_last_lr() == rates[-1]
    return rates


@pytest.mark.parametrize("kind", ["object", "callable"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_scheduler_moves_once_a_step(world2: World, stage: int, kind: str) -> None:
    wanted = [[3e-3], [1.5e-3], [1.5e-3], [0.75e-3], [0.75e-3], [0.375e-3]]
    assert world2.run(rates_of_a_run, stage, kind) == [wanted, wanted]
