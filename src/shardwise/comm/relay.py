"""A transport around a transport: what is done in addition to moving a buffer, for those who ask for it.

``Relay`` passes everything on. A subclass adds one thing; without it the transport itself is used, so nobody else pays.
"""

from __future__ import annotations

import torch

from shardwise.comm.base import CollectiveId, Communicator, Cuts, Pending
from shardwise.comm.summary import CommsSummary


class Relay(Communicator):
    """The same transport once more. Collectives are announced here and moved by ``inner``."""

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.rank = inner.rank
        self.size = inner.size
        self.world = inner.world
        self.replica = inner.replica
        self.device = inner.device
        self.factor_after_sum = inner.factor_after_sum
        self.traffic = inner.traffic
        self.log = []
        self.overlaps = inner.overlaps
        self.one_sided_gathers = inner.one_sided_gathers
        self.forgets = inner.forgets
        self.rounds_gathers = inner.rounds_gathers

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """From the transport's memory."""
        return self._inner.allocate(numel, dtype)

    def free(self, buffer: torch.Tensor) -> None:
        """To the transport."""
        self._inner.free(buffer)

    def borrow(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """From the transport's memory."""
        return self._inner.borrow(numel, dtype)

    def give_back(self, buffer: torch.Tensor) -> None:
        """To the transport."""
        self._inner.give_back(buffer)

    def pooled_bytes(self) -> int:
        """Those of the transport."""
        return self._inner.pooled_bytes()

    def scratch_bytes(self) -> int:
        """Those of the transport."""
        return self._inner.scratch_bytes()

    def broadcast(self, buffer: torch.Tensor) -> None:
        """By the transport."""
        self._inner.broadcast(buffer)

    def average(self, buffer: torch.Tensor) -> None:
        """By the transport."""
        self._inner.average(buffer)

    def multiply_sums_by(self, factor: float) -> None:
        """The transport does."""
        self.factor_after_sum = factor
        self._inner.multiply_sums_by(factor)

    def publish(self) -> None:
        """By the transport."""
        self._inner.publish()

    def _all_gather(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        return self._inner._all_gather(identity, output, shard)

    def _all_gather_exactly(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        return self._inner._all_gather_exactly(identity, output, shard)

    def _all_gather_in_place(self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts) -> Pending:
        return self._inner._all_gather_in_place(identity, buffer, cuts)

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        return self._inner._reduce_scatter(identity, buffer, cuts, shard, accumulate)

    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """By the transport."""
        return self._inner.exchange(identity, payload)

    def secondary_bytes(self) -> int:
        """Those of the transport."""
        return self._inner.secondary_bytes()

    def settle(self) -> None:
        """By the transport."""
        self._inner.settle()

    def realign(self) -> None:
        """Forget what was announced here, then as the transport does."""
        self.log.clear()
        self._inner.realign()

    def summary(self) -> CommsSummary:
        """That of the transport."""
        return self._inner.summary()

    def close(self) -> None:
        """Close the transport."""
        self._inner.close()
