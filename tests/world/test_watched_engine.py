"""An engine that is watched by everything at once trains to the bits of the plain one, also under recomputation."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.references import GPT, MLP, Recipe, assert_same
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, run_steps, train_with_engine
from tests.worlds import World

RECIPES = {
    "mlp": MLP,
    "gpt": GPT,
    "gpt that recomputes": dataclasses.replace(
        GPT, model=functools.partial(models.build_gpt, checkpointing="non_reentrant")
    ),
}


def everything(directory: Path) -> dict[str, Any]:
    return {
        "steps_per_print": 1,
        "wall_clock_breakdown": True,
        "memory_breakdown": True,
        "dump_state": True,
        "comms_logger": {"enabled": True, "verbose": True, "debug": True},
        "flops_profiler": {"enabled": True, "output_file": str(directory / "flops.txt")},
        "csv_monitor": {"enabled": True, "output_path": str(directory)},
    }


def watched_equals_plain(recipe: Recipe, stage: int, config: dict[str, Any]) -> str:
    package = logging.getLogger("shardwise")
    level, handlers = package.level, list(package.handlers)
    try:
        plain = train_with_engine(recipe, config_of(stage))
        model = recipe.model()
        with open_engine(model, recipe.optimizer(model), config_of(stage, **config)) as engine:
            hooks = _count_hooks(model)
            record = run_steps(recipe, engine)
            assert _count_hooks(model) == hooks
            name = type(engine).__name__
        assert_same(record, plain, "watched against plain")
    finally:
        package.setLevel(level)
        package.handlers[:] = handlers
    return f"{name} of rank {rank()}"


def _count_hooks(model: Any) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_watching_changes_no_bit(world2: World, tmp_path: Path, recipe: str, stage: int) -> None:
    names = world2.run(watched_equals_plain, RECIPES[recipe], stage, everything(tmp_path))
    assert names == ["ObservedEngine of rank 0", "Engine of rank 1"]
    assert "FLOP" in (tmp_path / "flops.txt").read_text()
    assert (tmp_path / "DeepSpeedJobName" / "Train_Samples_train_loss.csv").exists()
