"""Where events go: CSV files, TensorBoard, Weights & Biases, Comet."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from shardwise.config import EngineConfig
from shardwise.config.tools import CometConfig, FileTrackerConfig, WandbConfig
from shardwise.errors import ConfigError


class Event(NamedTuple):
    """One number at one place of a curve."""

    name: str
    value: float
    samples: int
    """Where on the horizontal axis: samples seen by all ranks."""


class Writer(Protocol):
    """Takes events to one tracker."""

    def write(self, events: Sequence[Event]) -> None:
        """Those of one step; they are safe when this returns, as far as the tracker promises it."""

    def close(self) -> None:
        """No more events come."""


_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Block of the configuration -> package that it needs."""


def check_packages(config: EngineConfig) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: names the key, the package and the extra that brings it.
    """
    for block, package in _PACKAGES.items():
        if getattr(config, block).enabled and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{block}.enabled is true, but the package {package!r} is not installed. "
                f"Run `pip install shardwise[trackers]`, or set {block}.enabled to false."
            )


def build_writers(config: EngineConfig) -> Iterator[Writer]:
    """A writer for each tracker that is switched on."""
    if config.csv_monitor.enabled:
        yield CsvFiles(_directory(config.csv_monitor))
    if config.tensorboard.enabled:
        yield TensorBoard(_directory(config.tensorboard))
    if config.wandb.enabled:
        yield WeightsAndBiases(config.wandb)
    if config.comet.enabled:
        yield Comet(config.comet)


def _directory(settings: FileTrackerConfig) -> Path:
    return Path(settings.output_path) / settings.job_name


class CsvFiles:
    """One file a name, ``Train_Samples_lr.csv`` say, with rows of samples and value; a later run appends to it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._files: dict[str, TextIO] = {}

    def write(self, events: Sequence[Event]) -> None:
        """One row each; whole lines reach the file at once."""
        for event in events:
            csv.writer(self._file(event.name), lineterminator="\n").writerow([event.samples, event.value])

    def _file(self, name: str) -> TextIO:
        if name not in self._files:
            path = self._directory / (name.replace("/", "_").replace(" ", "_") + ".csv")
            file = self._files[name] = path.open("a", newline="", buffering=1)
            if file.tell() == 0:
                csv.writer(file, lineterminator="\n").writerow(["step", name.rsplit("/", 1)[-1]])
        return self._files[name]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


class TensorBoard:
    """An event file of TensorBoard's."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(directory))

    def write(self, events: Sequence[Event]) -> None:
        """One scalar each."""
        for event in events:
            self._writer.add_scalar(event.name, event.value, event.samples)
        self._writer.flush()

    def close(self) -> None:
        """End the writer's thread."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases: the script's own if it began one, else a new one."""

    def __init__(self, settings: WandbConfig) -> None:
        wandb = importlib.import_module("wandb")
        self._is_ours = wandb.run is None
        self._run: Any = wandb.run
        if self._is_ours:
            self._run = wandb.init(project=settings.project, group=settings.group, entity=settings.team)

    def write(self, events: Sequence[Event]) -> None:
        """All events of one step at once. In the script's own run, which counts its own steps, with its next ones."""
        values = {event.name: event.value for event in events}
        if self._is_ours:
            self._run.log(values, step=events[0].samples)
        else:
            self._run.log({**values, "Train/Samples": events[0].samples}, commit=False)

    def close(self) -> None:
        """Finish the run that was begun here."""
        if self._is_ours:
            self._run.finish()


class Comet:
    """An experiment of Comet's; a name is sent again when ``samples_log_interval`` samples have passed."""

    def __init__(self, settings: CometConfig) -> None:
        comet_ml = importlib.import_module("comet_ml")
        self._interval = settings.samples_log_interval
        self._next: dict[str, int] = {}
        self._experiment: Any = comet_ml.start(
            api_key=settings.api_key,
            workspace=settings.workspace,
            project=settings.project,
            experiment_key=settings.experiment_key,
            mode=settings.mode,
            online=settings.online,
        )
        if settings.experiment_name is not None:
            self._experiment.set_name(settings.experiment_name)

    def write(self, events: Sequence[Event]) -> None:
        """One metric each, if it is its time."""
        for event in events:
            if event.samples >= self._next.get(event.name, 0):
                self._next[event.name] = event.samples + self._interval
                self._experiment.log_metric(event.name, event.value, step=event.samples)

    def close(self) -> None:
        """Send what is left."""
        self._experiment.end()
