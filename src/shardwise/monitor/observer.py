"""The interface between an engine and those who watch it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

DEFAULT_INTERVAL = 10
"""Steps between two lines of what was asked for where ``steps_per_print`` names no interval."""


class Phase(Enum):
    """The three calls of a training step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    STEP = "step"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What is known of an engine after a step."""

    step: int
    """Steps taken, this one included."""
    samples: int
    """Samples that all ranks have trained on, those of this step included."""
    learning_rates: tuple[float, ...]
    loss_scale: float
    skipped_steps: int


class Observer:
    """Told of the passes and steps of one engine; a subclass overrides what it wants to hear."""

    def begins(self, phase: Phase, step: int) -> None:
        """``phase`` of the step after ``step`` others is about to run; forwards without gradients are not told."""

    def ends(self, phase: Phase) -> None:
        """It is over, or raised. ``STEP`` is each call of ``engine.step``, whether it acts or not."""

    def take_loss(self, loss: torch.Tensor) -> None:
        """The loss of one micro-batch, before it is divided or scaled."""

    def after_step(self, report: StepReport) -> None:
        """A step acted."""

    def close(self) -> None:
        """The engine is closed."""
