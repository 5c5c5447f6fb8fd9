"""Loggers for scripts of many processes: the first one speaks unless asked otherwise."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from shardwise.errors import StateError
from shardwise.process import PartialState, process_index


class MultiProcessAdapter(logging.LoggerAdapter[logging.Logger]):
    """A logger whose methods take two more arguments.

    Args of each method:
        main_process_only: True (the default) to log on the first process alone, False to log on every one.
        in_order: log on every process, one after the other in rank order; all processes must make the call.
    """

    def __init__(self, logger: logging.Logger, extra: MutableMapping[str, Any] | None = None) -> None:
        super().__init__(logger, extra if extra is not None else {})
        self._warned: set[str] = set()

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Log ``msg % args`` where and when the two further arguments say (see the class)."""
        main_process_only = kwargs.pop("main_process_only", True)
        in_order = kwargs.pop("in_order", False)
        # The record shall name the line of the script, not one of this module.
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        turns = _turns() if in_order else range(process_index(), process_index() + 1)
        for turn in turns:
            speaks = in_order or not main_process_only or process_index() == 0
            if speaks and turn == process_index() and self.isEnabledFor(level):
                text, processed = self.process(msg, kwargs)
                self.logger.log(level, text, *args, **processed)
            if in_order:  # whatever level a process logs at, it takes its turn
                PartialState().wait_for_everyone()

    def warning_once(self, msg: object, *args: Any, **kwargs: Any) -> None:
        """``warning``, but the same words only once from this logger."""
        words = str(msg) % args if args else str(msg)
        if words not in self._warned:
            self._warned.add(words)
            self.warning(msg, *args, stacklevel=kwargs.pop("stacklevel", 1) + 1, **kwargs)


def _turns() -> range:
    if not PartialState._shared_state:
        raise StateError("logging in_order needs all processes: make an Accelerator() or a PartialState() first.")
    return range(PartialState().num_processes)


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """The logger ``name`` of Python's logging, for many processes.

    Works before the process group is made, too: the launcher's RANK then says which process is the first.

    Args:
        name: usually ``__name__``.
        log_level: such as "INFO"; set for this logger and for the root logger.
    """
    logger = logging.getLogger(name)
    if log_level is not None:
        logger.setLevel(log_level.upper())
        logger.root.setLevel(log_level.upper())
    return MultiProcessAdapter(logger)
