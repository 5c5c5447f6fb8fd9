"""Which trackers there are by name, and which a script asks for."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from shardwise.errors import ConfigError
from shardwise.process import process_index
from shardwise.trackers.base import GeneralTracker, refuse_incomplete
from shardwise.trackers.files import CsvTracker, JsonLinesTracker
from shardwise.trackers.services import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

_logger = logging.getLogger(__name__)


class LoggerType(StrEnum):
    """Names for ``log_with``. Scripts compare with all of them; those from AIM on have no tracker here."""

    ALL = "all"
    JSONL = "jsonl"
    CSV = "csv"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"
    MLFLOW = "mlflow"
    AIM = "aim"
    COMETML = "comet_ml"
    CLEARML = "clearml"
    DVCLIVE = "dvclive"
    SWANLAB = "swanlab"

    @classmethod
    def list(cls) -> list[str]:
        """All names."""
        return [member.value for member in cls]


LOGGER_TYPE_TO_CLASS: dict[str, type[GeneralTracker]] = {
    "jsonl": JsonLinesTracker,
    "csv": CsvTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandBTracker,
    "trackio": TrackioTracker,
    "mlflow": MLflowTracker,
}
"""Trackers that can be asked for by name."""

_PACKAGES = ("tensorboard", "wandb", "trackio", "mlflow")
"""Those of them that need a package, which has the same name."""

LogWith = str | GeneralTracker | Sequence[str | GeneralTracker] | None
"""What ``Accelerator(log_with=...)`` takes."""


def get_available_trackers() -> list[str]:
    """Names of the trackers whose packages are installed."""
    return [name for name in LOGGER_TYPE_TO_CLASS if _is_installed(name)]


def _is_installed(name: str) -> bool:
    return name not in _PACKAGES or importlib.util.find_spec(name) is not None


def register_tracker_class(tracker_class: type[GeneralTracker]) -> None:
    """Let ``log_with`` ask for a script's own tracker by its name.

    Args:
        tracker_class: made by ``init_trackers`` with the project's name, the logging directory if it requires one, and
            what ``init_kwargs`` has for it.

    Raises:
        ConfigError: it is no complete tracker, or its name is taken.
    """
    if not (isinstance(tracker_class, type) and issubclass(tracker_class, GeneralTracker)):
        raise ConfigError(f"register_tracker_class({tracker_class!r}): expected a subclass of GeneralTracker.")
    refuse_incomplete(tracker_class)
    name = str(tracker_class.name)
    if LOGGER_TYPE_TO_CLASS.get(name, tracker_class) is not tracker_class or name == LoggerType.ALL:
        raise ConfigError(f"register_tracker_class({tracker_class.__name__}): the name {name!r} is taken.")
    LOGGER_TYPE_TO_CLASS[name] = tracker_class


def filter_trackers(log_with: LogWith, logging_dir: str | os.PathLike[str] | None = None) -> list[str | GeneralTracker]:
    """The trackers that ``log_with`` asks for, each once: names, and objects that the script made.

    Args:
        log_with: None, a name, "all", an object, or a list of these.
        logging_dir: for trackers that write files.

    Raises:
        ConfigError: a tracker does not exist, lacks its package or lacks a directory; two have one name.
    """
    asked = [] if log_with is None else [log_with] if isinstance(log_with, (str, GeneralTracker)) else log_with
    if not isinstance(asked, Sequence):
        raise ConfigError(_no_tracker(asked))
    found: dict[str, str | GeneralTracker] = {}
    for tracker in asked:
        name = _checked_name(tracker, logging_dir)
        if found.setdefault(name, tracker) is not tracker and found[name] != tracker:
            raise ConfigError(f"log_with holds two trackers with the name {name!r}. Give one of them another name.")
    if LoggerType.ALL in found:
        del found[LoggerType.ALL]
        # An object of the script's comes before our tracker of the same name.
        found = {**{name: name for name in _all(logging_dir)}, **found}
    return [tracker if isinstance(tracker, GeneralTracker) else name for name, tracker in found.items()]


def _checked_name(tracker: Any, logging_dir: Any) -> str:
    if isinstance(tracker, GeneralTracker):
        refuse_incomplete(type(tracker))
        return str(tracker.name)
    if not isinstance(tracker, str):
        raise ConfigError(_no_tracker(tracker))
    name = str(LoggerType(tracker)) if tracker in LoggerType.list() else tracker
    if name == LoggerType.ALL:
        return name
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(_no_tracker(name))
    if not _is_installed(name):
        raise ConfigError(
            f"log_with asks for {name!r}, but the package {name!r} is not installed. Run "
            '`pip install \'shardwise[trackers]\'`, or ask for "jsonl" or "csv", which need no package.'
        )
    if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and logging_dir is None:
        raise ConfigError(
            f"log_with asks for {name!r}, which writes files, but there is no directory for them. Pass project_dir, or "
            "project_config=ProjectConfiguration(logging_dir=...), to the Accelerator."
        )
    return name


def _all(logging_dir: Any) -> list[str]:
    """What "all" means: what is installed; without a directory, what needs none."""
    installed = get_available_trackers()
    homeless = [
        name for name in installed if logging_dir is None and LOGGER_TYPE_TO_CLASS[name].requires_logging_directory
    ]
    if homeless and process_index() == 0:
        _logger.warning('log_with="all" leaves out %s: pass project_dir for their files', ", ".join(homeless))
    return [name for name in installed if name not in homeless]


def _no_tracker(tracker: Any) -> str:
    names = ", ".join([*LOGGER_TYPE_TO_CLASS, "all"])
    own = "A tracker of your own derives from shardwise.tracking.GeneralTracker; pass an object of it."
    if not isinstance(tracker, str):
        what = f"the class {tracker.__name__}" if isinstance(tracker, type) else f"a {type(tracker).__name__}"
        return f"log_with holds {what}, expected names ({names}) or objects of trackers. {own}"
    near = difflib.get_close_matches(tracker, [*LOGGER_TYPE_TO_CLASS, "all"], 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"log_with asks for {tracker!r}, expected one of {names}.{hint} {own}"
