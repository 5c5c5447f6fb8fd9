"""What a file is to hold, copied to host memory: training may go on and change the originals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from shardwise import torch_compat
from shardwise.checkpoint.copies import Copying, Filling
from shardwise.checkpoint.direct_file import Slab
from shardwise.checkpoint.shard_file import Entry
from shardwise.errors import CheckpointError
from shardwise.zero.rest import InMemory

SLAB_BYTES = 1 << 24
"""Of the memory of a copy, which one thread fills."""
THREADS = 2
"""That copy at once beside training. While training stands still there may be more: as many as torch computes with."""
_ALIGNMENT = 16
"""Bytes: where a part may begin, whatever its dtype."""


class HostCopy:
    """Entries whose memory is a copy.

    Args:
        slabs: memory of earlier copies, which this one uses and makes as many as it needs: where pages were touched
            before, a copy takes a fraction of the time.
    """

    def __init__(self, slabs: list[Slab]) -> None:
        self._slabs = slabs
        self._num_used = 0
        self._entries: list[Entry] = []
        self._under_way: list[Copying] = []
        self._later: list[Entry] = []
        self._watched: list[tuple[str, torch.Tensor, int]] = []

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Let ``complete`` notice who changes these before they are copied; names are for its error."""
        self._watched += [(name, tensor, torch_compat.version_of(tensor)) for name, tensor in tensors]

    def take(self, entries: Sequence[Entry]) -> None:
        """Copy them from now on, beside the caller; they may change after ``wait``."""
        self._take(entries, max(THREADS, torch.get_num_threads()))

    def _take(self, entries: Sequence[Entry], threads: int) -> None:
        fillings: list[Filling] = []
        first, pinned = self._num_used, any(map(_is_on_device, entries))
        self._entries += [replace(entry, parts=tuple(self._place(entry, fillings, pinned))) for entry in entries]
        self._under_way.append(Copying(fillings, self._slabs[first : self._num_used], threads))

    def take_later(self, entries: Iterable[Entry]) -> None:
        """Leave them for ``complete``: they do not change before that is done."""
        now: list[Entry] = []
        for entry in entries:
            # What comes from a device takes a bus that is faster than any disk, and its turn in a stream.
            (now if _is_on_device(entry) else self._later).append(entry)
        self.take(now)

    def wait(self) -> None:
        """Return when all that was taken is copied, but for what was left for later."""
        while self._under_way:
            self._under_way.pop(0).wait()

    def complete(self) -> list[Entry]:
        """Copy what was left, on any thread, and return what the file is to hold.

        Raises:
            CheckpointError: something that is watched has changed meanwhile.
        """
        later, self._later = self._later, []
        self._take(later, THREADS)
        self.wait()
        del self._slabs[self._num_used :]
        watched, self._watched = self._watched, []
        for name, tensor, version in watched:
            if torch_compat.version_of(tensor) != version:
                raise CheckpointError(
                    f"{name} of an optimizer's state was changed by hand while it was copied beside training. Call "
                    "wait_for_checkpoint() before you change the optimizer's state."
                )
        return self._entries

    def _place(self, entry: Entry, fillings: list[Filling], pinned: bool) -> Iterator[InMemory]:
        """Add what is to be copied to the last filling, and to new ones."""
        for tensor in _memory(entry):
            flat = tensor.detach().reshape(-1)
            begin = 0
            while begin < flat.nbytes:
                if not fillings or not fillings[-1].skip_to(_ALIGNMENT, SLAB_BYTES):
                    fillings.append(Filling())
                    self._take_slab(pinned)
                at = fillings[-1].nbytes
                taken = fillings[-1].add(flat, begin, SLAB_BYTES)
                yield InMemory(self._slabs[self._num_used - 1].tensor[at : at + taken].view(flat.dtype))
                begin += taken

    def _take_slab(self, pinned: bool) -> None:
        if self._num_used == len(self._slabs):
            self._slabs.append(Slab(SLAB_BYTES, pinned))
        self._num_used += 1


def _memory(entry: Entry) -> Iterator[torch.Tensor]:
    for part in entry.parts:
        yield from part.memory() or (part.load(),)


def _is_on_device(entry: Entry) -> bool:
    return any(isinstance(part, InMemory) and part.tensor.device.type != "cpu" for part in entry.parts)
