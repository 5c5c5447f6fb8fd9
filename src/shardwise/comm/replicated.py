"""MiCS: states are sharded over groups of neighbouring ranks, and every group holds all of them.

World of W ranks in R groups of k; a flat buffer of n elements, of which every rank of a group owns n/k. Parameters are
gathered inside the group alone. Gradients are summed twice::

    gradient [n] -> reduce-scatter inside the group -> [n/k] -> reduce-scatter and all-gather over the R ranks that
    hold the same shard -> [n/k] the mean over all W ranks

The second sum travels in the shard's dtype. Each of its parts is added by one rank and sent to the others, so all
replicas have the same bits on any backend: they step apart and stay alike.

Zhang et al., "MiCS: Near-linear Scaling for Training Gigantic Model on Public Cloud" (2022), section 3. There replicas
meet once a step; here at every reduction, so that what rests in a shard is always the mean over all ranks.
"""

from __future__ import annotations

import torch

from shardwise.comm.base import CollectiveId, Communicator, Cuts, Pending
from shardwise.comm.relay import Relay
from shardwise.comm.steps import Steps, begin
from shardwise.comm.summary import CommsSummary
from shardwise.store.beside import Beside


class Replicated(Relay):
    """The transport of one group, whose means are those of all ranks.

    Args:
        inner: of the group, axis ``dp_shard``.
        across: of those who hold the same shard, axis ``dp_replicate``; sums in rank order.
        everyone: of all ranks, axis ``world``.
    """

    def __init__(self, inner: Communicator, across: Communicator, everyone: Communicator) -> None:
        super().__init__(inner)
        self._across = across
        self._everyone = everyone
        self._beside = Beside(inner.device)
        for other in (across, everyone):
            other.traffic.count_with(inner.traffic)
        self.multiply_sums_by(1.0 / self.world.size)

    def multiply_sums_by(self, factor: float) -> None:
        """Once, when all have been added."""
        self.factor_after_sum = factor
        self._inner.multiply_sums_by(1.0)
        self._across.multiply_sums_by(factor)

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        return begin(self._reduce_steps(identity, buffer, cuts, shard, accumulate), self._beside)

    def _reduce_steps(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Steps:
        total = self._inner.borrow(shard.numel(), shard.dtype) if accumulate else shard
        inside = self._inner._reduce_scatter(identity, buffer, cuts, total, accumulate=False)
        if self._inner.size > 1:
            yield [inside]
        parts = _even_cuts(total.numel(), self._across.size)
        mine = self._across.my_slice(total, parts)
        yield [self._across._reduce_scatter(identity, total, parts, mine, accumulate=False)]
        yield [self._across._all_gather_in_place(identity, total, parts)]
        if accumulate:
            shard.add_(total)
            self._inner.give_back(total)

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Over all ranks."""
        self._everyone.broadcast(buffer)

    def average(self, buffer: torch.Tensor) -> None:
        """Over all ranks."""
        self._everyone.average(buffer)

    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """Among all ranks."""
        return self._everyone.exchange(identity, payload)

    def realign(self) -> None:
        """On every axis."""
        super().realign()
        self._across.realign()
        self._everyone.realign()

    def summary(self) -> CommsSummary:
        """Of every axis."""
        axes = (self._inner, self._across, self._everyone)
        totals = tuple(total for comm in axes for total in comm.summary().totals)
        return CommsSummary(totals, self.traffic.by_route)

    def close(self) -> None:
        """Close the transports."""
        for comm in (self._inner, self._across, self._everyone):
            comm.close()


def _even_cuts(numel: int, size: int) -> list[int]:
    """``size`` parts, the last ones shorter or empty where they must be."""
    each = -(-numel // size)
    return [min(numel, place * each) for place in range(size + 1)]
