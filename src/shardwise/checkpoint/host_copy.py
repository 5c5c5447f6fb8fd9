"""What a file is to hold, copied to host memory: training may go on and change the originals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from shardwise import torch_compat
from shardwise.checkpoint.copies import Filling, fill_all
from shardwise.checkpoint.direct_file import Slab
from shardwise.checkpoint.shard_file import Entry
from shardwise.errors import CheckpointError
from shardwise.zero.rest import InMemory

SLAB_BYTES = 1 << 24
"""Of the memory of a copy, which one thread fills."""
_ALIGNMENT = 16
"""Bytes: where a part may begin, whatever its dtype."""


class HostCopy:
    """Entries whose memory is a copy. What is steady is copied by ``complete``, on any thread.

    Args:
        entries: of the file; all rest in memory.
        slabs: memory of earlier copies, which this one uses and makes as many as it needs: where pages were touched
            before, a copy takes a fraction of the time.
    """

    def __init__(self, entries: Sequence[Entry], slabs: list[Slab]) -> None:
        self._slabs = slabs
        self._num_used = 0
        self._pinned = False
        self._later: list[Entry] = []
        now: list[Entry] = []
        for entry in entries:
            is_on_device = _is_on_device(entry)
            self._pinned |= is_on_device
            # What comes from a device takes a bus that is faster than any disk, and its turn in a stream.
            (self._later if entry.steady and not is_on_device else now).append(entry)
        self._versions = [
            (entry.key, tensor, torch_compat.version_of(tensor)) for entry in self._later for tensor in _memory(entry)
        ]
        # Two threads where torch computes with one: for these milliseconds training does nothing else.
        self._entries = self._copy(now, max(2, torch.get_num_threads()))

    def complete(self) -> list[Entry]:
        """Copy what is steady; the originals are of no interest afterwards.

        Raises:
            CheckpointError: some of it has changed meanwhile.
        """
        # By this thread alone: the other cores have better things to do, and pools take no work at a script's end.
        self._entries += self._copy(self._later, threads=1)
        del self._slabs[self._num_used :]
        self._later = []
        versions, self._versions = self._versions, []
        for key, tensor, version in versions:
            if torch_compat.version_of(tensor) != version:
                raise CheckpointError(
                    f"{key} of the checkpoint was changed by hand while it was copied beside training. Call "
                    "wait_for_checkpoint() before you change the optimizer's state."
                )
        return self._entries

    def _copy(self, entries: Sequence[Entry], threads: int) -> list[Entry]:
        fillings: list[Filling] = []
        first = self._num_used
        copies = [replace(entry, parts=tuple(self._place(entry, fillings))) for entry in entries]
        fill_all(fillings, self._slabs[first : self._num_used], threads)
        return copies

    def _place(self, entry: Entry, fillings: list[Filling]) -> Iterator[InMemory]:
        """Add what is to be copied to the last filling, and to new ones."""
        for tensor in _memory(entry):
            flat = tensor.detach().reshape(-1)
            begin = 0
            while begin < flat.nbytes:
                if not fillings or not fillings[-1].skip_to(_ALIGNMENT, SLAB_BYTES):
                    fillings.append(Filling())
                    self._take_slab()
                at = fillings[-1].nbytes
                taken = fillings[-1].add(flat, begin, SLAB_BYTES)
                yield InMemory(self._slabs[self._num_used - 1].tensor[at : at + taken].view(flat.dtype))
                begin += taken

    def _take_slab(self) -> None:
        if self._num_used == len(self._slabs):
            self._slabs.append(Slab(SLAB_BYTES, self._pinned))
        self._num_used += 1


def _memory(entry: Entry) -> Iterator[torch.Tensor]:
    for part in entry.parts:
        yield from part.memory() or (part.load(),)


def _is_on_device(entry: Entry) -> bool:
    return any(isinstance(part, InMemory) and part.tensor.device.type != "cpu" for part in entry.parts)
