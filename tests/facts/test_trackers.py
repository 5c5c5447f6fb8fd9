"""Trackers get the right numbers in the right form; one that is not installed is named before anything is built."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from shardwise.config import load_config
from shardwise.errors import ConfigError
from shardwise.monitor.events import TrainingEvents
from shardwise.monitor.observer import StepReport
from shardwise.monitor.writers import CsvFiles, Event, build_writers


class Recorder:
    """A module that notes every call of its functions and of what they return."""

    def __init__(self, **values: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append((name, args, kwargs))
            return self

        return call


def install(monkeypatch: pytest.MonkeyPatch, name: str, module: Recorder) -> Recorder:
    module.__spec__ = SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    return module


# -- CSV


def test_a_csv_file_a_name_with_one_head_however_many_runs(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "job"
    for run in range(2):
        files = CsvFiles(directory)
        files.write([Event("Train/Samples/lr", 0.5, 8 + run), Event("Train/Samples/train loss", 1.25, 8 + run)])
        files.close()
    assert sorted(path.name for path in directory.iterdir()) == ["Train_Samples_lr.csv", "Train_Samples_train_loss.csv"]
    assert (directory / "Train_Samples_lr.csv").read_text() == "step,lr\n8,0.5\n9,0.5\n"


def test_rows_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    files = CsvFiles(tmp_path)
    files.write([Event("a", 1.0, 1)])
    assert (tmp_path / "a.csv").read_text() == "step,a\n1,1.0\n"
    files.close()


# -- the services, by what they are told


def test_wandb_gets_a_run_of_its_own_over_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = install(monkeypatch, "wandb", Recorder(run=None))
    config = load_config({"wandb": {"enabled": True, "project": "p", "group": "g", "team": "t"}})
    (writer,) = build_writers(config)
    writer.write([Event("a", 1.0, 16), Event("b", 2.0, 16)])
    writer.close()
    assert wandb.calls == [
        ("init", (), {"project": "p", "group": "g", "entity": "t"}),
        ("log", ({"a": 1.0, "b": 2.0},), {"step": 16}),
        ("finish", (), {}),
    ]


def test_a_run_that_the_script_began_keeps_its_steps_and_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder()
    wandb = install(monkeypatch, "wandb", Recorder(run=run))
    (writer,) = build_writers(load_config({"wandb": {"enabled": True}}))
    writer.write([Event("a", 1.0, 16)])
    writer.close()
    assert wandb.calls == []
    assert run.calls == [("log", ({"a": 1.0, "Train/Samples": 16},), {"commit": False})]


def test_comet_gets_each_metric_once_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    comet = install(monkeypatch, "comet_ml", Recorder())
    block = {"enabled": True, "samples_log_interval": 20, "project": "p", "experiment_name": "n", "online": False}
    (writer,) = build_writers(load_config({"comet": block}))
    for samples in (8, 16, 24, 32, 40, 48):
        writer.write([Event("a", float(samples), samples)])
    writer.close()
    (start, (name, args, _), *rest) = comet.calls
    assert start[0] == "start" and start[2]["project"] == "p" and start[2]["online"] is False
    assert (name, args) == ("set_name", ("n",))
    assert [(call, args[1:], kwargs) for call, args, kwargs in rest] == [
        ("log_metric", (8.0,), {"step": 8}),
        ("log_metric", (32.0,), {"step": 32}),
        ("end", (), {}),
    ]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    block = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    (writer,) = build_writers(load_config({"tensorboard": block}))
    writer.write([Event("Train/Samples/lr", 0.5, 16)])
    writer.close()
    found = EventAccumulator(str(tmp_path / "job")).Reload().Scalars("Train/Samples/lr")
    assert [(event.step, event.value) for event in found] == [(16, 0.5)]


@pytest.mark.parametrize("block", ["tensorboard", "wandb", "comet"])
def test_a_missing_package_is_named_with_the_extra(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{block}.enabled is true, but .*`pip install shardwise\[trackers\]`"):
        shardwise.initialize(model=nn.Linear(2, 2), config={block: {"enabled": True}}, device="cpu")


# -- what is written


class Kept:
    """A writer that keeps what it gets."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def write(self, events: Any) -> None:
        self.events += events

    def close(self) -> None:
        self.closed = True


def test_losses_of_a_step_are_averaged_and_forgotten() -> None:
    kept = Kept()
    events = TrainingEvents([kept], with_loss_scale=True)
    for step in (1, 2):
        for loss in (1.0, 2.0):
            events.take_loss(torch.tensor(loss * step, requires_grad=True))
        events.after_step(StepReport(step, 8 * step, (0.1, 0.2), 1024.0, 0))
    events.close()
    assert kept.closed
    assert kept.events == [
        ("Train/Samples/train_loss", 1.5, 8),
        ("Train/Samples/lr", 0.1, 8),
        ("Train/Samples/loss_scale", 1024.0, 8),
        ("Train/Samples/train_loss", 3.0, 16),
        ("Train/Samples/lr", 0.1, 16),
        ("Train/Samples/loss_scale", 1024.0, 16),
    ]


def test_a_step_without_an_engines_backward_has_no_loss_to_write() -> None:
    kept = Kept()
    events = TrainingEvents([kept], with_loss_scale=False)
    events.after_step(StepReport(1, 8, (0.1,), 1.0, 0))
    assert [event.name for event in kept.events] == ["Train/Samples/lr"]
