"""Schedulers as ``prepare`` returns them: they tick when an optimizer has stepped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.accumulation import GradientState
from shardwise.optimizer import AcceleratedOptimizer


class AcceleratedScheduler:
    """The script's own scheduler, ticking as often as a script for one process would tick it.

    A script counts its steps with a loader of one process. Its run of W processes has W times fewer, so each step ticks
    W times (Accelerate documents the same), unless the ranks share each batch of the loader.

    Args:
        scheduler: anything with ``step``, over an optimizer that was prepared.
        optimizers: the prepared optimizers; where one of them skipped its step there is no tick.
        step_with_optimizer: False: each call ticks once.
        split_batches: ranks share each batch, so a step ticks once.
        num_processes: W.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: AcceleratedOptimizer | Sequence[AcceleratedOptimizer],
        step_with_optimizer: bool = True,
        split_batches: bool = False,
        num_processes: int = 1,
    ) -> None:
        self.scheduler = scheduler
        self.optimizers = [optimizers] if isinstance(optimizers, AcceleratedOptimizer) else list(optimizers)
        self.step_with_optimizer = step_with_optimizer
        self.ticks_a_step = 1 if split_batches else num_processes
        self.gradient_state = GradientState()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Tick, where this micro-batch ended a step that was not skipped."""
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
            return
        if not self.gradient_state.sync_gradients:
            if self.gradient_state.adjust_scheduler and hasattr(self.scheduler, "_step_count"):
                self.scheduler._step_count += 1
            return
        if any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        for _ in range(self.ticks_a_step):
            total = getattr(self.scheduler, "total_steps", None)
            if total is not None and self.scheduler.last_epoch + 1 > total:
                return  # the last one of a scheduler that refuses to go on, such as OneCycleLR
            self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> list[float]:
        """Learning rate of each group."""
        rates: list[float] = self.scheduler.get_last_lr()
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Of the script's scheduler."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the script's scheduler."""
        self.scheduler.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)


class EngineScheduler(AcceleratedScheduler):
    """A scheduler that the engine itself ticks, once for each step that was applied: ``step`` here does nothing."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """The engine has ticked."""
