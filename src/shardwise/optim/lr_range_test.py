"""LRRangeTest: a rate that only rises."""

from torch.optim import Optimizer

from shardwise.optim.arguments import count, number, per_group, switch
from shardwise.optim.schedule import Rate, Schedule


class LRRangeTest(Schedule):
    """Raise the rate without end, to find the one at which training breaks.

    lr = min·(1 + rate·x) with x = (it+1) / `lr_range_test_step_size`, whole steps only if `lr_range_test_staircase`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: Rate = 0.001,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = per_group("lr_range_test_min_lr", lr_range_test_min_lr, len(optimizer.param_groups))
        self.step_size = count("lr_range_test_step_size", lr_range_test_step_size, at_least=1)
        self.step_rate = number("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = switch("lr_range_test_staircase", lr_range_test_staircase)
        super().__init__(optimizer, last_batch_iteration)

    def rates_at(self, it: int) -> list[float]:
        """Return the rate of each group at iteration `it`."""
        whole_steps = (it + 1) // self.step_size
        steps = whole_steps if self.staircase else (it + 1) / self.step_size
        return [lowest * (1.0 + self.step_rate * steps) for lowest in self.min_lrs]
