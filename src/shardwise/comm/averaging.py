"""When the sum over ranks is divided: after it, before it, partly both, or never.

The mean is a sum times 1/W. fp16 sums of many ranks can leave fp16's range where the backend adds in fp16; dividing
first keeps them inside, at the cost of small gradients that round to zero. Only the backend's own sums have that
trouble: the rank-ordered ones widen every addend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardwise.comm.base import CollectiveId, Communicator, Cuts, Pending
from shardwise.comm.relay import Relay


@dataclass(frozen=True, slots=True)
class Averaging:
    """What gradients are multiplied by around their sum; the mean is any pair whose product is 1/W."""

    before: float
    after: float

    @classmethod
    def of_settings(cls, size: int, *, prescale: bool, predivide_factor: float, is_mean: bool) -> Averaging:
        """The pair that DeepSpeed's keys describe.

        Args:
            size: ranks, W.
            prescale: divide by W before the sum; the factor is then not read.
            predivide_factor: f, divide by f before the sum and multiply by f/W after it.
            is_mean: False leaves the sum as it is, so f is only lent.
        """
        if prescale:
            return cls(1.0 / size, 1.0)
        return cls(1.0 / predivide_factor, predivide_factor * (1.0 / size if is_mean else 1.0))


def average_by(comm: Communicator, averaging: Averaging) -> Communicator:
    """The transport with another division; a world of one sums nothing, and stays as it is."""
    if comm.world.size == 1:
        return comm
    comm.multiply_sums_by(averaging.after)
    return comm if averaging.before == 1.0 else Prescaled(comm, averaging.before)


class Prescaled(Relay):
    """Multiplies gradients before they leave their rank."""

    def __init__(self, inner: Communicator, factor: float) -> None:
        super().__init__(inner)
        self._factor = factor

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        buffer.mul_(self._factor)
        return self._inner._reduce_scatter(identity, buffer, cuts, shard, accumulate)
