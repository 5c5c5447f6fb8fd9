"""OneCycle: rate up and down, momentum down and up, then decay."""

import logging

from torch.optim import Optimizer

from shardwise.errors import ConfigError
from shardwise.optim.arguments import count, number, per_group, switch
from shardwise.optim.schedule import Rate, Schedule, between

_logger = logging.getLogger("shardwise.optim")

LARGEST_MOMENTUM = 0.999  # where a growing momentum stops, unless the cycle itself goes higher


class OneCycle(Schedule):
    """Raise the rate from `cycle_min_lr` to `cycle_max_lr` and back while momentum does the reverse, then decay.

    The cycle takes S = first + second steps. With b = it + 1 the scale is b/first on the way up and (S - b)/second on
    the way down, cut down to the stairs where a stair count is given; lr = min + (max - min)·scale and momentum =
    max - (max - min)·scale. From it = S on, with `decay_step_size` > 0 and d = (it - S + 1)/decay_step_size:
    lr = min / (1 + decay_lr_rate·d) and momentum = max·(1 + decay_mom_rate·d). Without it both rest where the cycle
    ended.

    Momentum is beta1 of optimizers with ``betas``, whose beta2 becomes 0.99, as DeepSpeed writes it; of optimizers with
    ``momentum`` it is that number, in groups where it is not 0. The first step has the momentum of scale 0, which is
    the highest; DeepSpeed's first step alone has the lowest. A momentum that grows in the decay is held at 0.999, or at
    `cycle_max_mom` if that is higher: from 1.0 on the optimizer would diverge.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: Rate,
        cycle_max_lr: Rate,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        num_groups = len(optimizer.param_groups)
        self.min_lrs = per_group("cycle_min_lr", cycle_min_lr, num_groups)
        self.max_lrs = per_group("cycle_max_lr", cycle_max_lr, num_groups)
        self.decay_lr_rate = number("decay_lr_rate", decay_lr_rate)
        self.first_size = count("cycle_first_step_size", cycle_first_step_size, at_least=1)
        self.second_size = (
            self.first_size
            if cycle_second_step_size is None
            else count("cycle_second_step_size", cycle_second_step_size, at_least=1)
        )
        self.first_stairs = count("cycle_first_stair_count", cycle_first_stair_count)
        self.second_stairs = (
            self.first_stairs
            if cycle_second_stair_count is None
            else count("cycle_second_stair_count", cycle_second_stair_count)
        )
        self.decay_step_size = count("decay_step_size", decay_step_size)
        self.cycle_momentum = switch("cycle_momentum", cycle_momentum)
        self.min_mom = number("cycle_min_mom", cycle_min_mom)
        self.max_mom = number("cycle_max_mom", cycle_max_mom)
        self.decay_mom_rate = number("decay_mom_rate", decay_mom_rate)
        if not self.min_mom <= self.max_mom < 1.0:
            raise ConfigError(
                f"cycle_min_mom is {self.min_mom:g} and cycle_max_mom is {self.max_mom:g}, expected "
                "min <= max < 1. Change them."
            )
        if self.cycle_momentum and not _has_momentum(optimizer):
            _logger.warning(
                "OneCycle leaves momentum alone: %s has none to cycle. Set cycle_momentum to false to say so.",
                type(optimizer).__name__,
            )
            self.cycle_momentum = False
        super().__init__(optimizer, last_batch_iteration)

    def step(self, epoch: int | None = None) -> None:
        """Go on by one iteration: write each group's rate and momentum."""
        super().step(epoch)
        if self.cycle_momentum:
            momentum = self.momentum_at(self.last_batch_iteration)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, 0.99)
                elif group.get("momentum", 0.0) != 0.0:
                    group["momentum"] = momentum

    def rates_at(self, it: int) -> list[float]:
        """Return the rate of each group at iteration `it`."""
        if it < self._cycle_size:
            return between(self.min_lrs, self.max_lrs, self._scale_at(it))
        shrink = 1.0 + self.decay_lr_rate * self._decay_steps_at(it)
        return [lowest / shrink for lowest in self.min_lrs]

    def momentum_at(self, it: int) -> float:
        """Return the momentum at iteration `it`."""
        if it < self._cycle_size:
            return self.max_mom - (self.max_mom - self.min_mom) * self._scale_at(it)
        grown = self.max_mom * (1.0 + self.decay_mom_rate * self._decay_steps_at(it))
        return min(grown, max(LARGEST_MOMENTUM, self.max_mom))

    @property
    def _cycle_size(self) -> int:
        return self.first_size + self.second_size

    def _scale_at(self, it: int) -> float:
        """Return the height in the cycle, from 0 at its ends to 1 at its top."""
        done = it + 1
        if done <= self.first_size:
            return _on_stairs(done, self.first_size, self.first_stairs)
        return _on_stairs(self._cycle_size - done, self.second_size, self.second_stairs)

    def _decay_steps_at(self, it: int) -> float:
        return (it - self._cycle_size + 1) / self.decay_step_size if self.decay_step_size else 0.0


def _on_stairs(done: int, size: int, stairs: int) -> float:
    """Return done/size, cut down to a multiple of 1/stairs; in whole numbers, so that rounding skips no stair."""
    return (done * stairs // size) / stairs if stairs else done / size


def _has_momentum(optimizer: Optimizer) -> bool:
    return any("betas" in group or group.get("momentum", 0.0) != 0.0 for group in optimizer.param_groups)
