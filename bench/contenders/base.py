"""What a contender is: a named recipe that turns a workload into something that can take a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bench.workload import Workload


class Trainer(Protocol):
    """A model under training."""

    def step(self, tokens: Tensor) -> Tensor:
        """Forward, backward and optimizer step on this rank's batch; returns the local loss, detached."""

    def close(self) -> None:
        """Give back what outlives the object itself: hooks, groups, threads."""


def available() -> str | None:
    """The answer of a contender that needs nothing beyond torch."""
    return None


def no_preparation() -> None:
    """For contenders whose libraries are all loaded with the module that holds their recipe."""


@dataclass(frozen=True)
class Contender:
    """One way to train the workload."""

    name: str
    description: str
    build: Callable[[Workload], Trainer]
    reason_to_skip: Callable[[], str | None] = available
    """Why it cannot run here, or None; asked in the parent process before anything is launched."""
    prepare: Callable[[], None] = no_preparation
    """Loads its library in a rank, so that memory used by code is not counted as memory used for training."""
