"""The engine leaves no mark on what is not its own: no attribute on the user's objects, no patched global of torch."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests import models
from tests.references import GPT
from tests.world.engine_runs import STAGES, config_of, open_engine, rank
from tests.worlds import World

PATCHABLE: tuple[Any, ...] = (
    torch,
    torch.Tensor,
    torch.autograd,
    torch.autograd.graph,
    nn.Module,
    nn.Linear,
    nn.Parameter,
    nn.utils,
    F,
    dist,
    dist.distributed_c10d,
    torch.optim.Optimizer,
    torch.optim.AdamW,
    torch.utils.checkpoint,
)


def globals_of_torch() -> dict[tuple[str, str], int]:
    return {
        (place.__name__, name): id(value)
        for place in PATCHABLE
        for name, value in vars(place).items()
        if callable(value) or isinstance(value, staticmethod | classmethod)
    }


def attributes_of(model: nn.Module) -> dict[str, set[str]]:
    own = {f"module {name or '(root)'}": set(vars(module)) for name, module in model.named_modules()}
    return own | {f"parameter {name}": set(vars(parameter)) for name, parameter in model.named_parameters()}


def train_and_look(stage: int) -> None:
    model = models.build_gpt()
    optimizer = GPT.optimizer(model)
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    hooks_before = hooks_of(model)
    with open_engine(model, optimizer, config_of(stage)) as first:  # lazy imports of torch happen here
        first.backward(GPT.loss(first, GPT.batch(0, rank())))
        first.step()
    assert hooks_of(model) == hooks_before, "close() left hooks on the user's modules"

    model = models.build_gpt()
    optimizer = GPT.optimizer(model)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    attributes, torch_globals, environment = attributes_of(model), globals_of_torch(), dict(os.environ)
    with open_engine(model, optimizer, config_of(stage)) as engine:
        for step in range(2):
            engine.backward(GPT.loss(engine, GPT.batch(step, rank())))
            assert globals_of_torch() == torch_globals, "patched while training"
            engine.step()
        assert engine.module is model
        assert [name for name, _ in model.named_parameters()] == names
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
        with engine.gathered_parameters():
            assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
        assert attributes_of(model) == attributes
        assert dict(os.environ) == environment


def hooks_of(model: nn.Module) -> dict[str, int]:
    return {
        f"{name}.{kind}": len(value)
        for name, module in model.named_modules()
        for kind, value in vars(module).items()
        if kind.endswith("_hooks")
    }


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_bolted_on(world2: World, stage: int) -> None:
    world2.run(train_and_look, stage)
