"""Trackers live on the first rank; neither that nor one that fails makes the other ranks wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.accelerator import Accelerator
from shardwise.errors import ConfigError
from shardwise.state import AcceleratorState
from shardwise.tracking import GeneralTracker
from tests.worlds import World


class Failing(GeneralTracker):
    name = "failing"
    requires_logging_directory = False
    tracker = None

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        raise ConnectionError("the server is away")

    def finish(self) -> None:
        raise ConnectionError("the server is away")


class Everywhere(GeneralTracker):
    name = "everywhere"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.seen

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.seen.append((values, step))


def fresh(**kwargs: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **kwargs)


def training(directory: str) -> dict[str, Any]:
    everywhere = Everywhere()
    accelerator = fresh(log_with=["jsonl", "csv", Failing(), everywhere], project_dir=directory)
    accelerator.init_trackers("project", config={"lr": 0.5})
    model, optimizer = torch.nn.Linear(3, 1), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(3):
        loss = model(torch.full((2, 3), 1.0 + accelerator.process_index)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        accelerator.log({"loss": losses[-1]}, step=step)
        if accelerator.is_main_process:  # as scripts do it as well
            accelerator.log({"extra": step}, step=step)
    found = {
        "losses": losses,
        "running": [tracker.name for tracker in accelerator.trackers],
        "stand-in": type(accelerator.get_tracker("jsonl")).__name__,
        "seen": len(everywhere.seen),
    }
    accelerator._trackers.finish()  # the world keeps its process group
    accelerator.free_memory()
    return found


def test_one_file_for_all_ranks_and_no_rank_waits_for_a_tracker_that_fails(world2: World, tmp_path: Path) -> None:
    first, second = world2.run(training, str(tmp_path))
    assert first["running"] == ["jsonl", "csv", "failing", "everywhere"] and second["running"] == ["everywhere"]
    assert (first["stand-in"], second["stand-in"]) == ("JsonLinesTracker", "GeneralTracker")
    assert (first["seen"], second["seen"]) == (6, 3)
    assert sorted(path.name for path in (tmp_path / "project").iterdir()) == ["csv_0001", "jsonl_0001"]
    lines = [json.loads(line) for line in (tmp_path / "project/jsonl_0001/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == first["losses"] == second["losses"]
    assert [line["extra"] for line in lines if "extra" in line] == [0, 1, 2]


def mistakes(directory: str) -> None:
    accelerator = fresh(log_with="jsonl", project_dir=directory)
    with pytest.raises(ConfigError, match="is no tracker"):
        accelerator.init_trackers("project", init_kwargs={"jsonlines": {}})
    with pytest.raises(ConfigError, match="expected a dict"):
        accelerator.log([1.0])  # type: ignore[arg-type]
    accelerator.wait_for_everyone()


def test_a_mistake_in_a_call_is_an_error_on_every_rank(world2: World, tmp_path: Path) -> None:
    world2.run(mistakes, str(tmp_path))


def whole_life(directory: str) -> bool:
    accelerator = fresh(log_with=["csv", Failing()], project_dir=directory)
    if accelerator.is_main_process:
        accelerator.init_trackers("project")
    accelerator.log({"a": 1})
    accelerator.end_training()
    return torch.distributed.is_initialized()


def test_trackers_end_before_the_process_group_which_ends_whatever_they_do(own_world: Any, tmp_path: Path) -> None:
    world = own_world(2, process_group=False)
    assert world.run(whole_life, str(tmp_path)) == [False, False]
    assert (tmp_path / "project/csv_0001/metrics.csv").read_text().splitlines()[0] == "_step,_time,a"
