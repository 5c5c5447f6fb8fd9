"""What ``initialize`` returns as the optimizer: the user's groups and settings, with the engine's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from shardwise.errors import ConfigError


class Steps(Protocol):
    """What an engine does for its optimizer."""

    def step(self) -> None:
        """Step at the boundary."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients."""

    def take_in_new_groups(self) -> None:
        """Step the parameters of groups that were added to the optimizer."""


class EngineOptimizer(torch.optim.Optimizer):
    """A torch optimizer in the eyes of schedulers and loggers; ``step`` and ``zero_grad`` are the engine's.

    ``param_groups`` are the groups of the optimizer that was passed, so a learning rate may be set on either.
    """

    def __init__(self, engine: Steps, inner: torch.optim.Optimizer) -> None:
        super().__init__([torch.empty(0)], dict(inner.defaults))
        self._engine = engine
        self.optimizer = inner
        self.param_groups = inner.param_groups
        self.state = inner.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """``engine.step()``.

        Raises:
            ValueError: a closure was passed: it would run the model again in the middle of a step.
        """
        refuse_closure(closure)
        self._engine.step()

    # torch would wrap the method for its profiler, which costs as much as all of our own work; the optimizer that was
    # passed is wrapped anyway.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """``engine.zero_grad()``."""
        self._engine.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add to the optimizer that was passed.

        Raises:
            ConfigError: a parameter is not the engine's, or has no room for gradients; nothing is added then.
        """
        if hasattr(self, "optimizer"):
            self.optimizer.add_param_group(param_group)
            try:
                self._engine.take_in_new_groups()
            except ConfigError:
                del self.optimizer.param_groups[-1]
                raise
        else:
            super().add_param_group(param_group)


def refuse_closure(closure: Callable[[], float] | None) -> None:
    """A closure would run the model again in the middle of a step."""
    if closure is not None:
        raise ValueError("step() takes no closure here: run forward and backward first, then call step().")
