"""Page-aligned host memory: what O_DIRECT reads into, what tensors share, and what CUDA copies from at full speed.

Slabs are cut from one mapping that is made once. torch's own allocator of pinned memory rounds every tensor up to a
power of two; here pinning costs no byte.
"""

from __future__ import annotations

import mmap
import weakref

import torch

from shardwise.errors import StateError, StorageError
from shardwise.store.base import PAGE_BYTES, round_up


def _unpin(pages: mmap.mmap, address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


class _Mapping:
    """Whole pages of memory, shared by the slabs that are cut from them."""

    def __init__(self, num_bytes: int, pin: bool) -> None:
        self.size = max(PAGE_BYTES, round_up(num_bytes))
        try:
            # Shared, not private: a fork during an O_DIRECT read into private pages may lose what is read. Populated
            # at once: a lack of memory shows now, and no page fault later interrupts a transfer.
            flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
            self.pages = mmap.mmap(-1, self.size, flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            raise StorageError(
                f"{num_bytes} bytes of host memory could not be had ({error}). Less is needed with more ranks, with "
                "fewer or smaller buffers (buffer_count, buffer_size), or with nvme as the device of more states."
            ) from error
        self._unpin: weakref.finalize[..., _Mapping] | None = None
        if pin and torch.cuda.is_available():
            self._pin()

    def _pin(self) -> None:
        address = torch.frombuffer(self.pages, dtype=torch.uint8).data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, self.size, 0))
        if code != 0:
            raise StorageError(
                f"CUDA could not pin {self.size} bytes of host memory (cudaHostRegister: error {code}). Set "
                "pin_memory to false, or raise the limit of locked memory (ulimit -l)."
            )
        # The pages are an argument so that they are unmapped after this, whichever way the mapping ends.
        self._unpin = weakref.finalize(self, _unpin, self.pages, address)

    @property
    def is_pinned(self) -> bool:
        return self._unpin is not None and self._unpin.alive

    def unpin(self) -> None:
        if self._unpin is not None:
            self._unpin()


class Slab:
    """``num_bytes`` bytes of host memory that begin on a page, or a part of such memory."""

    def __init__(self, mapping: _Mapping, memory: memoryview) -> None:
        self._mapping = mapping
        self.memory = memory

    @classmethod
    def allocate(cls, num_bytes: int, pin: bool = False) -> Slab:
        """Zeroed memory on whole pages.

        Args:
            num_bytes: Size; 0 is fine.
            pin: Register it with CUDA, so that copies to and from a GPU run beside the host; ignored without CUDA.
                Such copies are on nobody's books but the caller's: torch does not delay reuse of this memory.

        Raises:
            StorageError: The system has not that much memory, or CUDA cannot pin it.
        """
        mapping = _Mapping(num_bytes, pin)
        return cls(mapping, memoryview(mapping.pages)[:num_bytes])

    @property
    def is_pinned(self) -> bool:
        """Whether CUDA knows the memory."""
        return self._mapping.is_pinned

    @property
    def allocated_bytes(self) -> int:
        """Size of the whole mapping that this memory belongs to."""
        return self._mapping.size

    @property
    def num_bytes(self) -> int:
        """Size."""
        return self.memory.nbytes

    def part(self, begin: int, num_bytes: int) -> Slab:
        """The same memory from byte ``begin`` on."""
        self._check(begin, num_bytes)
        return Slab(self._mapping, self.memory[begin : begin + num_bytes])

    def bytes(self, begin: int, num_bytes: int) -> memoryview:
        """What a transfer reads or writes: ``num_bytes`` bytes from byte ``begin`` on."""
        self._check(begin, num_bytes)
        return self.memory[begin : begin + num_bytes]

    def tensor(self, dtype: torch.dtype, begin: int, numel: int) -> torch.Tensor:
        """A 1-D tensor of ``numel`` elements that shares the memory from byte ``begin`` on."""
        self._check(begin, numel * dtype.itemsize)
        if begin % dtype.itemsize:
            raise StateError(f"A tensor of {dtype} cannot begin at byte {begin} of a slab: not a multiple of its size.")
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=numel, offset=begin)

    def unpin(self) -> None:
        """Let CUDA forget the whole mapping; no copy to or from a GPU may be under way. Twice is fine."""
        self._mapping.unpin()

    def _check(self, begin: int, num_bytes: int) -> None:
        if begin < 0 or num_bytes < 0 or begin + num_bytes > self.num_bytes:
            raise StateError(
                f"Bytes {begin} to {begin + num_bytes} of a slab of {self.num_bytes} bytes were asked for."
            )


class SlabPool:
    """A fixed number of slabs, allocated once."""

    def __init__(self, num_slabs: int, slab_bytes: int, pin: bool = False) -> None:
        self.num_slabs = num_slabs
        self.slab_bytes = slab_bytes
        stride = round_up(slab_bytes)
        self._whole = Slab.allocate(num_slabs * stride, pin)
        self._free = [self._whole.part(index * stride, slab_bytes) for index in range(num_slabs)]
        self._taken: set[Slab] = set()

    @property
    def num_bytes(self) -> int:
        """Host memory of all slabs, for memory reports."""
        return self._whole.allocated_bytes

    @property
    def num_free(self) -> int:
        """Slabs that ``take`` could hand out."""
        return len(self._free)

    def take(self) -> Slab:
        """A free slab, holding whatever it held last; never waits: StateError where none is free."""
        if not self._free:
            raise StateError(
                f"All {self.num_slabs} slabs of {self.slab_bytes} bytes are in use; one must be given back before."
            )
        slab = self._free.pop()
        self._taken.add(slab)
        return slab

    def give_back(self, slab: Slab) -> None:
        """Take ``slab`` back; no transfer and no tensor may use it any more."""
        if slab not in self._taken:
            raise StateError("A slab was given back twice, or to another pool than the one it is from.")
        self._taken.remove(slab)
        self._free.append(slab)

    def close(self) -> None:
        """Unpin the slabs and hand none out any more. Their memory is freed with the last slab and tensor on it."""
        self._free.clear()
        self._whole.unpin()
