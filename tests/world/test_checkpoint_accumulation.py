"""Saved in the middle of a step: what was accumulated comes back, bit for bit in a world of the same size."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import Whole, begin, train_steps
from tests.grids import grid
from tests.world.engine_runs import STAGES, config_of
from tests.world.test_checkpoint_accelerator import goes_on
from tests.worlds import World, WorldPool

WINDOW = 4
Result = tuple[list[torch.Tensor], Whole, int]


def in_the_middle(config: dict[str, Any], directory: str, how: str, micro_batches: int) -> Result:
    """Save after some micro-batches.

    "quietly": the last of these keeps its gradient on each rank; "settled": those before it are averaged already.
    """
    with begin(config) as engine:
        train_steps(engine, 0, micro_batches - 1)
        if how == "settled":
            engine.clip_grad_norm_(math.inf)
        if how == "quietly":
            with engine.no_sync():
                engine.set_gradient_accumulation_boundary(False)
                losses_of_one(engine, micro_batches - 1)
                engine.set_gradient_accumulation_boundary(None)
            engine.micro_steps += 1
        else:
            train_steps(engine, micro_batches - 1, micro_batches)
        engine.save_checkpoint(directory, "middle")
        return train_steps(engine, micro_batches, 10), engine.state_dict(), engine.global_steps


def losses_of_one(engine: Any, index: int) -> None:
    from tests import models
    from tests.world.engine_runs import rank

    engine.backward(models.regression(engine, models.vectors(index, rank())))


def go_on(config: dict[str, Any], directory: str, micro_batches: int) -> Result:
    with begin(config) as engine:
        train_steps(engine, 20, 23)  # gradients that the load must forget
        engine.load_checkpoint(directory)
        return train_steps(engine, micro_batches, 10), engine.state_dict(), engine.global_steps


WAYS = ("plainly", "quietly", "settled")


@pytest.mark.parametrize(
    ("world", "stage", "how", "micro_batches"),
    grid(
        [1, 3],
        STAGES,
        WAYS,
        [WINDOW + 1, WINDOW + 3],
        quick=itertools.chain(
            itertools.product([3], STAGES, WAYS, [WINDOW + 1]), itertools.product([1, 3], [0, 3], WAYS, [WINDOW + 3])
        ),
    ),
    indirect=["world"],
)
def test_the_window_goes_on(world: World, stage: int, how: str, micro_batches: int, tmp_path: Path) -> None:
    config = config_of(stage, accumulation=WINDOW)
    wanted = world.run(in_the_middle, config, str(tmp_path), how, micro_batches)
    for (losses, weights, steps), (their_losses, their_weights, their_steps) in zip(
        world.run(go_on, config, str(tmp_path), micro_batches), wanted, strict=True
    ):
        assert steps == their_steps
        assert all(map(torch.equal, losses, their_losses))
        for name, value in weights.items():
            assert torch.equal(value, their_weights[name]), name


def accumulate(stage: int, directory: str, saves: bool) -> Whole:
    """The gradient's first half is saved by one world, the step made by another; every rank has the same batches."""
    from tests import models
    from tests.models import build_mlp
    from tests.references import adamw_in_two_groups
    from tests.world.engine_runs import open_engine

    model = build_mlp()
    with open_engine(model, adamw_in_two_groups(model), config_of(stage, accumulation=2)) as engine:
        if saves:
            engine.backward(models.regression(engine, models.vectors(0, 0)))
            engine.step()
            engine.save_checkpoint(directory)
        else:
            engine.load_checkpoint(directory)
        engine.backward(models.regression(engine, models.vectors(1, 0)))
        engine.step()
        assert engine.global_steps == 1
        return {**engine.state_dict(), "norm": torch.tensor(engine.get_global_grad_norm())}


@pytest.mark.parametrize("stage", STAGES)
def test_another_world_has_the_same_gradient(worlds: WorldPool, stage: int, tmp_path: Path) -> None:
    wanted = worlds[2].run(accumulate, stage, str(tmp_path), True)[0]
    for size in (1, 3):
        for after in (0, 3):
            found = worlds[size].run(accumulate, after, str(tmp_path), False)[0]
            for name, value in found.items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", STAGES)
def test_with_the_accelerator(world2: World, stage: int, tmp_path: Path) -> None:
    world2.run(goes_on, stage, 3, 4, str(tmp_path))
