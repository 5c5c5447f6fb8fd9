"""``AcceleratedOptimizer``: an engine's optimizer that acts on the micro-batches that step, and on no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardwise.accumulation import GradientState
from shardwise.zero.engine import Engine
from shardwise.zero.engine_optimizer import EngineOptimizer, refuse_closure


class AcceleratedOptimizer(EngineOptimizer):
    """What ``prepare`` returns for an optimizer.

    ``step`` and ``zero_grad`` do nothing on micro-batches that only accumulate. ``optimizer`` is the one that was
    passed: its class, its groups, its settings.
    """

    def __init__(self, engine: Engine, inner: torch.optim.Optimizer) -> None:
        super().__init__(engine, inner)
        self.engine = engine
        self.gradient_state = GradientState()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """``engine.step()``, where this micro-batch ends a step."""
        if self.gradient_state.sync_gradients:
            refuse_closure(closure)
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.step()

    step.hooked = True  # type: ignore[attr-defined]  # as the base class's

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, where this micro-batch ends a step.

        Before that micro-batch's own backward pass nothing is forgotten: a loop that calls ``zero_grad`` first would
        lose what the micro-batches before it have accumulated.
        """
        state = self.gradient_state
        if state.sync_gradients and (state.has_own_gradient or state.num_steps == 1):
            self.engine.zero_grad(set_to_none)

    def train(self) -> None:
        """For optimizers that have a mode, such as schedule-free ones."""
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()

    def eval(self) -> None:
        """For optimizers that have a mode, such as schedule-free ones."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step changed nothing, because a gradient had overflowed in fp16."""
        return self.engine.global_steps > 0 and not self.engine.was_step_applied()

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # while the base class is being made
            raise AttributeError(name)
        return getattr(self.optimizer, name)
