"""One hop of a collective that travels in two: among the ranks of a node, or across nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from shardwise import torch_compat
from shardwise.comm.base import CollectiveId, Done, Pending
from shardwise.comm.mailbox import Mailbox
from shardwise.comm.native_work import NativeWork
from shardwise.comm.traffic import Traffic


class Hop(ABC):
    """Moves equal rows among some ranks. All ranks of the world take their hops in one order, each with its own few.

    Args:
        rank: this rank, of the world.
        ranks: that this hop joins, in ascending order, this one among them.
        traffic: counts what comes in.
    """

    def __init__(self, rank: int, ranks: Sequence[int], traffic: Traffic) -> None:
        self.ranks = tuple(ranks)
        self.size = len(ranks)
        self.place = self.ranks.index(rank)
        """Of this rank among them."""
        self._traffic = traffic

    def gather(
        self, identity: CollectiveId, rows: torch.Tensor, mine: torch.Tensor, operation: str, wire: str
    ) -> Pending:
        """Fill ``rows`` [size, k] with everybody's ``mine`` [k]; ``mine`` may be one of the rows."""
        _keep(rows[self.place], mine)
        if self.size == 1:
            return Done()
        self._traffic.from_ranks(operation, wire, ((rank, mine.nbytes) for rank in self.ranks))
        return self._gather(identity, rows, mine)

    def scatter(
        self, identity: CollectiveId, received: torch.Tensor, sent: torch.Tensor, operation: str, wire: str
    ) -> Pending:
        """Row j of ``sent`` [size, k] goes to the j-th rank; ``received`` [size, k] holds what came from each."""
        if self.size == 1:
            received.copy_(sent)
            return Done()
        self._traffic.from_ranks(operation, wire, ((rank, sent[0].nbytes) for rank in self.ranks))
        return self._scatter(identity, received, sent)

    @abstractmethod
    def _gather(self, identity: CollectiveId, rows: torch.Tensor, mine: torch.Tensor) -> Pending: ...

    @abstractmethod
    def _scatter(self, identity: CollectiveId, received: torch.Tensor, sent: torch.Tensor) -> Pending: ...


class MessagesHop(Hop):
    """By messages, straight into their rows."""

    def __init__(self, mailbox: Mailbox, ranks: Sequence[int], traffic: Traffic) -> None:
        super().__init__(mailbox.rank, ranks, traffic)
        self._mailbox = mailbox

    def _gather(self, identity: CollectiveId, rows: torch.Tensor, mine: torch.Tensor) -> Pending:
        return self._send(identity, rows, [mine] * self.size)

    def _scatter(self, identity: CollectiveId, received: torch.Tensor, sent: torch.Tensor) -> Pending:
        received[self.place].copy_(sent[self.place])
        return self._send(identity, received, sent)

    def _send(
        self, identity: CollectiveId, received: torch.Tensor, sent: torch.Tensor | Sequence[torch.Tensor]
    ) -> Pending:
        outgoing: list[torch.Tensor | None] = [None] * self._mailbox.size
        incoming: list[torch.Tensor | None] = [None] * self._mailbox.size
        for place, rank in enumerate(self.ranks):
            outgoing[rank], incoming[rank] = sent[place], received[place]
        return self._mailbox.send(identity, outgoing, incoming, self.ranks)


class BackendHop(Hop):
    """By the collectives of a process group of these ranks."""

    def __init__(self, rank: int, ranks: Sequence[int], traffic: Traffic, group: ProcessGroup) -> None:
        super().__init__(rank, ranks, traffic)
        self._group = group

    def _gather(self, identity: CollectiveId, rows: torch.Tensor, mine: torch.Tensor) -> Pending:
        return NativeWork(identity, torch_compat.all_gather_single(rows.view(-1), mine, self._group))

    def _scatter(self, identity: CollectiveId, received: torch.Tensor, sent: torch.Tensor) -> Pending:
        return NativeWork(identity, dist.all_to_all_single(received, sent, group=self._group, async_op=True))


def part_of(rank: int, partition: Sequence[Sequence[int]]) -> Sequence[int]:
    """The part that ``rank`` is in."""
    return next(part for part in partition if rank in part)


def _keep(row: torch.Tensor, mine: torch.Tensor) -> None:
    if row.data_ptr() != mine.data_ptr():
        row.copy_(mine)
