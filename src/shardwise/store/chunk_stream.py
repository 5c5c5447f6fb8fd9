"""The optimizer's way through a store: chunk by chunk, with the disk busy in both directions beside the arithmetic.

::

    slab 0 | read 0 | work 0 | write 0 | read 3 ....... | work 3 |
    slab 1 | read 1 ......... | work 1 | write 1 | read 4 ....... |
    slab 2 | read 2 .................. | work 2 | write 2 | read 5

Each slab's next read is started together with the write before it; the store begins it when the write has ended. So
nothing is decided while the stream runs, and no thread is woken but for work. With three slabs one read and one write
are under way beside the work; a fourth evens out a disk that is now fast and now slow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardwise.errors import StateError, StorageError
from shardwise.store.aligned import Slab, SlabPool
from shardwise.store.base import Done, Extent, Store, Transfer

Work = Callable[[int, Slab], None]
"""What is done with a chunk, given its index and its bytes: whatever it leaves there is written back."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One extent that is read, worked on, and written back in one go."""

    extent: Extent
    write_begin: int = 0
    """Bytes before it, a whole number of pages, are only read: gradients, say."""


class ChunkStream:
    """Runs work over chunks; holds ``slabs.num_slabs`` chunks in host memory at most."""

    def __init__(self, store: Store, slabs: SlabPool) -> None:
        """Stream over ``store`` through ``slabs``, which must be free whenever ``run`` is called."""
        self._store = store
        self._slabs = slabs

    def run(self, chunks: Sequence[Chunk], work: Work) -> None:
        """Do ``work`` on every chunk, in order; all is written back on return.

        Where the store is host memory, work is done in place and no slab is used. An error from ``work`` or from the
        store leaves as it came, after all transfers have ended; chunks before it are written, those after it are not.
        """
        if all(self._store.in_place(chunk.extent) is not None for chunk in chunks):
            for index, chunk in enumerate(chunks):
                memory = self._store.in_place(chunk.extent)
                assert memory is not None
                work(index, memory)
            return
        largest = max(chunk.extent.num_bytes for chunk in chunks)
        if largest > self._slabs.slab_bytes:
            raise StateError(f"A chunk of {largest} bytes does not fit into slabs of {self._slabs.slab_bytes} bytes.")
        slabs = [self._slabs.take() for _ in range(min(self._slabs.num_slabs, len(chunks)))]
        reads: list[Transfer] = [Done()] * len(slabs)  # the last one into each slab
        writes: list[Transfer] = [Done()] * len(slabs)  # the last one from each slab
        try:
            self._run(chunks, work, slabs, reads, writes)
        finally:
            for transfer in (*reads, *writes):
                # An error that nobody has seen is the store's, and its next transfer or check() says it again.
                with contextlib.suppress(StorageError):
                    transfer.wait()
            for slab in slabs:
                self._slabs.give_back(slab)

    def _run(
        self,
        chunks: Sequence[Chunk],
        work: Work,
        slabs: list[Slab],
        reads: list[Transfer],
        writes: list[Transfer],
    ) -> None:
        """The schedule. ``reads`` and ``writes`` hold whatever may be under way when it ends badly."""
        store = self._store
        for place, chunk in enumerate(chunks[: len(slabs)]):
            reads[place] = store.start_read(chunk.extent, 0, slabs[place].bytes(0, chunk.extent.num_bytes))
        for index, chunk in enumerate(chunks):
            place = index % len(slabs)
            reads[place].wait()
            writes[place].wait()  # it ended before the read began; here it may say that it failed
            slab = slabs[place].part(0, chunk.extent.num_bytes)
            work(index, slab)
            written = slab.bytes(chunk.write_begin, chunk.extent.num_bytes - chunk.write_begin)
            writes[place] = store.start_write(chunk.extent, chunk.write_begin, written)
            if index + len(slabs) < len(chunks):
                extent = chunks[index + len(slabs)].extent
                reads[place] = store.start_read(extent, 0, slabs[place].bytes(0, extent.num_bytes))
        for write in writes:
            write.wait()
