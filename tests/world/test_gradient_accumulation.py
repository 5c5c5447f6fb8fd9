"""Gradient accumulation at every cadence, in every style that scripts use."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.grids import grid
from tests.references import MLP, Cadence, Recipe, Record, assert_near, assert_same, losses_of
from tests.world.engine_runs import (
    STAGES,
    cadence_of,
    config_of,
    equals_reference,
    open_engine,
    rank,
    reference_of,
    train_with_engine,
)
from tests.worlds import World

Style = Callable[[Recipe, Any, int], None]


def forward(recipe: Recipe, engine: Any, index: int, record: Record) -> torch.Tensor:
    losses = losses_of(recipe, engine, index, rank())
    record.add_losses(losses)
    return losses[0]


def engine_backward(recipe: Recipe, engine: Any, step: int, record: Record) -> None:
    """engine.backward divides the loss; step() after every micro-batch acts at the boundary."""
    for index in recipe.micro_batches(step):
        engine.backward(forward(recipe, engine, index, record))
        engine.step()


def plain_backward(recipe: Recipe, engine: Any, step: int, record: Record) -> None:
    """loss.backward() with the script's own division."""
    for index in recipe.micro_batches(step):
        (forward(recipe, engine, index, record) / recipe.accumulation).backward()
        engine.step()


def explicit_boundary(recipe: Recipe, engine: Any, step: int, record: Record) -> None:
    """The script says where the boundary is and steps only there."""
    for index in recipe.micro_batches(step):
        last = index == recipe.micro_batches(step)[-1]
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(forward(recipe, engine, index, record))
        if last:
            engine.step()


def quiet_until_the_last(recipe: Recipe, engine: Any, step: int, record: Record) -> None:
    """no_sync around all but the last micro-batch: nothing travels inside, one reduction carries the sum."""
    *quiet, last = recipe.micro_batches(step)
    with engine.no_sync():
        for index in quiet:
            (forward(recipe, engine, index, record) / recipe.accumulation).backward()
    (forward(recipe, engine, last, record) / recipe.accumulation).backward()
    engine.step()


def run(recipe: Recipe, config: dict[str, Any], style: Any, cadence: Cadence) -> None:
    record = Record()
    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), config) as engine:
        for step in range(recipe.steps):
            style(recipe, engine, step, record)
            assert engine.global_steps == step + 1
        record.weights = engine.state_dict()
    assert_same(record, reference_of(recipe, cadence), f"{style.__name__}, reduced {cadence}")


STYLES = (engine_backward, plain_backward, explicit_boundary)


@pytest.mark.parametrize(
    ("stage", "style", "accumulation"),
    grid(STAGES, STYLES, [1, 2, 3], quick=itertools.chain(
        itertools.product(STAGES, STYLES, [3]), itertools.product([0, 3], STYLES, [1])
    )),
)  # fmt: skip
def test_styles_of_the_config(world2: World, stage: int, style: Any, accumulation: int) -> None:
    recipe = dataclasses.replace(MLP, accumulation=accumulation)
    config = config_of(stage, accumulation=accumulation)
    world2.run(run, recipe, config, style, cadence_of(config))


@pytest.mark.parametrize("accumulation", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_three_ranks(world3: World, stage: int, accumulation: int) -> None:
    recipe = dataclasses.replace(MLP, accumulation=accumulation)
    world3.run(equals_reference, recipe, config_of(stage, accumulation=accumulation))


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_no_sync_reduces_once_at_every_stage(world: World, stage: int) -> None:
    world.run(run, dataclasses.replace(MLP, accumulation=3), config_of(stage), quiet_until_the_last, "once")


def received_bytes_inside_no_sync(stage: int) -> tuple[int, int]:
    """Collectives of the process group inside no_sync, and in the micro-batch after it."""
    group = dist.distributed_c10d._get_default_group()
    recipe, record = dataclasses.replace(MLP, accumulation=2), Record()
    model = recipe.model()
    config = config_of(stage, shardwise={"transport": "process_group", "reduction": "native"})
    with open_engine(model, recipe.optimizer(model), config) as engine:
        start = group._get_sequence_number_for_group()
        with engine.no_sync():
            forward(recipe, engine, 0, record).backward()
        middle = group._get_sequence_number_for_group()
        forward(recipe, engine, 1, record).backward()
        engine.step()
        return middle - start, group._get_sequence_number_for_group() - middle


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_nothing_travels_inside_no_sync(world2: World, stage: int) -> None:
    for inside, after in world2.run(received_bytes_inside_no_sync, stage):
        assert inside == 0
        assert after > 0


def changing_cadence(stage: int) -> None:
    """One micro-batch, then three, then two in a step, marked by the script."""
    counts = (1, 3, 2)
    record, reference = Record(), Record()
    model, alone = MLP.model(), MLP.model()
    optimizer = MLP.optimizer(alone)
    index = 0
    with open_engine(model, MLP.optimizer(model), config_of(stage)) as engine:
        for count in counts:
            alone.zero_grad()
            for number in range(count):
                last = number == count - 1
                engine.set_gradient_accumulation_boundary(last)
                loss = MLP.loss(engine, MLP.batch(index, 0))
                record.add_losses((loss,))
                (loss / count).backward()
                loss = MLP.loss(alone, MLP.batch(index, 0))
                reference.add_losses((loss,))
                (loss / count).backward()
                index += 1
            engine.step()
            optimizer.step()
        record.weights = engine.state_dict()
    reference.weights = dict(alone.state_dict())
    # Both ranks see one batch, so the mean of two equal gradients is exact.
    assert_same(record, reference, f"stage {stage} at a changing cadence")


@pytest.mark.parametrize("stage", STAGES)
def test_a_cadence_that_changes(world2: World, stage: int) -> None:
    world2.run(changing_cadence, stage)


def stages_are_near(accumulation: int) -> None:
    recipe = dataclasses.replace(MLP, accumulation=accumulation)
    runs = [train_with_engine(recipe, config_of(stage, accumulation=accumulation)) for stage in STAGES]
    assert_same(runs[1], runs[0], "stage 1 against stage 0: both reduce once")
    assert_same(runs[3], runs[2], "stage 3 against stage 2: both reduce every micro-batch")
    assert_near(runs[2], runs[0], "stage 2 against stage 0: apart by rounding", rtol=1e-4, atol=1e-5)


def test_stages_of_one_cadence_agree(world3: World) -> None:
    world3.run(stages_are_near, 3)
