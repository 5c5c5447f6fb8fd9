"""An exception inside forward or backward on every rank: after zero_grad() the run goes on as if it never was."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise import CollectiveError
from tests.models import Block, Checkpointing, Mlp
from tests.references import MLP, assert_same
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, reference_of
from tests.worlds import World


class MishapError(Exception):
    """The fault on purpose."""


class _FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise MishapError("in the middle of backward")


class FragileBlock(Block):
    """Fails when told to."""

    fails_in = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.fails_in == "forward":
            raise MishapError("in the middle of forward")
        x = super().forward(x)
        return _FailInBackward.apply(x) if self.fails_in == "backward" else x


def build_fragile(checkpointing: Checkpointing = "none") -> nn.Module:
    torch.manual_seed(31)
    return Mlp(checkpointing=checkpointing, make_block=FragileBlock)


def recover(stage: int, fails_in: str, checkpointing: Checkpointing, transport: str, mishaps: int = 1) -> None:
    recipe = dataclasses.replace(MLP, model=functools.partial(build_fragile, checkpointing), steps=3)
    reference = reference_of(recipe, "once")
    record = dataclasses.replace(reference, losses=[], weights={})
    model: Any = recipe.model()
    with open_engine(model, recipe.optimizer(model), config_of(stage, shardwise={"transport": transport})) as engine:
        for step in range(recipe.steps):
            if step > 0:
                for _ in range(mishaps):
                    model.blocks[1].fails_in = fails_in
                    with pytest.raises(MishapError):
                        engine.backward(recipe.loss(engine, recipe.batch(999, rank())))
                    model.blocks[1].fails_in = ""
                    engine.zero_grad()
            loss = recipe.loss(engine, recipe.batch(step, rank()))
            record.losses.append(loss.detach().clone())
            engine.backward(loss)
            engine.step()
        assert engine.global_steps == recipe.steps
        record.weights = engine.state_dict()
    assert_same(record, reference, f"stage {stage} after a mishap in {fails_in}")


@pytest.mark.parametrize("transport", ["process_group", "shared_memory"])
@pytest.mark.parametrize("fails_in", ["forward", "backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_recovery(world2: World, stage: int, fails_in: str, transport: str) -> None:
    world2.run(recover, stage, fails_in, "none", transport)


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_recovery_twice_in_a_row(world3: World, fails_in: str) -> None:
    world3.run(recover, 3, fails_in, "none", "auto", mishaps=2)


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_recovery_with_recomputed_blocks(world2: World, fails_in: str, checkpointing: Checkpointing) -> None:
    world2.run(recover, 3, fails_in, checkpointing, "auto")


def recover_from_different_places(stage: int, blocks: tuple[int, int]) -> str:
    """Each rank fails in another block; returns what this rank was told."""
    recipe = dataclasses.replace(MLP, model=build_fragile, steps=3)
    reference = reference_of(recipe, "once")
    record = dataclasses.replace(reference, losses=[], weights={})
    model: Any = recipe.model()
    told = ""
    with open_engine(model, recipe.optimizer(model), config_of(stage)) as engine:
        for step in range(recipe.steps):
            if step == 1:
                fragile = model.blocks[blocks[rank()]]
                fragile.fails_in = "backward"
                try:
                    engine.backward(recipe.loss(engine, recipe.batch(999, rank())))
                except (MishapError, CollectiveError) as error:
                    told = str(error)
                fragile.fails_in = ""
                engine.zero_grad()
            loss = recipe.loss(engine, recipe.batch(step, rank()))
            record.losses.append(loss.detach().clone())
            engine.backward(loss)
            engine.step()
        record.weights = engine.state_dict()
    assert_same(record, reference, f"stage {stage} after mishaps in blocks {blocks}")
    return told


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_fail_in_different_places(world2: World, stage: int) -> None:
    """The rank that gets further waits for a reduction that never comes: the other one's giving up must wake it."""
    told = world2.run(recover_from_different_places, stage, (0, 2))
    assert any("gave up its pass" in text for text in told) or all("middle of backward" in text for text in told)
