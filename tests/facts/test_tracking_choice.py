"""Which trackers a script gets for what it asks: what it names or an error, never silently less."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardwise.errors import ConfigError
from shardwise.tracking import (
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
    JsonLinesTracker,
    LoggerType,
    filter_trackers,
    get_available_trackers,
    register_tracker_class,
)


class Own(GeneralTracker):
    name = "own"
    requires_logging_directory = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # scripts do not always call the base class's
        self.arguments = (args, kwargs)

    @property
    def tracker(self) -> list[Any]:
        return []


class Installed:
    """Pretends that of the trackers' packages exactly these are installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if name in packages else None)


def test_names_types_objects_and_lists(tmp_path: Path) -> None:
    own = Own()
    assert filter_trackers(None) == []
    assert filter_trackers("jsonl", tmp_path) == ["jsonl"]
    assert filter_trackers(LoggerType.CSV, tmp_path) == ["csv"]
    assert filter_trackers(own) == [own]
    assert filter_trackers([own, "csv", LoggerType.CSV, "jsonl", own, "csv"], tmp_path) == [own, "csv", "jsonl"]


def test_all_is_what_is_installed_and_own_ones_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Installed(monkeypatch, "wandb", "numpy")
    own = Own()
    assert get_available_trackers() == ["jsonl", "csv", "wandb"]
    assert filter_trackers("all", tmp_path) == ["jsonl", "csv", "wandb"]
    assert filter_trackers(["csv", LoggerType.ALL, own], tmp_path) == ["jsonl", "csv", "wandb", own]


def test_an_object_stands_for_our_tracker_of_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Installed(monkeypatch)
    mine = JsonLinesTracker("project", tmp_path)
    assert filter_trackers(["all", mine], tmp_path) == [mine, "csv"]


def test_all_without_a_directory_says_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Installed(monkeypatch, "wandb", "tensorboard")
    with caplog.at_level(logging.WARNING):
        assert filter_trackers("all") == ["wandb"]
    assert [record.getMessage() for record in caplog.records] == [
        'log_with="all" leaves out jsonl, csv, tensorboard: pass project_dir for their files'
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_missing_package_is_named_with_the_extra(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Installed(monkeypatch)
    expected = rf"'{name}', but the package '{name}' is not installed. Run `pip install 'shardwise\[trackers\]'`"
    with pytest.raises(ConfigError, match=expected):
        filter_trackers(["csv", LoggerType(name)], tmp_path)


@pytest.mark.parametrize("name", ["aim", "comet_ml", "clearml", "dvclive", "swanlab", "tensorboardx", ""])
def test_a_tracker_that_there_is_not_names_those_that_there_are(name: str) -> None:
    expected = f"'{name}', expected one of jsonl, csv, tensorboard, wandb, trackio, mlflow, all.*GeneralTracker"
    with pytest.raises(ConfigError, match=expected):
        filter_trackers(name)


def test_a_typo_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        filter_trackers("wanddb")


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_files_need_a_directory(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}', which writes files.*Pass project_dir"):
        filter_trackers(name)


@pytest.mark.parametrize(
    ("log_with", "message"),
    [
        (Own, "the class Own"),
        ([3], "a int"),
        (3, "a int"),
        ([Own(), Own()], "two trackers with the name 'own'"),
    ],
)
def test_what_is_no_tracker_is_refused(log_with: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        filter_trackers(log_with)


def test_an_unfinished_tracker_is_told_all_that_it_lacks() -> None:
    class Unfinished(GeneralTracker):
        requires_logging_directory = False

        def __init__(self) -> None:
            pass

    class Bare(GeneralTracker):
        pass

    with pytest.raises(ConfigError, match=r"Unfinished lacks name, tracker\."):
        filter_trackers(Unfinished())
    with pytest.raises(ConfigError, match=r"Bare lacks name, requires_logging_directory, tracker\."):
        Bare()


def test_a_registered_class_has_a_name_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.trackers.choose.LOGGER_TYPE_TO_CLASS", registered := dict(LOGGER_TYPE_TO_CLASS))
    register_tracker_class(Own)
    register_tracker_class(Own)
    assert registered["own"] is Own and filter_trackers("own") == ["own"]

    class Shadow(Own):
        name = "wandb"

    with pytest.raises(ConfigError, match="the name 'wandb' is taken"):
        register_tracker_class(Shadow)
    with pytest.raises(ConfigError, match="expected a subclass of GeneralTracker"):
        register_tracker_class(Own())  # type: ignore[arg-type]


def test_the_types_of_accelerate_are_all_there() -> None:
    names = ["ALL", "AIM", "TENSORBOARD", "WANDB", "TRACKIO", "COMETML", "MLFLOW", "CLEARML", "DVCLIVE", "SWANLAB"]
    assert [LoggerType[name] for name in names] == [
        "all", "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab",
    ]  # fmt: skip
    assert set(LOGGER_TYPE_TO_CLASS) < set(LoggerType.list())
