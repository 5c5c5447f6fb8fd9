"""Tensors' bytes, laid end to end and cut into slabs of host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Thread

import torch

from shardwise.checkpoint.direct_file import Slab

MAX_THREADS = 8
"""Threads that copy at once; fewer saturate the memory of any machine."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """``nbytes`` of ``source`` (flat), from its byte ``begin`` on, go to byte ``at`` of the slab."""

    source: torch.Tensor
    begin: int
    nbytes: int
    at: int


@dataclass(slots=True)
class Filling:
    """What one slab is to hold, or a part of that."""

    copies: list[_Copy] = field(default_factory=list)
    nbytes: int = 0

    def add(self, source: torch.Tensor, begin: int, limit: int) -> int:
        """Take what fits of a flat tensor, from its byte ``begin`` on, until ``limit`` is full; bytes taken."""
        taken = min(source.nbytes - begin, limit - self.nbytes)
        self.copies.append(_Copy(source, begin, taken, self.nbytes))
        self.nbytes += taken
        return taken

    def skip_to(self, alignment: int, limit: int) -> bool:
        """Leave a gap, so that the next copy begins at a multiple of ``alignment``; whether there is room for it."""
        self.nbytes = -(-self.nbytes // alignment) * alignment
        return self.nbytes < limit

    def fill(self, slab: Slab) -> None:
        """Copy; what comes from a device may still be on its way into pinned memory."""
        for copy in self.copies:
            if copy.source.device.type == "cpu":
                # Of ctypes, for it lets other threads run, and torch's would start threads of its own in each.
                ctypes.memmove(slab.address + copy.at, copy.source.data_ptr() + copy.begin, copy.nbytes)
            else:
                source = copy.source.view(torch.uint8)[copy.begin : copy.begin + copy.nbytes]
                slab.tensor[copy.at : copy.at + copy.nbytes].copy_(source, non_blocking=True)


def cut(sources: Iterable[torch.Tensor], slab_bytes: int) -> Iterator[Filling]:
    """The fillings of slabs of ``slab_bytes``, in order; all are full but the last."""
    filling = Filling()
    for flat in sources:
        if flat.dim() != 1 or flat.requires_grad or not flat.is_contiguous():
            flat = flat.detach().reshape(-1).contiguous()
        begin = 0
        while begin < flat.nbytes:
            begin += filling.add(flat, begin, slab_bytes)
            if filling.nbytes == slab_bytes:
                yield filling
                filling = Filling()
    if filling.nbytes:
        yield filling


def wait_for_devices(fillings: Iterable[Filling]) -> None:
    """Return when what was copied from devices is in host memory."""
    devices = {copy.source.device for filling in fillings for copy in filling.copies}
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


class Copying:
    """Slabs that are being filled: by threads where all is in host memory, else by the device.

    Args:
        fillings: what they are to hold.
        slabs: one for each of them.
        threads: that copy from host memory at once, with the one that waits for the end.
    """

    def __init__(self, fillings: Sequence[Filling], slabs: Sequence[Slab], threads: int) -> None:
        self._fillings = fillings
        self._work = iter(list(zip(fillings, slabs, strict=True)))
        self._failure: BaseException | None = None
        self._threads: list[Thread] = []
        if any(copy.source.device.type != "cpu" for filling in fillings for copy in filling.copies):
            self._fill()  # nothing of it takes time here: copies wait for their turn on the device
            return
        # Not an executor, which takes no work once the script has ended, where a save beside training may still run.
        count = min(max(1, min(threads, MAX_THREADS) - 1), len(fillings))
        self._threads = [Thread(target=self._run, name=f"shardwise-copy-{n}") for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _fill(self) -> None:
        for filling, slab in self._work:  # each pair goes to one thread
            filling.fill(slab)

    def _run(self) -> None:
        try:
            self._fill()
        except BaseException as error:  # raised where the end is waited for
            self._failure = error

    def wait(self) -> None:
        """Return when all is there; until then the caller copies, too."""
        self._fill()
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        wait_for_devices(self._fillings)
