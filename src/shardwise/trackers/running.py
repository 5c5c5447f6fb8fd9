"""The trackers of one ``Accelerator`` from ``init_trackers`` to ``end_training``."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardwise.errors import ConfigError, StateError
from shardwise.process import process_index
from shardwise.trackers.base import GeneralTracker, is_at_home, known
from shardwise.trackers.choose import LOGGER_TYPE_TO_CLASS, LoggerType

_logger = logging.getLogger(__name__)


class Trackers:
    """Those that were chosen, and of them those that run on this process.

    Nothing here waits for other processes, so a script may call it on the first process alone or on all. What is wrong
    in the arguments is an error wherever the call is made. What goes wrong in a tracker itself is an error when it
    starts; later it is a warning, since the other processes go on training and would miss this one.

    Args:
        chosen: as ``filter_trackers`` gives them.
        logging_dir: for trackers that write files.
    """

    def __init__(
        self, chosen: Sequence[str | GeneralTracker], logging_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.chosen = list(chosen)
        self.running: list[GeneralTracker] = []
        self._logging_dir = logging_dir
        self._failures: Counter[str] = Counter()
        self._told_of_no_start = False

    # --- a run begins and ends -----------------------------------------------------------------------------------

    def start(
        self, project_name: str, config: Mapping[str, Any] | None, init_kwargs: Mapping[str, Mapping[str, Any]] | None
    ) -> None:
        """Make and start what belongs on this process.

        Raises:
            ConfigError: ``config`` or ``init_kwargs`` is not what it should be.
            StateError: trackers run already.
        """
        settings = None if config is None else known(config, "init_trackers(config=...)")
        arguments = self._by_tracker(init_kwargs, "init_kwargs")
        for tracker in self.chosen:
            if isinstance(tracker, GeneralTracker) and arguments.get(tracker.name):
                raise ConfigError(
                    f"init_kwargs has arguments for {tracker.name!r}, which the script has made already: give them to "
                    f"{type(tracker).__name__}()."
                )
        if self.running:
            names = ", ".join(tracker.name for tracker in self.running)
            raise StateError(f"init_trackers(): {names} run already. end_training() ends them.")
        try:
            for chosen in self.chosen:
                if is_at_home(chosen if isinstance(chosen, GeneralTracker) else LOGGER_TYPE_TO_CLASS[chosen]):
                    self._start(self._made(chosen, project_name, arguments), settings)
        except BaseException:
            self.finish()
            raise

    def _made(self, chosen: str | GeneralTracker, project_name: str, arguments: dict[str, Any]) -> GeneralTracker:
        if isinstance(chosen, GeneralTracker):
            return chosen
        made: Callable[..., GeneralTracker] = LOGGER_TYPE_TO_CLASS[chosen]
        place = (self._logging_dir,) if LOGGER_TYPE_TO_CLASS[chosen].requires_logging_directory else ()
        return made(project_name, *place, **arguments.get(chosen, {}))

    def _start(self, tracker: GeneralTracker, settings: dict[str, Any] | None) -> None:
        try:
            tracker.start()
            self.running.append(tracker)
            if settings is not None:
                tracker.store_init_configuration(settings)
        except Exception as error:
            error.add_note(f"This was the tracker {tracker.name!r} at its start.")
            raise

    def finish(self) -> None:
        """End all; afterwards ``start`` may begin another run."""
        for tracker in self.running:
            try:
                tracker.finish()
            except Exception as error:  # the next tracker shall finish, and the process group end
                self._count(tracker, "finish", error)
        for name, count in self._failures.items():
            _logger.warning("the tracker %r failed %d times in this run", name, count)
        self.running.clear()
        self._failures.clear()

    # --- values --------------------------------------------------------------------------------------------------

    def log(
        self, values: Mapping[str, Any], step: int | None, log_kwargs: Mapping[str, Mapping[str, Any]] | None
    ) -> None:
        """Give ``values`` to each tracker on this process.

        Raises:
            ConfigError: an argument is not what it should be.
        """
        held = known(values, "log(values)")
        arguments = self._by_tracker(log_kwargs, "log_kwargs")
        self._tell_of_no_start("log")
        for tracker in self.running:
            self._attempt(tracker, "log", tracker.log, dict(held), step=step, **arguments.get(tracker.name, {}))

    def log_images(
        self, values: Mapping[str, Any], step: int | None, log_kwargs: Mapping[str, Mapping[str, Any]] | None
    ) -> None:
        """Give images to each tracker on this process.

        Raises:
            ConfigError: an argument is not what it should be.
        """
        held = known(values, "log_images(values)")
        arguments = self._by_tracker(log_kwargs, "log_kwargs")
        self._tell_of_no_start("log_images")
        for tracker in self.running:
            self._attempt(
                tracker, "log_images", tracker.log_images, dict(held), step=step, **arguments.get(tracker.name, {})
            )

    def _attempt(
        self, tracker: GeneralTracker, action: str, method: Callable[..., object], *args: Any, **kwargs: Any
    ) -> None:
        try:
            method(*args, **kwargs)
        except ConfigError:  # a mistake in the call, not in the tracker
            raise
        except Exception as error:
            self._count(tracker, action, error)

    def _count(self, tracker: GeneralTracker, action: str, error: Exception) -> None:
        self._failures[tracker.name] += 1
        if self._failures[tracker.name] == 1:
            _logger.warning(
                "the tracker %r failed in %s(): %s: %s. Training goes on; further failures are counted",
                tracker.name,
                action,
                type(error).__name__,
                error,
                exc_info=error,
            )

    def _tell_of_no_start(self, action: str) -> None:
        """Values that reach nobody although trackers were asked for: most likely a call was forgotten."""
        if self.chosen and not self.running and process_index() == 0 and not self._told_of_no_start:
            self._told_of_no_start = True
            _logger.warning("%s() tracks nothing: init_trackers() has not been called, or end_training() has", action)

    # --- asking --------------------------------------------------------------------------------------------------

    def get(self, name: str, unwrap: bool) -> Any:
        """The tracker ``name``, or with ``unwrap`` what does its work.

        Where it does not run, a stand-in that takes every call without effect: scripts ask on all processes.

        Raises:
            ConfigError: trackers run, and none of that name was chosen.
        """
        for tracker in self.running:
            if tracker.name == name:
                return tracker.tracker if unwrap else tracker  # type: ignore[attr-defined]
        names = [str(getattr(tracker, "name", tracker)) for tracker in self.chosen]
        if self.running and name not in names:
            raise ConfigError(f"get_tracker({name!r}): expected one of {', '.join(names)}.")
        return GeneralTracker(_blank=True)

    def _by_tracker(self, given: Mapping[str, Mapping[str, Any]] | None, what: str) -> dict[str, dict[str, Any]]:
        """Arguments by tracker. Those of a tracker that was not chosen may stay: scripts choose by a flag."""
        arguments = {} if given is None else known(given, what)
        chosen = {str(getattr(tracker, "name", tracker)) for tracker in self.chosen}
        for name, mine in arguments.items():
            if name not in chosen | set(LoggerType) | set(LOGGER_TYPE_TO_CLASS):
                raise ConfigError(
                    f"{what} has arguments for {name!r}, which is no tracker: expected one of "
                    f"{', '.join([*chosen] or LOGGER_TYPE_TO_CLASS)}."
                )
            known(mine, f"{what}[{name!r}]")
        return arguments
