"""Transports over a torch process group: the backend's own collectives, and the rank-ordered ones over messages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from shardwise import torch_compat
from shardwise.comm.base import (
    Buckets,
    CollectiveId,
    Communicator,
    Cuts,
    InTurn,
    Pending,
    mean_into,
    rounds,
)
from shardwise.comm.hops import BackendHop, Hop, MessagesHop, part_of
from shardwise.comm.mailbox import Mailbox, Messages
from shardwise.comm.native_work import NativeWork
from shardwise.comm.traffic import wire_of
from shardwise.layout import Span
from shardwise.mesh import Axis, split


class OrderedMessages(Communicator):
    """gloo by messages: gathers straight into place, sums in rank order.

    gloo's own all-gather and reduce-scatter take two to four times as long, and its sum depends on bucket boundaries.
    """

    overlaps = True

    def __init__(self, axis: Axis, buckets: Buckets) -> None:
        super().__init__(axis, torch.device("cpu"))
        assert axis.group is not None
        self._buckets = buckets
        self._mailbox = Mailbox(axis, axis.group)

    def _all_gather(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        """My slice goes to everybody, everybody's slices come into place."""
        numel = shard.numel()
        cuts = [rank * numel for rank in range(self.size + 1)]
        self.my_slice(output, cuts).copy_(shard)
        return self._fetch(identity, output, [self._spans(cuts)])

    def _spans(self, cuts: Cuts) -> list[Span]:
        return [Span(begin, end) for begin, end in itertools.pairwise(cuts)]

    def _all_gather_in_place(self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts) -> Pending:
        """The same where my slice is in place already."""
        return self._fetch(identity, buffer, rounds(cuts, self._buckets.gather_numel))

    def _fetch(self, identity: CollectiveId, buffer: torch.Tensor, spans: list[list[Span]]) -> Pending:
        def start(of_ranks: list[Span]) -> Pending:
            parts = [_part(buffer, span) for span in of_ranks]
            sizes = [(rank, part.nbytes) for rank, part in enumerate(parts) if part is not None]
            self.traffic.from_ranks("all-gather", wire_of(buffer.dtype), sizes)
            return self._mailbox.send(identity, [parts[self.rank]] * self.size, parts)

        return InTurn(partial(start, of_ranks) for of_ranks in spans)

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        """Slices go to their owners; mine are summed in rank order when they are waited for."""

        def start(of_ranks: list[Span]) -> Pending:
            outgoing = [_part(buffer, span) for span in of_ranks]
            span = of_ranks[self.rank]
            mine = buffer[span.begin : span.end]
            addends = [mine if rank == self.rank else torch.empty_like(mine) for rank in range(self.size)]
            messages = self._mailbox.send(identity, outgoing, [a if a.numel() else None for a in addends])
            sizes = [(rank, mine.nbytes) for rank in range(self.size)]
            self.traffic.from_ranks("reduce-scatter", wire_of(buffer.dtype), sizes)
            local = span.shift(-cuts[self.rank])
            return _OrderedSum(messages, shard[local.begin : local.end], addends, accumulate, self.factor_after_sum)

        return InTurn(partial(start, of_ranks) for of_ranks in rounds(cuts, self._buckets.reduce_numel))

    def hop(self, partition: Sequence[Sequence[int]]) -> Hop:
        """By the same messages."""
        return MessagesHop(self._mailbox, part_of(self.rank, partition), self.traffic)

    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """Host bytes by the same messages."""
        return self._mailbox.exchange(identity, payload)


def _part(buffer: torch.Tensor, span: Span) -> torch.Tensor | None:
    return buffer[span.begin : span.end] if span.numel else None


class _OrderedSum:
    def __init__(
        self,
        messages: Messages,
        shard: torch.Tensor,
        addends: list[torch.Tensor],
        accumulate: bool,
        factor: float,
    ) -> None:
        self._messages = messages
        self._shard = shard
        self._addends = addends
        self._accumulate = accumulate
        self._factor = factor

    def wait(self) -> None:
        if self._addends:
            self._messages.wait()
            mean_into(self._shard, self._addends, self._accumulate, self._factor)
            self._addends = []


