"""What the DeepSpeed JSON's five schedules share: how they count, and how they hand rates to torch.

They count `it`, the last batch iteration: -1 when built, one more at each ``step()``, which the engine calls after each
applied optimizer step. torch's ``last_epoch`` is ``it + 1``. A rate may be one number or a list with one a parameter
group, and a rate that is a tensor stays the same tensor. States are plain numbers and lists.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardwise.optim.arguments import count

Rate = float | Sequence[float]


class Schedule(LRScheduler, ABC):
    """Rates as a function of `it` alone."""

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int) -> None:
        for group in optimizer.param_groups:  # torch asks for it where a schedule starts in the middle
            rate = group["lr"]
            group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)
        super().__init__(optimizer, count("last_batch_iteration", last_batch_iteration, at_least=-1))

    @property
    def last_batch_iteration(self) -> int:
        """The number of ``step()`` calls so far, minus one."""
        return self.last_epoch - 1

    @property
    def initial_lrs(self) -> list[float]:
        """The rate of each group when the schedule took it over."""
        return [float(rate) for rate in self.base_lrs]

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group at the present iteration."""
        return list(self.rates_at(self.last_batch_iteration))

    @abstractmethod
    def rates_at(self, it: int) -> list[float]:
        """Return the rate of each group at iteration `it`."""


def between(low: Sequence[float], high: Sequence[float], fraction: float) -> list[float]:
    """Return the rates that stand at `fraction` of the way from `low` to `high`."""
    return [lowest + (highest - lowest) * fraction for lowest, highest in zip(low, high, strict=True)]
