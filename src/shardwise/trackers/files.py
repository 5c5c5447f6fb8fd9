"""Trackers that need no package: a run is a directory with a table and the settings of the run.

::

    logging_dir/project/jsonl_0001/config.json      what init_trackers got
                                  /metrics.jsonl    one line a log
                       /jsonl_0002/...              the next run: a run never writes into the directory of another
                       /csv_0001/config.json
                                /metrics.csv

Beside the values each line has ``_step``, as the script gave it, and ``_time``, in seconds since 1970.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from shardwise.errors import ConfigError
from shardwise.trackers.base import GeneralTracker, on_main_process
from shardwise.trackers.values import SCALARS, LeftOut, flat, plain

RESERVED = ("_step", "_time")


class _RunDirectory(GeneralTracker):
    """What both have in common: the directory and the settings in it."""

    name: str
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        self.run_name = run_name
        self.logging_dir = Path(logging_dir)
        self._left_out = LeftOut(self.name)

    @property
    def tracker(self) -> Path:
        """The directory of the run."""
        return self.run_dir

    def _begin(self) -> None:
        self.run_dir = _new_directory(self.logging_dir / self.run_name, self.name)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Write ``config.json``; what JSON has no form for is written as ``str`` says it."""
        text = json.dumps(_for_json(plain(values)), indent=2, ensure_ascii=False, default=str)
        (self.run_dir / "config.json").write_text(text + "\n", encoding="utf-8")

    def _refuse(self, arguments: dict[str, Any]) -> None:
        if arguments:
            raise ConfigError(f"log_kwargs for {self.name!r} has {', '.join(arguments)}: it takes no arguments.")

    def _without_reserved(self, values: dict[str, Any]) -> dict[str, Any]:
        for name in RESERVED:
            if name in values:
                self._left_out.tell(name, values[name], f"another name: {name} is a column of the tracker's own")
        return {name: value for name, value in values.items() if name not in RESERVED}


class JsonLinesTracker(_RunDirectory):
    """``jsonl``: one JSON object a log, complete in the file when ``log`` returns.

    Nested dicts stay nested and tensors become lists. JSON has no NaN and no infinity: they are written as the strings
    "NaN", "Infinity" and "-Infinity".

    Args:
        run_name: the project: a directory.
        logging_dir: where that directory is.
    """

    name = "jsonl"

    @on_main_process
    def start(self) -> None:
        """Make the directory of a new run."""
        self._begin()
        self._file: TextIO = (self.run_dir / "metrics.jsonl").open("x", encoding="utf-8")

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append one line."""
        self._refuse(kwargs)
        row: dict[str, Any] = {"_step": plain(step), "_time": time.time()}
        for name, value in self._without_reserved(plain(values)).items():
            try:
                held = _for_json(value)
                json.dumps(held, allow_nan=False)
            except (TypeError, ValueError):
                self._left_out.tell(name, value, "a number, a string, or lists and dicts of them")
            else:
                row[name] = held
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    @on_main_process
    def finish(self) -> None:
        """Close the file."""
        self._file.close()


class CsvTracker(_RunDirectory):
    """``csv``: one row a log and one column a name, complete in the file when ``log`` returns.

    A name that appears later becomes a further column, for which the file is written anew and put in the place of the
    old one. Nested dicts are flattened to names such as ``eval/loss``.

    Args:
        run_name: the project: a directory.
        logging_dir: where that directory is.
    """

    name = "csv"

    @on_main_process
    def start(self) -> None:
        """Make the directory of a new run."""
        self._begin()
        self._path = self.run_dir / "metrics.csv"
        self._columns = list(RESERVED)
        self._file: TextIO = self._path.open("x", newline="", encoding="utf-8")
        _write_rows(self._file, [self._columns])

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append one row; a column that it has no value for stays empty."""
        self._refuse(kwargs)
        row: dict[str, Any] = {"_step": plain(step), "_time": time.time()}
        for name, value in self._without_reserved(flat(values)).items():
            if value is None or isinstance(value, SCALARS):
                row[name] = value
            else:
                self._left_out.tell(name, value, "a number or a string")
        new = [name for name in row if name not in self._columns]
        if new:
            self._widen(new)
        _write_rows(self._file, [[row.get(name) for name in self._columns]])

    def _widen(self, new: list[str]) -> None:
        with self._path.open(newline="", encoding="utf-8") as old:
            _, *rows = csv.reader(old)
        beside = self._path.with_suffix(".csv.new")
        with beside.open("w", newline="", encoding="utf-8") as file:
            _write_rows(file, [self._columns + new, *[row + [""] * len(new) for row in rows]])
        beside.replace(self._path)
        # Only now: a full disk leaves table, columns and open file as they were.
        self._columns += new
        self._file.close()
        self._file = self._path.open("a", newline="", encoding="utf-8")

    @on_main_process
    def finish(self) -> None:
        """Close the file."""
        self._file.close()


def _write_rows(file: TextIO, rows: list[list[Any]]) -> None:
    csv.writer(file, lineterminator="\n").writerows(rows)
    file.flush()


def _new_directory(project: Path, kind: str) -> Path:
    """Make ``project/kind_N`` with N above every one that is there, also when two runs begin at the same time."""
    project.mkdir(parents=True, exist_ok=True)
    taken = [path.name.removeprefix(f"{kind}_") for path in project.glob(f"{kind}_*")]
    number = 1 + max((int(name) for name in taken if name.isdecimal()), default=0)
    while True:
        directory = project / f"{kind}_{number:04d}"
        try:
            directory.mkdir()
        except FileExistsError:
            number += 1
        else:
            return directory


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _for_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_for_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if hasattr(value, "tolist"):  # tensors and arrays of several elements
        return _for_json(value.tolist())
    return value