class Native(Communicator):
    """The backend's own collectives: NCCL on GPUs.

    ``work.wait()`` makes the current CUDA stream wait, not the host. Buffers are allocated and freed on the current
    stream; the backend keeps them alive until their work was waited for. Sums are in the backend's order and, where
    gradients travel in 16 bits, in 16 bits.
    """

    overlaps = True

    def __init__(self, axis: Axis, device: torch.device, buckets: Buckets, gather_by_broadcast: bool = False) -> None:
        super().__init__(axis, device)
        self._buckets = buckets
        assert axis.group is not None and axis.control_group is not None
        self._tensors = axis.group
        self._timeout = axis.timeout
        self._parts = axis.parts
        self._gather_by_broadcast = gather_by_broadcast
        self._mailbox = Mailbox(axis, axis.control_group)

    def _all_gather(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        """In place where dtypes differ: the cast lands in my slice, which is then the source."""
        mine = output[self.rank * shard.numel() : (self.rank + 1) * shard.numel()]
        if output.dtype != shard.dtype:
            mine.copy_(shard)
            shard = mine
        self.traffic.by_backend("all-gather", wire_of(output.dtype), output.nbytes - mine.nbytes)
        return NativeWork(identity, torch_compat.all_gather_single(output, shard, self._tensors))

    def _all_gather_in_place(self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts) -> Pending:
        """One all-gather; a broadcast by each owner for uneven cuts, several rounds, or where the user prefers it."""
        mine = self.my_slice(buffer, cuts)
        self.traffic.by_backend("all-gather", wire_of(buffer.dtype), buffer.nbytes - mine.nbytes)
        spans = rounds(cuts, self._buckets.gather_numel)
        if _even(cuts) and len(spans) == 1 and not self._gather_by_broadcast:
            return NativeWork(identity, torch_compat.all_gather_single(buffer, mine, self._tensors))

        def start(of_ranks: list[Span]) -> Pending:
            works = [
                dist.broadcast(part, group=self._tensors, group_src=rank, async_op=True)
                for rank, span in enumerate(of_ranks)
                if (part := _part(buffer, span)) is not None
            ]
            return NativeWork(identity, *works)

        return InTurn(partial(start, of_ranks) for of_ranks in spans)

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        """Sum by the backend, then divide (and widen) into ``shard`` on the current stream.

        One reduce-scatter; a reduce to each owner for uneven cuts or several rounds.
        """
        mine = self.my_slice(buffer, cuts)
        self.traffic.by_backend("reduce-scatter", wire_of(buffer.dtype), mine.nbytes * (self.size - 1))
        spans = rounds(cuts, self._buckets.reduce_numel)
        if _even(cuts) and len(spans) == 1:
            total = torch.empty_like(mine)
            work = NativeWork(identity, torch_compat.reduce_scatter_single(total, buffer, self._tensors))
            return _NativeSum(work, shard, total, accumulate, self.factor_after_sum)

        def start(of_ranks: list[Span]) -> Pending:
            works = [
                dist.reduce(part, group=self._tensors, group_dst=rank, async_op=True)
                for rank, span in enumerate(of_ranks)
                if (part := _part(buffer, span)) is not None
            ]
            return NativeWork(identity, *works)

        return _NativeSum(InTurn(partial(start, r) for r in spans), shard, mine, accumulate, self.factor_after_sum)

    def hop(self, partition: Sequence[Sequence[int]]) -> Hop:
        """In a process group of its own; the groups of this axis are all parted alike."""
        of_world = [[part[place] for place in places] for part in self._parts for places in partition]
        group = split(of_world, self._timeout)
        return BackendHop(self.rank, part_of(self.rank, partition), self.traffic, group)

    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """Host bytes over the gloo group beside."""
        return self._mailbox.exchange(identity, payload)


class AllReduceNative(Native):
    """Gradients averaged by all-reduce, as ``reduce_scatter: false`` asks: twice the traffic of a reduce-scatter."""

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        """Sum the whole buffer everywhere, keep my slice."""
        mine = self.my_slice(buffer, cuts)
        self.traffic.by_backend("all-reduce", wire_of(buffer.dtype), 2 * (buffer.nbytes - mine.nbytes))
        work = NativeWork(identity, dist.all_reduce(buffer, group=self._tensors, async_op=True))
        return _NativeSum(work, shard, mine, accumulate, self.factor_after_sum)


class OrderedNative(Native):
    """The backend's all-to-all, then a sum in rank order: the bits of the other ordered transports, on a GPU too."""

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        """Everybody's copy of my slice comes in; as many bytes as a reduce-scatter by rings."""
        mine = self.my_slice(buffer, cuts)
        received = torch.empty(self.size * mine.numel(), dtype=buffer.dtype, device=buffer.device)
        send_sizes = [cuts[rank + 1] - cuts[rank] for rank in range(self.size)]
        work = dist.all_to_all_single(
            received, buffer, [mine.numel()] * self.size, send_sizes, group=self._tensors, async_op=True
        )
        sizes = [(rank, mine.nbytes) for rank in range(self.size)]
        self.traffic.from_ranks("reduce-scatter", wire_of(buffer.dtype), sizes)
        addends = received.chunk(self.size)
        return _ReceivedSum(NativeWork(identity, work), shard, addends, accumulate, self.factor_after_sum)


class _NativeSum:
    def __init__(
        self, work: Pending, shard: torch.Tensor, total: torch.Tensor, accumulate: bool, factor: float
    ) -> None:
        self._work: Pending | None = work
        self._shard = shard
        self._total: torch.Tensor | None = total
        self._accumulate = accumulate
        self._factor = factor

    def wait(self) -> None:
        if self._work is None or self._total is None:
            return
        self._work.wait()
        if self._accumulate:
            self._shard.add_(self._total, alpha=self._factor)
        else:
            if self._total.data_ptr() != self._shard.data_ptr():
                self._shard.copy_(self._total)
            self._shard.mul_(self._factor)
        self._work = self._total = None


class _ReceivedSum:
    def __init__(
        self, work: NativeWork, shard: torch.Tensor, addends: Sequence[torch.Tensor], accumulate: bool, factor: float
    ) -> None:
        self._work: NativeWork | None = work
        self._shard = shard
        self._addends = addends
        self._accumulate = accumulate
        self._factor = factor

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            mean_into(self._shard, self._addends, self._accumulate, self._factor)
            self._work, self._addends = None, ()


def _even(cuts: Cuts) -> bool:
    return len({cuts[rank + 1] - cuts[rank] for rank in range(len(cuts) - 1)}) == 1
