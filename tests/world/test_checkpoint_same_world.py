"""Saved and loaded by as many ranks, training goes on bit for bit: weights, moments, rates, scale, random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import begin, build_forgetful, optimizer_parts, train_steps
from tests.optimizers import maker
from tests.world.engine_runs import STAGES, config_of, open_engine
from tests.worlds import World

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # an initial scale that overflows: the scaler's state matters
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 32, "loss_scale_window": 3, "hysteresis": 1}},
}
FIRST, ALL = 5, 10


def resumes(config: dict[str, Any], directory: str) -> None:
    with begin(config) as engine:
        before = train_steps(engine, 0, FIRST)
        assert engine.save_checkpoint(directory, client_state={"epoch": 3, "best": torch.tensor([1.5, float("inf")])})
        after = train_steps(engine, FIRST, ALL)
        wanted = (engine.state_dict(), optimizer_parts(engine), engine.get_lr(), engine.loss_scale)
        counts = (engine.global_steps, engine.micro_steps, engine.skipped_steps)
    with begin(config) as engine:
        train_steps(engine, 0, 2)  # what a load has to overwrite
        path, client_state = engine.load_checkpoint(directory)
        assert Path(path).name == f"global_step{FIRST}"
        assert client_state["epoch"] == 3
        assert torch.equal(client_state["best"], torch.tensor([1.5, float("inf")]))
        again = train_steps(engine, FIRST, ALL)
        assert all(map(torch.equal, again, after)), f"losses {again} after {before}, wanted {after}"
        for name, value in engine.state_dict().items():
            assert torch.equal(value, wanted[0][name]), name
        for (*mine, values), (*theirs, expected) in zip(optimizer_parts(engine), wanted[1], strict=True):
            assert mine == theirs
            assert torch.equal(values, expected), mine
        assert engine.get_lr() == wanted[2]
        assert engine.loss_scale == wanted[3]
        assert (engine.global_steps, engine.micro_steps, engine.skipped_steps) == counts


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 3], indirect=True)
def test_training_goes_on(world: World, stage: int, precision: str, tmp_path: Path) -> None:
    world.run(resumes, config_of(stage, **PRECISIONS[precision]), str(tmp_path))


@pytest.mark.parametrize("stage", [2, 3])
def test_over_messages_as_well(world2: World, stage: int, tmp_path: Path) -> None:
    world2.run(resumes, config_of(stage, shardwise={"transport": "process_group"}), str(tmp_path))


def resumes_with(name: str, stage: int, directory: str) -> None:
    """Any optimizer, by its state alone."""
    make = maker(name) if name != "SGD" else maker(name, momentum=0.9)

    def opened() -> Any:
        model = build_forgetful()
        return open_engine(model, make(model), config_of(stage))

    def steps(engine: Any, first: int, last: int) -> list[torch.Tensor]:
        torch.manual_seed(first)  # for the dropout
        return train_steps(engine, first, last)

    with opened() as engine:
        steps(engine, 0, 3)
        engine.save_checkpoint(directory, "middle")
        wanted = steps(engine, 3, 6)
    with opened() as engine:
        engine.load_checkpoint(directory)
        assert all(map(torch.equal, steps(engine, 3, 6), wanted))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "NAdam", "Rprop"])
@pytest.mark.parametrize("stage", [0, 3])
def test_any_elementwise_optimizer(world2: World, name: str, stage: int, tmp_path: Path) -> None:
    world2.run(resumes_with, name, stage, str(tmp_path))


@pytest.mark.parametrize("name", ["Lamb", "Adafactor"])
@pytest.mark.parametrize("stage", [0, 2])
def test_optimizers_of_whole_matrices(world2: World, name: str, stage: int, tmp_path: Path) -> None:
    world2.run(resumes_with, name, stage, str(tmp_path))
