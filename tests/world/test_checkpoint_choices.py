"""What a script may choose: parts of a checkpoint, tags, frozen parameters left out, client state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.checkpoint.manifest import complete_tags
from shardwise.errors import CheckpointError, CollectiveError, ConfigError
from shardwise.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.checkpoints import begin, differences, optimizer_parts, train_steps
from tests.models import FEATURES
from tests.world.engine_runs import config_of, rank
from tests.worlds import World


def parts(directory: str) -> None:
    with begin(config_of(3)) as engine:
        train_steps(engine, 0, 3)
        engine.save_checkpoint(directory, 7)
        weights, moments, rate = engine.state_dict(), optimizer_parts(engine), engine.get_lr()
    with begin(config_of(3)) as engine:
        path, client_state = engine.load_checkpoint(directory, load_module_only=True)
        assert Path(path).name == "7" and client_state == {}
        assert not differences(engine.state_dict(), weights)
        assert optimizer_parts(engine) == [] and engine.global_steps == 0
        engine.load_checkpoint(directory, 7, load_optimizer_states=False)
        assert optimizer_parts(engine) == [] and engine.global_steps == 3
    with begin(config_of(3)) as engine:
        engine.load_checkpoint(directory, load_lr_scheduler_states=False)
        assert len(optimizer_parts(engine)) == len(moments)
        assert engine.get_lr() == rate  # of the optimizer's groups
        assert engine.lr_scheduler.last_epoch == 0
    with begin(config_of(3), lr_scheduler=None) as engine:
        engine.load_checkpoint(directory)
        assert not differences(engine.state_dict(), weights)


def test_parts(world2: World, tmp_path: Path) -> None:
    world2.run(parts, str(tmp_path))


def frozen_left_out(directory: str) -> None:
    with begin(config_of(3)) as engine:
        train_steps(engine, 0, 1)
        engine.save_checkpoint(directory, exclude_frozen_parameters=True)
        weights = engine.state_dict()
    with begin(config_of(1)) as engine:
        engine.load_checkpoint(directory)
        assert not differences(engine.state_dict(), weights)
    whole = get_fp32_state_dict_from_zero_checkpoint(directory)
    assert set(weights) - set(whole) == {"frozen.weight", "frozen.bias"}


def test_frozen_parameters_left_out(world2: World, tmp_path: Path) -> None:
    world2.run(frozen_left_out, str(tmp_path))


def nothing_there(directory: str) -> None:
    with begin(config_of(2)) as engine:
        before = engine.state_dict()
        assert engine.load_checkpoint(f"{directory}/nowhere") == (None, None)
        assert not differences(engine.state_dict(), before)
        with pytest.raises(CheckpointError, match="never completed"):
            engine.load_checkpoint(directory, "global_step5")
        with pytest.raises(ConfigError, match="keep_last=0"):
            engine.save_checkpoint(directory, keep_last=0)
        with pytest.raises(CheckpointError, match="tag"):
            engine.save_checkpoint(directory, "../up")
        with pytest.raises(CheckpointError, match=r"client_state\.run is a object.*allow_pickle"):
            engine.save_checkpoint(directory, client_state={"run": object()})
        engine.save_checkpoint(directory, client_state={"run": range(3)}, allow_pickle=["client_state.run"])
        with pytest.raises(CheckpointError, match="pickle"):
            engine.load_checkpoint(directory)
        _, state = engine.load_checkpoint(directory, allow_pickle=["client_state.run"])
        assert state["run"] == range(3)
        for step in range(4):
            train_steps(engine, step, step + 1)
            engine.save_checkpoint(directory, keep_last=2, save_latest=step < 3)
        assert complete_tags(Path(directory)) == ["global_step3", "global_step4"]
        assert Path(engine.load_checkpoint(directory)[0]).name == "global_step3"


def test_what_is_not_there(world2: World, tmp_path: Path) -> None:
    world2.run(nothing_there, str(tmp_path))


def differing(directory: str) -> str:
    with begin(config_of(2)) as engine:
        try:
            engine.save_checkpoint(directory, f"tag_of_rank_{rank()}")
        except CollectiveError as error:
            return str(error)
    return ""


def test_ranks_with_different_tags(own_world: Any, tmp_path: Path) -> None:
    told = own_world(2).run(differing, str(tmp_path))
    assert any("tag_of_rank_0" in text and "tag_of_rank_1" in text for text in told)
    assert complete_tags(tmp_path) == []


def saves_alone(directory: str) -> None:
    with begin(config_of(2)) as engine:
        train_steps(engine, 0, 2)
        if rank() == 0:
            engine.save_checkpoint(directory)
        train_steps(engine, 2, 4)


@pytest.mark.parametrize("size", [2, 3])
def test_one_rank_that_saves_alone_is_told_within_seconds(own_world: Any, size: int, tmp_path: Path) -> None:
    failures = own_world(size).run_expecting_errors(saves_alone, str(tmp_path))
    assert failures[0] is not None and isinstance(failures[0].exception, CollectiveError), failures[0]
    for words in ("save_checkpoint", "has begun step", "does not come", "Call it on all ranks"):
        assert words in failures[0].message
    assert not complete_tags(tmp_path)


def saves_at_every_turn(directory: str) -> None:
    with begin(config_of(1, accumulation=2)) as engine:
        for step in range(3):
            train_steps(engine, step, step + 1)
            engine.save_checkpoint(directory, step)
            with engine.no_sync():
                engine.backward(engine(torch.zeros(3, FEATURES)).sum())
            engine.save_checkpoint(directory, step)


def test_saves_in_the_middle_of_steps_are_no_absence(world2: World, tmp_path: Path) -> None:
    world2.run(saves_at_every_turn, str(tmp_path))


def scheduler_of_its_own(directory: str) -> None:
    """A state that is no plain value is told with its place, before any file is made."""

    class Odd:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"rule": lambda step: step}

    with begin(config_of(1), lr_scheduler=Odd) as engine:
        with pytest.raises(CheckpointError, match=r"lr_scheduler\.rule is a function"):
            engine.save_checkpoint(directory)
        assert not list(Path(directory).iterdir())


def test_a_scheduler_that_cannot_be_kept(world2: World, tmp_path: Path) -> None:
    world2.run(scheduler_of_its_own, str(tmp_path))
