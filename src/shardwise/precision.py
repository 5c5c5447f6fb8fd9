"""Dtypes of a run, and the loss scale that keeps fp16 gradients within range."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from shardwise.errors import StateError

logger = logging.getLogger(__name__)

NARROW = (torch.float16, torch.bfloat16)
"""Dtypes that an optimizer must not work in: they get fp32 masters and fp32 gradients."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Which dtype a parameter computes in and a gradient travels in."""

    compute: torch.dtype | None
    """Floating-point parameters, buffers and inputs are cast to it; None leaves each as it is."""
    communication: torch.dtype | None
    """Gradients travel in it; None: in the parameter's dtype."""

    def of_parameter(self, parameter: torch.Tensor) -> torch.dtype:
        """The dtype that ``parameter`` computes in."""
        return self.compute if self.compute is not None and parameter.is_floating_point() else parameter.dtype


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the optimizer's copy, its state and the accumulated gradients: at least fp32."""
    return torch.float32 if dtype in NARROW else dtype


class LossScaler(Protocol):
    """Multiplies the loss, and hears after each step whether the gradients were finite."""

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before backward."""

    @property
    def skips_overflows(self) -> bool:
        """Whether a step with a non-finite gradient is skipped."""

    def update(self, overflow: bool) -> None:
        """Adapt to the outcome of one step."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""


@dataclass
class StaticLossScaler:
    """A constant: 1 where nothing can leave its range, or fp16's ``loss_scale``."""

    scale: float = 1.0
    skips_overflows: bool = False

    def update(self, overflow: bool) -> None:
        """A constant does not adapt."""

    def state_dict(self) -> dict[str, Any]:
        """The constant."""
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The configuration's constant stays."""


@dataclass
class DynamicLossScaler:
    """The largest power of two that does not overflow, found by trying.

    An overflow costs one unit of ``hysteresis``; with none left the scale is halved, down to ``min_scale``. After
    ``window`` steps since the last overflow it is doubled and the hysteresis is full again; with
    ``consecutive_hysteresis`` each good step fills it. (DeepSpeed's documented rule: config-json, "fp16".)

    At the minimum a further overflow only skips its step; ``patience`` of them in a row end the run, since then the
    gradients themselves are broken.
    """

    scale: float
    window: int = 1000
    hysteresis: int = 2
    min_scale: float = 1.0
    consecutive_hysteresis: bool = False
    patience: int = 100
    skips_overflows: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self._allowance = self.hysteresis
        self._good_steps = 0
        self._overflows_at_minimum = 0

    def update(self, overflow: bool) -> None:
        """Lower the scale after overflows, raise it after a window without one.

        Raises:
            StateError: ``patience`` overflows in a row at the minimal scale.
        """
        if overflow:
            self._on_overflow()
            return
        self._overflows_at_minimum = 0
        self._good_steps += 1
        if self.consecutive_hysteresis:
            self._allowance = self.hysteresis
        if self._good_steps % self.window == 0:
            self._allowance = self.hysteresis
            self.scale *= 2.0

    def _on_overflow(self) -> None:
        self._good_steps = 0
        if self._allowance > 1:
            self._allowance -= 1
        elif self.scale > self.min_scale:
            self.scale = max(self.scale / 2.0, self.min_scale)
        else:
            self._overflows_at_minimum += 1
            if self._overflows_at_minimum >= self.patience:
                raise StateError(
                    f"gradients were not finite in {self.patience} steps in a row, with the loss scale at its minimum "
                    f"of {self.min_scale:g}. Expected a finite gradient once the scale is low enough: look for NaN or "
                    "inf in the data and the loss, lower the learning rate, or train in bf16."
                )
            logger.warning("gradients overflow at the minimal loss scale %g: the step is skipped.", self.min_scale)

    def state_dict(self) -> dict[str, Any]:
        """The scale and the counters."""
        return {
            "scale": self.scale,
            "allowance": self._allowance,
            "good_steps": self._good_steps,
            "overflows_at_minimum": self._overflows_at_minimum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.scale = float(state["scale"])
        self._allowance = int(state["allowance"])
        self._good_steps = int(state["good_steps"])
        self._overflows_at_minimum = int(state["overflows_at_minimum"])
