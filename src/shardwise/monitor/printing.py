"""Lines of the log: progress, times of the phases, memory. And that they are seen."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

import torch

from shardwise.monitor.observer import Observer, Phase, StepReport

logger = logging.getLogger(__name__)
_PACKAGE = logging.getLogger("shardwise")


class _UnlessConfigured(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints for scripts that set up no logging; silent as soon as one does, so no line comes twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def set_log_level(level: str) -> None:
    """Set the level of everything that this package logs, and show it where the script set up no logging."""
    _PACKAGE.setLevel(level.upper())
    if not any(isinstance(handler, _UnlessConfigured) for handler in _PACKAGE.handlers):
        handler = _UnlessConfigured()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _PACKAGE.addHandler(handler)


def make_audible() -> None:
    """Show what was asked for by a key, unless the script chose a level itself."""
    if _PACKAGE.level == logging.NOTSET:
        set_log_level("info")


class Progress(Observer):
    """One line each ``every`` steps: rates, skipped steps, loss scale, samples a second.

    The last is over the steps since the line before, by the host's clock: the device is not waited for.

    Args:
        every: steps between two lines.
        batch_size: samples of a step over all ranks; None leaves samples a second out.
    """

    def __init__(self, every: int, batch_size: int | None) -> None:
        self._every = every
        self._batch_size = batch_size
        self._line_seconds: float | None = None
        self._line_step = 0

    def begins(self, phase: Phase, step: int) -> None:
        """The clock starts with the first pass."""
        if self._line_seconds is None:
            self._line_seconds, self._line_step = time.perf_counter(), step

    def after_step(self, report: StepReport) -> None:
        """Log when it is time."""
        if report.step % self._every:
            return
        seconds, rate = time.perf_counter(), ""
        if self._batch_size is not None and self._line_seconds is not None:
            samples = self._batch_size * (report.step - self._line_step)
            rate = f", {samples / (seconds - self._line_seconds):.4g} samples/s"
        self._line_seconds, self._line_step = seconds, report.step
        logger.info(
            "step %d: learning rates %s, skipped steps %d, loss scale %g%s",
            report.step,
            list(report.learning_rates),
            report.skipped_steps,
            report.loss_scale,
            rate,
        )


class MemoryLog(Observer):
    """What this rank holds, after the first step and each ``every`` steps."""

    def __init__(self, every: int, describe: Callable[[], object]) -> None:
        self._every = every
        self._describe = describe
        self._said = False

    def after_step(self, report: StepReport) -> None:
        """Log when it is time; the first step is the one that allocates."""
        if report.step % self._every == 0 or not self._said:
            self._said = True
            logger.info("memory of rank 0 after step %d:\n%s", report.step, self._describe())


Moment = float | torch.cuda.Event
"""Seconds of the host's clock, or a place in the current CUDA stream."""


def now(device: torch.device) -> Moment:
    """This moment of the device; on CUDA a mark in the stream, which nobody waits for."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Moment, end: Moment) -> float:
    """Both of one device, and over."""
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(begin.elapsed_time(end)) / 1e3
    assert isinstance(end, float)
    return end - begin


def is_over(moment: Moment) -> bool:
    """Whether the device has come so far."""
    return not isinstance(moment, torch.cuda.Event) or moment.query()


class PhaseTimes(Observer):
    """How long forward, backward and step take, each summed over a step's micro-batches; a mean each ``every`` steps.

    On CUDA the times are the device's. A step that the device has not finished when the line is due goes to the next.
    """

    def __init__(self, every: int, device: torch.device) -> None:
        self._every = every
        self._device = device
        self._begun: dict[Phase, Moment] = {}
        self._spans: list[tuple[Phase, Moment, Moment]] = []
        self._steps: deque[list[tuple[Phase, Moment, Moment]]] = deque()

    def begins(self, phase: Phase, step: int) -> None:
        """Note when."""
        self._begun[phase] = now(self._device)

    def ends(self, phase: Phase) -> None:
        """Note when."""
        begin = self._begun.pop(phase, None)
        if begin is not None:
            self._spans.append((phase, begin, now(self._device)))

    def after_step(self, report: StepReport) -> None:
        """Keep the step's times; log when it is time."""
        self._steps.append(self._spans)
        self._spans = []
        if report.step % self._every:
            return
        num_steps, seconds = 0, dict.fromkeys(Phase, 0.0)
        while self._steps and all(is_over(end) for _, _, end in self._steps[0]):
            num_steps += 1
            for phase, begin, end in self._steps.popleft():
                seconds[phase] += seconds_between(begin, end)
        if num_steps:
            times = ", ".join(f"{phase.value} {1e3 * total / num_steps:.2f} ms" for phase, total in seconds.items())
            logger.info("step %d: %s; mean of %d steps", report.step, times, num_steps)
