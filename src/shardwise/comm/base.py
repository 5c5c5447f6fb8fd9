"""The interface of a transport, the identity that every collective carries, and the arithmetic of the ordered sum."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from shardwise.comm.summary import CommsSummary
from shardwise.comm.traffic import Traffic
from shardwise.errors import CollectiveError, StateError
from shardwise.layout import Span
from shardwise.mesh import Axis

Cuts = Sequence[int]
"""``world + 1`` positions in elements: rank r owns ``[cuts[r], cuts[r+1])`` of a flat buffer."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Elements that one collective carries at most; a larger buffer travels in several rounds."""

    reduce_numel: int
    gather_numel: int


def rounds(cuts: Cuts, limit: int) -> list[list[Span]]:
    """Cut every rank's slice into pieces, so that one piece of each rank holds ``limit`` elements together at most.

    Returns:
        For each round one span a rank; a rank with a shorter slice has empty ones in the end.
    """
    piece = max(1, limit // (len(cuts) - 1))
    longest = max(end - begin for begin, end in itertools.pairwise(cuts))
    return [
        [Span(min(begin + at, end), min(begin + at + piece, end)) for begin, end in itertools.pairwise(cuts)]
        for at in range(0, longest, piece)
    ]


@dataclass(frozen=True, slots=True)
class CollectiveId:
    """What a collective is for. Ranks that meet with different identities are stopped, never mixed."""

    operation: str
    unit: str
    step: int

    def __str__(self) -> str:
        of_unit = f" of unit {self.unit!r}" if self.unit else ""
        return f"{self.operation}{of_unit} at step {self.step}"


LABEL_BYTES = 184
"""Length of an identity where it travels."""


def label(identity: CollectiveId) -> bytes:
    """The identity as it stands in a control row: fixed length, padded with zeros."""
    text = str(identity).encode()
    if len(text) > LABEL_BYTES:
        # Both ends of a long unit name tell more than its middle.
        text = text[: LABEL_BYTES // 2] + text[-LABEL_BYTES // 2 :]
    return text.ljust(LABEL_BYTES, b"\0")


def text_of(label: bytes) -> str:
    """What a label says; empty for none."""
    return label.rstrip(b"\0").decode(errors="replace")


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Return when the result may be used (on CUDA: by the current stream).

        Raises:
            CollectiveError: another rank is in another collective, or did not come in time.
        """


class InTurn:
    """Several collectives of which one is under way at a time; each starts when the one before it is over."""

    def __init__(self, starts: Iterable[Callable[[], Pending]]) -> None:
        self._starts = iter(starts)
        self._current = self._start_next()

    def _start_next(self) -> Pending | None:
        start = next(self._starts, None)
        return None if start is None else start()

    def wait(self) -> None:
        """Finish the one under way, then start and finish the others."""
        while self._current is not None:
            self._current.wait()
            self._current = self._start_next()


class Done:
    """A collective that needed no waiting."""

    def wait(self) -> None:
        """Nothing to wait for."""


@dataclass(frozen=True, slots=True)
class Place:
    """One of so many ranks."""

    rank: int
    size: int


class Communicator(ABC):
    """Moves flat buffers between the ranks of one mesh axis, and lets all ranks of the world meet.

    ``rank`` and ``size`` are those of the axis, along which buffers are cut; ``world`` is this rank's place among all
    that train together, who exchange words, share rank 0's values and take means. Both are the same where the axis
    joins all ranks. A transport of a smaller axis meets nobody else; ``Replicated`` joins several.

    All methods but ``allocate``, ``free``, ``borrow`` and ``give_back`` are collective: every rank calls them in the
    same order.
    A buffer is cut by ``cuts``; "my slice" is ``buffer[cuts[rank]:cuts[rank + 1]]``.
    """

    overlaps: bool
    """Whether a collective that was started goes on beside compute, so that starting it early pays."""
    one_sided_gathers = False
    """Whether ranks may gather different things at one time: the owners take no part."""
    forgets = False
    """Whether a reduction that was started may be dropped; messages that are on their way must be waited for."""
    rounds_gathers = False
    """Whether gathered values differ from the shards': quantised ones do, on every rank alike."""
    check = False
    """Compare the identity of every collective across ranks before it starts, not only once a step."""

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self.rank = axis.rank
        self.size = axis.size
        self.world = Place(axis.ranks[axis.rank], sum(map(len, axis.parts)))
        self.replica = axis.part
        """Which of the equal copies of all states this rank holds a part of."""
        self.device = device
        self.factor_after_sum = 1.0 / axis.size
        """What a sum over ranks is multiplied by: by default that makes it the mean."""
        self._group = axis.group
        self.traffic = Traffic(axis.name, axis.rank, axis.size)
        self.log: list[str] = []
        """What this rank took part in since the log was last cleared; see ``zero/agreement.py``."""
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def my_span(self, cuts: Cuts) -> Span:
        """The elements that this rank owns."""
        return Span(cuts[self.rank], cuts[self.rank + 1])

    def my_slice(self, buffer: torch.Tensor, cuts: Cuts) -> torch.Tensor:
        """The view of ``buffer`` [N] that this rank owns."""
        return buffer[cuts[self.rank] : cuts[self.rank + 1]]

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A zeroed 1-D buffer that may be the source of a collective. Every rank allocates the same, in one order."""
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def free(self, buffer: torch.Tensor) -> None:  # noqa: B027  (most transports' buffers are ordinary tensors)
        """``buffer`` from ``allocate`` is used no more, here or by any rank; its memory goes even where tensors do not.

        Every rank frees the same.
        """

    def borrow(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D buffer with undefined content for a while: a gradient buffer on its way to the reduction."""
        free = self._free.get((numel, dtype))
        return free.pop() if free else self._new_buffer(numel, dtype)

    def give_back(self, buffer: torch.Tensor) -> None:
        """End a loan. On the CPU the buffer is kept: freeing it would make its pages fault again at each use."""
        if self.device.type == "cpu":
            self._free.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)

    def pooled_bytes(self) -> int:
        """Bytes of returned buffers that wait for their next loan."""
        return sum(buffer.nbytes for buffers in self._free.values() for buffer in buffers)

    def scratch_bytes(self) -> int:
        """Bytes of working memory that the transport keeps, whatever the model's size."""
        return 0

    def _new_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device=self.device)

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Overwrite ``buffer`` with rank 0's of the world, on every rank; for the start of a run."""
        if self._group is not None:
            dist.broadcast(buffer, group=self._group, group_src=0)

    def average(self, buffer: torch.Tensor) -> None:
        """Overwrite ``buffer`` with the mean over all ranks; for what is in no unit."""
        if self._group is not None:
            dist.all_reduce(buffer, group=self._group)
            buffer.div_(self.size)

    def publish(self) -> None:  # noqa: B027  (most transports need no such signal)
        """My resting shards are final until ``exchange`` was called again: others may read them."""

    def all_gather(
        self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor, exact: bool = False
    ) -> Pending:
        """Fill ``output`` [N] with every rank's ``shard`` [N/W], in rank order; even cuts.

        ``shard`` comes from ``allocate`` and rests unchanged between two ``publish``. Where its dtype differs from that
        of ``output`` the values are cast on the way. ``exact``: and nothing else is lost, also where gathers round.
        """
        if not self.one_sided_gathers:
            self._announce(identity)
        return (self._all_gather_exactly if exact else self._all_gather)(identity, output, shard)

    def all_gather_in_place(self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts) -> Pending:
        """Fill the other ranks' slices of ``buffer`` [N] (from ``allocate``) from their own ones."""
        if not self.one_sided_gathers:
            self._announce(identity)
        return self._all_gather_in_place(identity, buffer, cuts)

    def reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        """``shard`` [my slice] = (or += if ``accumulate``) the mean over all ranks of my slice of ``buffer`` [N].

        "Mean" is the sum times what ``multiply_sums_by`` said.
        ``buffer`` comes from ``allocate`` or ``borrow``; once the result was waited for it may be given back, and may
        be written again after ``settle`` or the next ``exchange``. ``shard`` may be my slice of ``buffer``, but not if
        it accumulates.
        """
        self._announce(identity)
        return self._reduce_scatter(identity, buffer, cuts, shard, accumulate)

    def multiply_sums_by(self, factor: float) -> None:
        """What sums of gradients over ranks are multiplied by, instead of what makes them means."""
        self.factor_after_sum = factor

    def _announce(self, identity: CollectiveId) -> None:
        text = str(identity)
        self.log.append(text)
        if self.check:
            for rank, other in enumerate(self.exchange(CollectiveId("check", "", identity.step), text.encode())):
                if other.decode() != text:
                    raise different_paths(self.world.rank, text, rank, other.decode())

    @abstractmethod
    def _all_gather(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending: ...

    def _all_gather_exactly(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        return self._all_gather(identity, output, shard)

    @abstractmethod
    def _all_gather_in_place(self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts) -> Pending: ...

    @abstractmethod
    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending: ...

    @abstractmethod
    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """Give every rank's ``payload`` (any length) to every rank, in the world's order; also a barrier.

        Host bytes, a few a step.
        """

    def secondary_bytes(self) -> int:
        """Bytes that the transport keeps of parameters and gradients to send less."""
        return 0

    def settle(self) -> None:  # noqa: B027  (a waited collective is over everywhere on most transports)
        """Wait until no rank reads my gradient buffers any more."""

    def realign(self) -> None:
        """A backward pass was given up on every rank: forget what not all ranks started, and end what is still lent."""
        self.log.clear()

    def summary(self) -> CommsSummary:
        """What this rank took part in so far, where it is logged.

        Raises:
            StateError: nothing is logged.
        """
        raise StateError(
            "the summary of collectives was asked for, but none were logged. Set comms_logger.enabled to true in the "
            "configuration."
        )

    def close(self) -> None:
        """Free what the transport holds."""
        self._free.clear()


def different_paths(rank: int, mine: str, other_rank: int, other: str) -> CollectiveError:
    """The error for ranks that meet in different collectives."""
    return CollectiveError(
        f"ranks took different paths: rank {rank} is in {mine}, rank {other_rank} is in {other}. "
        "All ranks must run forward and backward over the same units in the same order."
    )


def mean_into(
    shard: torch.Tensor, addends: Sequence[torch.Tensor], accumulate: bool, factor: float | None = None
) -> None:
    """``shard`` = (or +=) the mean of ``addends``, summed one after the other in the shard's dtype and divided once.

    This order is the specification of the reduction: it depends on ranks alone, not on buckets, layouts or stages.
    An addend may be ``shard`` itself. ``factor`` is what the sum is multiplied by; None: 1/W, which gives the mean.
    """
    in_place_is_safe = all(addend.data_ptr() != shard.data_ptr() for addend in addends[2:])
    total = shard if in_place_is_safe and not accumulate else torch.empty_like(shard)
    if len(addends) > 1 and addends[0].dtype == total.dtype:
        torch.add(addends[0], addends[1], out=total)
    else:
        # Narrow addends are widened one by one, so that the sum loses no bit of them.
        total.copy_(addends[0])
        for addend in addends[1:2]:
            total.add_(addend)
    for addend in addends[2:]:
        total.add_(addend)
    if factor is None:
        factor = 1.0 / len(addends)
    if len(addends) > 1 and factor != 1.0:
        total.mul_(factor)
    if accumulate:
        shard.add_(total)
    elif total is not shard:
        shard.copy_(total)
