"""What every tracker is: the base class of shardwise's own and of a script's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from shardwise.errors import ConfigError
from shardwise.process import process_index

_logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def on_main_process(function: Callable[P, R]) -> Callable[P, R | None]:
    """Decorator for methods of a tracker: run on the first process alone, if the tracker is ``main_process_only``."""

    @wraps(function)
    def gated(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if is_at_home(args[0]) else None

    return gated


def is_at_home(tracker: Any) -> bool:
    """Whether ``tracker`` acts on this process."""
    return process_index() == 0 or not getattr(tracker, "main_process_only", False)


class GeneralTracker:
    """A tracker. A script's own derives from this one, and an object of it goes into ``Accelerator(log_with=...)``.

    A subclass says its ``name`` and ``requires_logging_directory`` as attributes of the class, and has a property
    ``tracker``: the object that does the work, for ``get_tracker(name, unwrap=True)``. It overrides those of the
    methods below that it has a use for. They are called on the first process, in the order in which they stand here;
    on every process where ``main_process_only`` is false. Values arrive as the script logged them.
    """

    name: str
    requires_logging_directory: bool
    main_process_only: bool = True

    def __init__(self, _blank: bool = False) -> None:
        if not _blank:
            refuse_incomplete(type(self))

    def start(self) -> None:
        """A run begins. What is slow or needs the process group belongs here rather than into the constructor."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the settings of the run.

        Args:
            values: as the script gave them to ``init_trackers``, nested or not.
        """

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Keep what was measured.

        Args:
            values: by name.
            step: where on the horizontal axis.
            kwargs: what ``accelerator.log(log_kwargs={name: ...})`` has for this tracker.
        """

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Keep pictures; a tracker that does not override this keeps none and says so.

        Args:
            values: by name; an array of images or a list of arrays or of PIL images.
            step: where on the horizontal axis.
            kwargs: what ``accelerator.log_images(log_kwargs={name: ...})`` has for this tracker.
        """
        if hasattr(self, "name"):  # else it stands for a tracker of the first process, on another one
            _logger.warning("the tracker %r keeps no images: %s left out", self.name, ", ".join(values))

    def finish(self) -> None:
        """The run is over: write or send what is left."""


def refuse_incomplete(tracker: type[Any]) -> None:
    """ConfigError, with all that is missing, for a class of trackers that does not say what a subclass must say."""
    missing = [name for name in ("name", "requires_logging_directory", "tracker") if not hasattr(tracker, name)]
    if missing:
        raise ConfigError(f"{tracker.__name__} lacks {', '.join(missing)}. A tracker defines them in its class.")


def known(values: Any, what: str) -> dict[str, Any]:
    """``values`` as a dict with names for keys.

    Raises:
        ConfigError: it is no mapping.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} is a {type(values).__name__}, expected a dict of values by name.")
    return {str(name): value for name, value in values.items()}
