"""Schedules that start with a warm-up: WarmupLR, WarmupDecayLR, WarmupCosineLR."""

import logging
import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardwise.config.messages import shown
from shardwise.errors import ConfigError
from shardwise.optim.arguments import count, number, per_group
from shardwise.optim.schedule import Rate, Schedule, between

_logger = logging.getLogger("shardwise.optim")

WARMUP_TYPES = ("log", "linear")


def warmup_fraction(it: int, num_steps: int, warmup_type: str) -> float:
    """Return how far a warm-up of `num_steps` (at least 2) has come at `it`: 0 before it starts, 1 from its end on."""
    if it < 0:
        return 0.0
    if it >= num_steps:
        return 1.0
    return math.log(it + 1) / math.log(num_steps) if warmup_type == "log" else it / num_steps


class WarmupLR(Schedule):
    """Rise from `warmup_min_lr` to `warmup_max_lr`, then stay.

    With W = max(2, warmup_num_steps): lr = min + (max - min)·f, where f = ln(it+1)/ln(W) for ``log`` and it/W for
    ``linear``, 0 before the first step and 1 from W on. Without `warmup_max_lr` each group rises to its own rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: Rate = 0.0,
        warmup_max_lr: Rate | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        num_groups = len(optimizer.param_groups)
        self.min_lrs = per_group("warmup_min_lr", warmup_min_lr, num_groups)
        self.max_lrs = None if warmup_max_lr is None else per_group("warmup_max_lr", warmup_max_lr, num_groups)
        self.warmup_num_steps = max(2, count("warmup_num_steps", warmup_num_steps))
        self.warmup_type = _warmup_type(warmup_type)
        super().__init__(optimizer, last_batch_iteration)

    def rates_at(self, it: int) -> list[float]:
        """Return the rate of each group at iteration `it`."""
        highest = self.initial_lrs if self.max_lrs is None else self.max_lrs
        return between(self.min_lrs, highest, self.fraction_at(it))

    def fraction_at(self, it: int) -> float:
        """Return where between the lowest and the highest rate iteration `it` stands."""
        return warmup_fraction(it, self.warmup_num_steps, self.warmup_type)


class WarmupDecayLR(WarmupLR):
    """Rise as `WarmupLR`, then fall in a line to `warmup_min_lr` at `total_num_steps`.

    From W on: f = max(0, (total - it) / max(1, total - W)).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: Rate = 0.0,
        warmup_max_lr: Rate = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = count("total_num_steps", total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        _warn_of_short_run(self, self.total_num_steps, self.warmup_num_steps)

    def fraction_at(self, it: int) -> float:
        """Return where between the lowest and the highest rate iteration `it` stands."""
        if it < self.warmup_num_steps:
            return super().fraction_at(it)
        return max(0.0, (self.total_num_steps - it) / max(1, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(Schedule):
    """Multiply each group's initial rate by a ratio that rises, then falls along half a cosine.

    Before W = max(2, warmup_num_steps) the ratio is r0 + (1 - r0)·f, with r0 = `warmup_min_ratio` and f as in
    `WarmupLR`; from W on it is c + (1 - c)·(1 + cos πp)/2, with c = `cos_min_ratio` and
    p = min(1, (it - W + 1) / max(1, total - W)). Before the first step it is 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = count("total_num_steps", total_num_steps)
        self.warmup_min_ratio = number("warmup_min_ratio", warmup_min_ratio)
        self.warmup_num_steps = max(2, count("warmup_num_steps", warmup_num_steps))
        self.cos_min_ratio = number("cos_min_ratio", cos_min_ratio)
        self.warmup_type = _warmup_type(warmup_type)
        super().__init__(optimizer, last_batch_iteration)
        _warn_of_short_run(self, self.total_num_steps, self.warmup_num_steps)

    def rates_at(self, it: int) -> list[float]:
        """Return the rate of each group at iteration `it`."""
        ratio = self.ratio_at(it)
        return [rate * ratio for rate in self.initial_lrs]

    def ratio_at(self, it: int) -> float:
        """Return the part of the initial rate that iteration `it` has."""
        if it < 0:
            return 0.0
        if it < self.warmup_num_steps:
            fraction = warmup_fraction(it, self.warmup_num_steps, self.warmup_type)
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * fraction
        fall = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (it - self.warmup_num_steps + 1) / fall)
        cosine = (1.0 + math.cos(math.pi * progress)) / 2.0
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * cosine)


def _warmup_type(value: str) -> str:
    if value not in WARMUP_TYPES:
        raise ConfigError(f"warmup_type is {shown(value)}, expected one of {', '.join(WARMUP_TYPES)}. Change it.")
    return value


def _warn_of_short_run(schedule: LRScheduler, total_num_steps: int, warmup_num_steps: int) -> None:
    if total_num_steps < warmup_num_steps:
        _logger.warning(
            "%s: total_num_steps is %d, less than warmup_num_steps (%d), so the run ends inside the warm-up.",
            type(schedule).__name__,
            total_num_steps,
            warmup_num_steps,
        )
