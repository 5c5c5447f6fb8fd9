"""TensorBoard, Weights & Biases, Trackio and MLflow get what the script logged, in the form that each of them takes.

A package that is installed is tried itself, offline; what it is told is also checked on a stand-in, without any.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shardwise.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


class Recorder:
    """Stands for a module, a run or a writer: notes each call and answers with itself."""

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


def install(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> Recorder:
    module = Recorder(__spec__=SimpleNamespace(name=name), **values)
    monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    return module


CONFIG = {"lr": torch.tensor(0.5), "model": {"layers": 2, "name": "tiny"}, "betas": (0.9, 0.5), "seed": None}


# -- TensorBoard


def tensorboard(writer: Recorder) -> TensorBoardTracker:
    tracker = TensorBoardTracker("project", "logs")
    tracker.writer = writer
    return tracker


def test_tensorboard_has_a_form_for_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    tracker = tensorboard(writer := Recorder())
    values = {
        "loss": torch.tensor([0.5]),
        "rank": np.int64(3),
        "note": "text",
        "lr": {"head": torch.tensor(0.25), "body": 1},
        "histogram": torch.arange(3),
    }
    with caplog.at_level(logging.WARNING):
        tracker.log(values, step=7, walltime=1.0)
    at = {"global_step": 7, "walltime": 1.0}
    assert writer.calls == [
        ("add_scalar", ("loss", 0.5), at),
        ("add_scalar", ("rank", 3), at),
        ("add_text", ("note", "text"), at),
        ("add_scalars", ("lr", {"head": 0.25, "body": 1}), at),
        ("flush", (), {}),
    ]
    assert ["leaves out 'histogram': it is a Tensor" in record.getMessage() for record in caplog.records] == [True]


def test_tensorboard_gets_nested_settings_flat() -> None:
    tracker = tensorboard(writer := Recorder())
    tracker.store_init_configuration(CONFIG)
    settings = {"lr": 0.5, "model/layers": 2, "model/name": "tiny", "betas": "[0.9, 0.5]", "seed": "None"}
    assert writer.calls[0] == ("add_hparams", (settings, {}), {"run_name": "."})


def test_tensorboard_gets_images_as_one_array() -> None:
    tracker = tensorboard(writer := Recorder())
    array = np.zeros((2, 3, 4, 4), np.uint8)
    tracker.log_images({"array": array}, step=1)
    tracker.log_images({"list": [np.zeros((4, 5, 3)), np.ones((4, 5, 3))], "grey": [np.zeros((4, 5))]})
    (_, (name, given), kwargs), _, (_, (_, stacked), listed), (_, (_, grey), _), _ = writer.calls
    assert name == "array" and given is array and kwargs == {"global_step": 1}
    assert stacked.shape == (2, 4, 5, 3) and grey.shape == (1, 4, 5, 1)
    assert listed == {"global_step": None, "dataformats": "NHWC"}


@needs("tensorboard")
def test_tensorboard_reads_what_was_written_without_a_second_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker("project", tmp_path, flush_secs=1000)
    tracker.start()
    tracker.store_init_configuration(CONFIG)
    tracker.log({"loss": torch.tensor(0.5)}, step=3)
    tracker.log_images({"image": [np.zeros((4, 4, 3), np.uint8)]}, step=3) if importlib.util.find_spec("PIL") else None
    found = EventAccumulator(str(tmp_path / "project")).Reload()  # before finish: each log is flushed
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(3, 0.5)]
    assert "_hparams_/session_start_info" in found.summary_metadata
    assert not [path for path in (tmp_path / "project").iterdir() if path.is_dir()]
    tracker.finish()


# -- Weights & Biases


def test_wandb_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder(config=(config := Recorder()))
    wandb = install(
        monkeypatch, "wandb", init=lambda **kwargs: (started.append(kwargs), run)[1], Image=lambda it: ("I", it)
    )
    started: list[Any] = []
    tracker = WandBTracker("project", tags=["a"])
    tracker.start()
    tracker.store_init_configuration(CONFIG)
    picture = object()
    tracker.log(
        {"loss": torch.tensor(0.5), "eval": {"acc": np.float32(0.25)}, "picture": picture}, step=3, commit=False
    )
    tracker.log_images({"samples": [1, 2]}, step=4)
    tracker.finish()
    assert started == [{"project": "project", "tags": ["a"]}] and tracker.tracker is run
    plain = {"lr": 0.5, "model": {"layers": 2, "name": "tiny"}, "betas": [0.9, 0.5], "seed": None}
    assert config.calls == [("update", (plain,), {"allow_val_change": True})]
    assert run.calls == [
        ("log", ({"loss": 0.5, "eval": {"acc": 0.25}, "picture": picture},), {"step": 3, "commit": False}),
        ("log", ({"samples": [("I", 1), ("I", 2)]},), {"step": 4}),
        ("finish", (), {}),
    ]
    tracker.log_table("t", columns=["c"], data=[[1]])
    assert wandb.calls == [("Table", (), {"columns": ["c"], "data": [[1]], "dataframe": None})]


def test_a_project_among_the_arguments_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = install(monkeypatch, "wandb")
    WandBTracker("project", project="other").start()
    assert wandb.calls == [("init", (), {"project": "other"})]


@needs("wandb")
def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = WandBTracker("project", mode="offline", dir=str(tmp_path))
    tracker.start()
    tracker.store_init_configuration(CONFIG)
    tracker.log({"loss": torch.tensor(0.5)}, step=3, commit=True)
    assert tracker.run.config["model"] == {"layers": 2, "name": "tiny"} and tracker.run.summary["loss"] == 0.5
    tracker.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


# -- Trackio


def test_trackio_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorder(config=(config := {}))
    install(monkeypatch, "trackio", init=lambda **kwargs: (started.append(kwargs), run)[1], Image=lambda it: ("I", it))
    started: list[Any] = []
    tracker = TrackioTracker("project", group="g")
    tracker.start()
    tracker.store_init_configuration({"lr": torch.tensor(0.5)})
    tracker.log({"loss": torch.tensor(0.5)}, step=3)
    tracker.log_images({"one": [1], "two": [1, 2]}, step=4)
    tracker.finish()
    assert started == [{"project": "project", "group": "g"}] and config == {"lr": 0.5}
    assert run.calls == [
        ("log", ({"loss": 0.5},), {"step": 3}),
        ("log", ({"one": ("I", 1), "two/0": ("I", 1), "two/1": ("I", 2)},), {"step": 4}),
        ("finish", (), {}),
    ]


# -- MLflow


def test_mlflow_makes_the_experiment_and_takes_numbers_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = install(monkeypatch, "mlflow", get_experiment_by_name=lambda name: None)
    monkeypatch.setenv("MLFLOW_TAGS", json.dumps({"team": "t"}))
    tracker = MLflowTracker("project", logging_dir=Path("artifacts"), tags={"team": "yields"})
    tracker.start()
    tracker.store_init_configuration({**CONFIG, "long": "x" * 6001, **{f"key{index}": index for index in range(150)}})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.log({"loss": torch.tensor(0.5), "eval": {"acc": 1}, "note": "text"}, step=step)
    tracker.finish()
    (made, started, first, second, *logs, ended) = mlflow.calls
    assert made == ("create_experiment", ("project",), {"artifact_location": "artifacts"})
    assert started[0] == "start_run" and started[2]["tags"] == {"team": "t"} and started[2]["nested"] is False
    assert first[0] == second[0] == "log_params" and (len(first[1][0]), len(second[1][0])) == (100, 55)
    assert first[1][0]["model/layers"] == 2 and "long" not in first[1][0]
    assert logs == [("log_metrics", ({"loss": 0.5, "eval/acc": 1},), {"step": step}) for step in (1, 2)]
    assert ended == ("end_run", (), {})
    assert [record.getMessage().split("'")[3] for record in caplog.records] == ["long", "note"]


def test_mlflow_goes_on_in_an_experiment_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    there = SimpleNamespace(experiment_id="7")
    mlflow = install(monkeypatch, "mlflow", get_experiment_by_name=lambda name: (asked.append(name), there)[1])
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from outside")
    MLflowTracker("project").start()
    assert asked == ["from outside"]
    assert [(name, kwargs["experiment_id"]) for name, _, kwargs in mlflow.calls] == [("start_run", "7")]


@needs("mlflow")
def test_mlflow_reads_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        tracker = MLflowTracker("project", logging_dir=tmp_path / "artifacts")
        tracker.start()
        tracker.store_init_configuration(CONFIG)
        tracker.log({"loss": torch.tensor(0.5)}, step=3)
        tracker.finish()
        run = mlflow.get_run(tracker.active_run.info.run_id)
        assert run.data.metrics == {"loss": 0.5} and run.data.params["model/name"] == "tiny"
        assert run.info.status == "FINISHED"
    finally:
        mlflow.set_tracking_uri(before)
