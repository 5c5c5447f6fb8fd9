"""The files of the trackers that need no package: whole after each log, never those of another run."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.tracking import CsvTracker, JsonLinesTracker

SCALARS = {
    "int": 3,
    "float": 0.1,
    "bool": True,
    "text": 'grün, "quoted"\nand on',
    "nothing": None,
    "tensor": torch.tensor(0.5),
    "tensor of one": torch.tensor([[7]]),
    "bf16": torch.tensor(1.5, dtype=torch.bfloat16),
    "with a graph": torch.tensor(2.0, requires_grad=True),
    "numpy float32": np.float32(0.25),
    "numpy float64": np.float64(0.1),
    "numpy int": np.int64(4),
    "numpy bool": np.bool_(False),
    "array of one": np.array([9]),
}
PLAIN = [3, 0.1, True, 'grün, "quoted"\nand on', None, 0.5, 7, 1.5, 2.0, 0.25, 0.1, 4, False, 9]


@pytest.fixture
def jsonl(tmp_path: Path) -> Any:
    tracker = JsonLinesTracker("project", tmp_path)
    tracker.start()
    yield tracker
    tracker.finish()


@pytest.fixture
def table(tmp_path: Path) -> Any:
    tracker = CsvTracker("project", tmp_path)
    tracker.start()
    yield tracker
    tracker.finish()


def lines(tracker: JsonLinesTracker) -> list[dict[str, Any]]:
    text = (tracker.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def rows(tracker: CsvTracker) -> list[list[str]]:
    with (tracker.run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def measured(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("_step", "_time")}


# -- JSON lines


def test_jsonl_holds_every_kind_of_scalar(jsonl: JsonLinesTracker) -> None:
    before = time.time()
    jsonl.log(SCALARS, step=5)
    (line,) = lines(jsonl)
    assert line["_step"] == 5 and before <= line["_time"] <= time.time()
    found = list(measured(line).values())
    assert found == PLAIN and [type(value) for value in found] == [type(value) for value in PLAIN]


def test_jsonl_keeps_nesting_and_turns_tensors_into_lists(jsonl: JsonLinesTracker) -> None:
    jsonl.log({"eval": {"loss": torch.tensor(1.5), 3: (1, np.float32(2))}, "grid": torch.arange(4).reshape(2, 2)})
    assert measured(lines(jsonl)[0]) == {"eval": {"loss": 1.5, "3": [1, 2.0]}, "grid": [[0, 1], [2, 3]]}
    assert lines(jsonl)[0]["_step"] is None


def test_jsonl_stays_json_with_values_that_json_lacks(jsonl: JsonLinesTracker) -> None:
    jsonl.log({"a": math.nan, "b": [math.inf, {"c": torch.tensor(-math.inf)}]})
    assert measured(lines(jsonl)[0]) == {"a": "NaN", "b": ["Infinity", {"c": "-Infinity"}]}
    assert math.isnan(float(lines(jsonl)[0]["a"]))


def test_each_line_is_in_the_file_when_log_returns(jsonl: JsonLinesTracker) -> None:
    for step in range(3):
        jsonl.log({"loss": step}, step=step)
        assert [line["_step"] for line in lines(jsonl)] == list(range(step + 1))


# -- CSV


def test_csv_is_one_table_with_flat_names(table: CsvTracker) -> None:
    table.log({"loss": torch.tensor(0.5), "eval": {"acc": {"top1": np.float32(0.25)}}}, step=1)
    table.log({"loss": 0.125, "eval": {"acc": {"top1": 0.5}}}, step=torch.tensor(2))
    header, first, second = rows(table)
    assert header == ["_step", "_time", "loss", "eval/acc/top1"]
    assert (first[0], first[2:]) == ("1", ["0.5", "0.25"]) and (second[0], second[2:]) == ("2", ["0.125", "0.5"])


def test_csv_holds_every_kind_of_scalar(table: CsvTracker) -> None:
    table.log(SCALARS)
    assert rows(table)[1][2:] == ["" if value is None else str(value) for value in PLAIN]


def test_a_later_name_becomes_a_column_and_no_row_is_lost(table: CsvTracker) -> None:
    table.log({"loss": 3.0}, step=1)
    table.log({"loss": 2.0, "note": 'a, "b"\nc'}, step=2)
    table.log({"acc": 0.5}, step=3)
    table.log({"loss": 1.0, "acc": 0.75}, step=4)
    found = rows(table)
    assert found[0] == ["_step", "_time", "loss", "note", "acc"]
    assert [[row[0], *row[2:]] for row in found[1:]] == [
        ["1", "3.0", "", ""],
        ["2", "2.0", 'a, "b"\nc', ""],
        ["3", "", "", "0.5"],
        ["4", "1.0", "", "0.75"],
    ]
    assert sorted(path.name for path in table.run_dir.iterdir()) == ["metrics.csv"]


def test_a_table_that_cannot_grow_stays_whole(table: CsvTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    table.log({"loss": 3.0}, step=1)
    before = rows(table)

    def refuse(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="no space"):
            table.log({"acc": 0.5}, step=2)
    assert rows(table) == before
    table.log({"acc": 0.75}, step=3)
    assert [[row[0], *row[2:]] for row in rows(table)] == [
        ["_step", "loss", "acc"],
        ["1", "3.0", ""],
        ["3", "", "0.75"],
    ]


# -- both


@pytest.mark.parametrize("kind", [JsonLinesTracker, CsvTracker])
def test_a_second_run_gets_a_directory_of_its_own(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / f"{kind.name}_0007").mkdir()
    (tmp_path / "project" / f"{kind.name}_notes").mkdir()
    trackers = [kind("project", tmp_path) for _ in range(2)]
    for number, tracker in enumerate(trackers):
        tracker.start()
        tracker.store_init_configuration({"run": number})
        tracker.log({"run": number})
    for tracker in trackers:
        tracker.finish()
    assert [tracker.run_dir.name for tracker in trackers] == [f"{kind.name}_0008", f"{kind.name}_0009"]
    for number, tracker in enumerate(trackers):
        assert json.loads((tracker.run_dir / "config.json").read_text()) == {"run": number}
        (metrics,) = tracker.run_dir.glob("metrics.*")
        assert len(metrics.read_text().splitlines()) == (1 if kind is JsonLinesTracker else 2)


def test_two_runs_that_begin_at_the_same_time_do_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = JsonLinesTracker("project", tmp_path), JsonLinesTracker("project", tmp_path)
    first.start()
    with monkeypatch.context() as patched:  # the second has listed the directory before the first made its own
        patched.setattr(Path, "glob", lambda self, pattern: iter(()))
        second.start()
    assert (first.run_dir.name, second.run_dir.name) == ("jsonl_0001", "jsonl_0002")
    first.finish(), second.finish()


def test_any_config_is_kept(jsonl: JsonLinesTracker) -> None:
    config = {"lr": torch.tensor(0.5), "out": Path("a"), "inner": {"betas": (0.9, 0.5), "eps": math.inf}}
    jsonl.store_init_configuration(config)
    found = json.loads((jsonl.run_dir / "config.json").read_text())
    assert found == {"lr": 0.5, "out": "a", "inner": {"betas": [0.9, 0.5], "eps": "Infinity"}}


@pytest.mark.parametrize("kind", [JsonLinesTracker, CsvTracker])
def test_what_cannot_be_held_is_named_once_and_the_rest_is_kept(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = kind("project", tmp_path)
    tracker.start()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tracker.log({"table": object(), "_step": 3, "loss": 0.123456789}, step=1)
    tracker.finish()
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"the tracker {kind.name!r} leaves out '_step'",
        f"the tracker {kind.name!r} leaves out 'table'",
    ]
    (metrics,) = tracker.run_dir.glob("metrics.*")
    assert metrics.read_text().count("0.123456789") == 2 and "object" not in metrics.read_text()


@pytest.mark.parametrize("kind", [JsonLinesTracker, CsvTracker])
def test_arguments_that_would_do_nothing_are_refused(kind: Any, tmp_path: Path) -> None:
    tracker = kind("project", tmp_path)
    tracker.start()
    with pytest.raises(ConfigError, match=f"log_kwargs for '{kind.name}' has commit: it takes no arguments"):
        tracker.log({"a": 1}, commit=False)
    tracker.finish()
