"""One rank: every collective is a copy at most."""

from __future__ import annotations

import torch

from shardwise.comm.base import CollectiveId, Communicator, Cuts, Done, Pending, mean_into
from shardwise.comm.summary import CommsSummary


class SingleRank(Communicator):
    """The transport of a world of one."""

    overlaps = False

    def _all_gather(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        """Copy (and cast) the only shard."""
        output.copy_(shard)
        return Done()

    def _all_gather_in_place(self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts) -> Pending:
        """The only slice is the whole buffer."""
        return Done()

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        """The mean of one."""
        if shard.data_ptr() != buffer.data_ptr():
            mean_into(shard, [buffer], accumulate)
        return Done()

    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """The only payload."""
        return [payload]

    def summary(self) -> CommsSummary:
        """Nothing travels."""
        return CommsSummary((), {})
