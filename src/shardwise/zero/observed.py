"""An engine that is watched: made in the place of the plain one where the configuration asks for logs or events.

The plain engine knows of no observer, so what nobody asked for costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shardwise import torch_compat
from shardwise.config import EngineConfig
from shardwise.monitor.events import TrainingEvents
from shardwise.monitor.flops import FlopsProfile
from shardwise.monitor.observer import DEFAULT_INTERVAL, Observer, Phase, StepReport
from shardwise.monitor.printing import MemoryLog, PhaseTimes, Progress
from shardwise.monitor.writers import build_writers
from shardwise.zero.engine import Engine

_TRACKERS = ("csv_monitor", "tensorboard", "wandb", "comet")


class ObservedEngine(Engine):
    """The engine, telling its observers when passes begin and end and what each step did."""

    _observers: tuple[Observer, ...] = ()

    def observe(self, observers: Iterable[Observer]) -> None:
        """Tell these from now on; they are closed with the engine."""
        self._observers = tuple(observers)

    @contextmanager
    def _telling(self, phase: Phase) -> Iterator[None]:
        for observer in self._observers:
            observer.begins(phase, self.global_steps)
        try:
            yield
        finally:
            for observer in reversed(self._observers):
                observer.ends(phase)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Engine.forward``."""
        # Evaluation, and a recompute inside backward, are no forward phase of a training step.
        if not torch.is_grad_enabled() or torch_compat.in_backward():
            return super().forward(*args, **kwargs)
        with self._telling(Phase.FORWARD):
            return super().forward(*args, **kwargs)

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """As ``Engine.backward``."""
        for observer in self._observers:
            # A loss that the script has divided itself is told as it was before, like any other.
            observer.take_loss(loss.detach() if scale_wrt_gas else loss.detach() * self.gradient_accumulation_steps())
        with self._telling(Phase.BACKWARD):
            return super().backward(loss, retain_graph, scale_wrt_gas)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """As ``Engine.step``."""
        steps_before = self.global_steps
        with self._telling(Phase.STEP):
            super().step(lr_kwargs)
        if self.global_steps == steps_before:
            return
        report = StepReport(
            self.global_steps, self.global_samples, tuple(self.get_lr()), self.loss_scale, self.skipped_steps
        )
        for observer in self._observers:
            observer.after_step(report)

    def close(self) -> None:
        """As ``Engine.close``; what observers still hold is written first."""
        observers, self._observers = self._observers, ()
        try:
            for observer in observers:
                observer.close()
        finally:
            super().close()

    destroy = close


class CommsLogAtEnd(Observer):
    """Logs the summary of collectives when the engine is closed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def close(self) -> None:
        """Log it."""
        self._engine.log_summary()


def engine_class(config: EngineConfig, rank: int) -> type[Engine]:
    """The plain engine, or the observed one where something is logged; only rank 0 logs."""
    asked = (
        config.steps_per_print is not None
        or config.wall_clock_breakdown
        or config.memory_breakdown
        or config.flops_profiler.enabled
        or config.comms_logger.enabled
        or any(getattr(config, block).enabled for block in _TRACKERS)
    )
    return ObservedEngine if asked and rank == 0 else Engine


def build_observers(engine: Engine, config: EngineConfig) -> Iterator[Observer]:
    """One for each thing that the configuration asks for."""
    every = config.steps_per_print or DEFAULT_INTERVAL
    if config.wall_clock_breakdown:
        yield PhaseTimes(every, engine.device)
    if config.flops_profiler.enabled:
        yield FlopsProfile(engine.module, config.flops_profiler, engine.device)
    if config.steps_per_print is not None:
        yield Progress(every, engine.train_batch_size() if config.timers.throughput.enabled else None)
    if config.memory_breakdown:
        yield MemoryLog(every, engine.memory_report)
    writers = list(build_writers(config))
    if writers:
        yield TrainingEvents(writers, with_loss_scale=config.scales_loss)
    if config.comms_logger.enabled:
        yield CommsLogAtEnd(engine)
