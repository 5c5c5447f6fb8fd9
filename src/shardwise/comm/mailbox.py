"""Point-to-point messages over gloo, each of which says what it is for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from shardwise.comm.base import LABEL_BYTES, CollectiveId, different_paths, label, text_of
from shardwise.errors import CollectiveError
from shardwise.mesh import Axis


class Mailbox:
    """Point-to-point messages over gloo, each preceded by a header that says which collective it belongs to.

    gloo itself would accept a message of another collective where the sizes agree, and end the process where they do
    not. Here the header's tag counts collectives, so it always meets its counterpart; the payload's tag holds its size,
    so payloads of different sizes never meet: the header tells what went wrong.
    """

    def __init__(self, axis: Axis, group: ProcessGroup) -> None:
        self.rank = axis.rank
        self.size = axis.size
        self.names = axis.ranks
        """What the ranks are called in messages to people: as the world counts them."""
        self.group = group
        self.timeout = axis.timeout
        self._count = 0

    def send(
        self,
        identity: CollectiveId,
        outgoing: Sequence[torch.Tensor | None],
        incoming: Sequence[torch.Tensor | None],
        partners: Sequence[int] | None = None,
    ) -> Messages:
        """Start sending ``outgoing[r]`` to rank r and receiving ``incoming[r]`` from it; None where nothing travels.

        ``partners``: the ranks that meet here, this one among them; None for all. Others meet at the same time.
        """
        self._count += 1
        messages = Messages(self, identity)
        header = torch.frombuffer(bytearray(label(identity)), dtype=torch.uint8)
        tag = self._count % (1 << 15) << 16
        for rank in range(self.size) if partners is None else partners:
            if rank == self.rank:
                continue
            messages.post_header(rank, header, tag)
            source, target = outgoing[rank], incoming[rank]
            if source is not None:
                messages.keep(dist.isend(source, group=self.group, group_dst=rank, tag=tag + _size_tag(source)), rank)
            if target is not None:
                messages.keep(dist.irecv(target, group=self.group, group_src=rank, tag=tag + _size_tag(target)), rank)
        return messages

    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order."""
        length = torch.tensor([len(payload)])
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self.send(identity, [length] * self.size, lengths).wait()
        lengths[self.rank] = length
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else None
        boxes = [torch.empty(int(n), dtype=torch.uint8) if n else None for n in lengths]
        self.send(identity, [data] * self.size, boxes).wait()
        return [
            payload if rank == self.rank else b"" if box is None else box.numpy().tobytes()
            for rank, box in enumerate(boxes)
        ]


def _size_tag(tensor: torch.Tensor) -> int:
    """1 to 65535: sizes that differ get tags that (all but surely) differ."""
    return tensor.nbytes * 2654435761 % 65535 + 1


class Messages:
    """The messages of one collective under way."""

    def __init__(self, mailbox: Mailbox, identity: CollectiveId) -> None:
        self._mailbox = mailbox
        self._identity = identity
        self._headers: list[tuple[int, torch.Tensor, Work | None]] = []
        self._sent: list[tuple[Work | None, torch.Tensor]] = []
        self._work: list[tuple[Work | None, int]] = []

    def post_header(self, rank: int, header: torch.Tensor, tag: int) -> None:
        """Say to ``rank`` what this is, and hear what it is there."""
        group = self._mailbox.group
        received = torch.empty(LABEL_BYTES, dtype=torch.uint8)
        self._headers.append((rank, received, dist.irecv(received, group=group, group_src=rank, tag=tag)))
        self._sent.append((dist.isend(header, group=group, group_dst=rank, tag=tag), header))

    def keep(self, work: Work | None, rank: int) -> None:
        """A payload is on its way to or from ``rank``."""
        self._work.append((work, rank))

    def wait(self) -> None:
        """Headers first: a payload may never come where they differ."""
        for rank, received, work in self._headers:
            self._wait_one(work, rank)
            found = received.numpy().tobytes()
            if found != label(self._identity):
                names = self._mailbox.names
                raise different_paths(names[self._mailbox.rank], str(self._identity), names[rank], text_of(found))
        for work, rank in self._work:
            self._wait_one(work, rank)
        for work, _ in self._sent:
            self._wait_one(work, self._mailbox.rank)
        self._headers, self._work, self._sent = [], [], []

    def _wait_one(self, work: Work | None, rank: int) -> None:
        if work is None:
            return
        try:
            work.wait(self._mailbox.timeout)
        except RuntimeError as error:
            names = self._mailbox.names
            raise CollectiveError(
                f"rank {names[self._mailbox.rank]} waits for rank {names[rank]} in {self._identity}, which did not "
                f"come within {self._mailbox.timeout.total_seconds():g} s or has ended. "
                "Look for a rank that ran out of data, took another path or is stuck outside of training. "
                f"The transport said: {str(error).splitlines()[0][:200]}"
            ) from error
