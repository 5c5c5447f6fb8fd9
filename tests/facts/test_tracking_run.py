"""From init_trackers to end_training: values reach every tracker, and one that fails stops neither script nor rest."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.accelerator import Accelerator
from shardwise.errors import ConfigError, StateError
from shardwise.handlers import ProjectConfiguration
from shardwise.process import PartialState
from shardwise.state import AcceleratorState
from shardwise.tracking import GeneralTracker, on_main_process


@pytest.fixture(autouse=True)
def _fresh_process() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Notes(GeneralTracker):
    """Keeps what it is told; fails where it is told to."""

    requires_logging_directory = False

    def __init__(self, name: str = "notes", fails: tuple[str, ...] = ()) -> None:
        self.name = name
        self.fails = fails
        self.calls: list[Any] = []
        super().__init__()

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def _note(self, what: str, *more: Any) -> None:
        if what in self.fails:
            raise ConnectionError("the server is away")
        self.calls.append((what, *more))

    def start(self) -> None:
        self._note("start")

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._note("config", values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._note("log", values, step, kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._note("images", values, step, kwargs)

    def finish(self) -> None:
        self._note("finish")


Notes.name = "notes"


def only_line(directory: Path, run: str = "jsonl_0001") -> dict[str, Any]:
    (line,) = (directory / "project" / run / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


def test_the_life_of_a_run(tmp_path: Path) -> None:
    notes = Notes()
    accelerator = Accelerator(cpu=True, log_with=["jsonl", notes], project_dir=str(tmp_path))
    assert accelerator.trackers == [] and accelerator.log_with == ["jsonl", notes]
    loss, image = torch.tensor(0.5), object()
    accelerator.init_trackers("project", config={"lr": 0.1}, init_kwargs={"wandb": {"tags": ["not chosen"]}})
    accelerator.log({"loss": loss}, step=3, log_kwargs={"notes": {"commit": False}, "wandb": {"commit": True}})
    accelerator.log_images({"sample": [image]}, step=3)
    assert [tracker.name for tracker in accelerator.trackers] == ["jsonl", "notes"]
    accelerator.end_training()
    assert notes.calls == [
        ("start",),
        ("config", {"lr": 0.1}),
        ("log", {"loss": loss}, 3, {"commit": False}),
        ("images", {"sample": [image]}, 3, {}),
        ("finish",),
    ]
    assert notes.calls[2][1]["loss"] is loss  # a tracker of the script's own gets what the script logged
    assert only_line(tmp_path) | {"_time": 0} == {"_step": 3, "_time": 0, "loss": 0.5}


def test_another_run_may_follow(tmp_path: Path) -> None:
    accelerator = Accelerator(
        cpu=True,
        log_with="jsonl",
        project_config=ProjectConfiguration(project_dir="elsewhere", logging_dir=str(tmp_path)),
    )
    for run in range(2):
        accelerator.init_trackers("project")
        with pytest.raises(StateError, match="jsonl run already"):
            accelerator.init_trackers("project")
        accelerator.log({"run": run})
        accelerator.end_training()
    assert [only_line(tmp_path, f"jsonl_000{number}")["run"] for number in (1, 2)] == [0, 1]


def test_get_tracker(tmp_path: Path) -> None:
    notes = Notes()
    accelerator = Accelerator(cpu=True, log_with=[notes, "jsonl"], project_dir=str(tmp_path))
    accelerator.init_trackers("project")
    assert accelerator.get_tracker("notes") is notes
    assert accelerator.get_tracker("notes", unwrap=True) is notes.calls
    assert accelerator.get_tracker("jsonl", unwrap=True) == tmp_path / "project" / "jsonl_0001"
    with pytest.raises(ConfigError, match=r"get_tracker\('wandb'\): expected one of notes, jsonl"):
        accelerator.get_tracker("wandb")
    accelerator.end_training()


def test_a_script_without_trackers_may_call_everything() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.init_trackers("project", config={"lr": 0.1}, init_kwargs={"tensorboard": {}})
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.log_images({"a": []})
    tracker = accelerator.get_tracker("tensorboard")
    tracker.log({"loss": 1.0}, step=1)
    tracker.log_images({"a": []})
    assert accelerator.trackers == []
    accelerator.end_training()


def test_values_that_reach_nobody_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True, log_with="jsonl", project_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            accelerator.log({"loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "log() tracks nothing: init_trackers() has not been called, or end_training() has"
    ]


def test_a_tracker_that_fails_is_told_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = Notes("broken", fails=("log", "images", "finish"))
    accelerator = Accelerator(cpu=True, log_with=[broken, "jsonl"], project_dir=str(tmp_path))
    accelerator.init_trackers("project")
    with caplog.at_level(logging.WARNING):
        accelerator.log({"loss": 1.0}, step=1)
        accelerator.log({"loss": 1.0}, step=2)
        accelerator.log_images({"a": []})
        accelerator.end_training()
    lines = (tmp_path / "project" / "jsonl_0001" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["_step"] for line in lines] == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker 'broken' failed in log(): ConnectionError: the server is away. Training goes on; further failures "
        "are counted",
        "the tracker 'jsonl' keeps no images: a left out",
        "the tracker 'broken' failed 4 times in this run",
    ]
    assert accelerator.trackers == []


@pytest.mark.parametrize("where", ["start", "config"])
def test_a_tracker_that_does_not_start_is_an_error_and_the_others_end(where: str) -> None:
    first, broken = Notes("first"), Notes("broken", fails=(where,))
    accelerator = Accelerator(cpu=True, log_with=[first, broken])
    with pytest.raises(ConnectionError, match="the server is away") as caught:
        accelerator.init_trackers("project", config={})
    assert caught.value.__notes__ == ["This was the tracker 'broken' at its start."]
    assert first.calls[-1] == ("finish",) and accelerator.trackers == []


def test_mistakes_in_calls_are_errors(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with=["jsonl", Notes()], project_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="init_kwargs has arguments for 'wndb', which is no tracker"):
        accelerator.init_trackers("project", init_kwargs={"wndb": {}})
    with pytest.raises(ConfigError, match="init_kwargs has arguments for 'notes', which the script has made already"):
        accelerator.init_trackers("project", init_kwargs={"notes": {"a": 1}})
    with pytest.raises(ConfigError, match=r"init_trackers\(config=...\) is a list, expected a dict"):
        accelerator.init_trackers("project", config=[1])  # type: ignore[arg-type]
    accelerator.init_trackers("project")
    with pytest.raises(ConfigError, match=r"log\(values\) is a float, expected a dict"):
        accelerator.log(0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"log_kwargs\['jsonl'\] is a int, expected a dict"):
        accelerator.log({}, log_kwargs={"jsonl": 3})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="log_kwargs for 'jsonl' has commit"):
        accelerator.log({}, log_kwargs={"jsonl": {"commit": 3}})
    accelerator.end_training()


def test_a_wrong_log_with_leaves_no_half_made_process() -> None:
    with pytest.raises(ConfigError, match="log_with asks for 'jsonl', which writes files"):
        Accelerator(cpu=True, log_with="jsonl")
    assert not PartialState._shared_state
