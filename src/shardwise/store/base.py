"""What every store offers: extents that are reserved, then allocated at once, then read and written in the background.

::

    extent = store.reserve(num_bytes)     as often as needed
    store.allocate()                      all of it, before the run; all extents then hold zeros
    store.start_read(extent, begin, memory)  -> Transfer
    store.start_write(extent, begin, memory) -> Transfer
    store.check()                         at a boundary: nobody else changed what we wrote
    store.close()

Transfers that touch the same bytes, in a store or in memory, and of which one changes them, happen in the order in
which they were started; all others may overtake each other. So a read into a slab may be started right after a write
from it. Whoever is not a transfer, such as a kernel, must wait for the transfer before it touches the memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from shardwise.errors import StateError

if TYPE_CHECKING:
    from shardwise.store.aligned import Slab

PAGE_BYTES = 4096
"""Extents begin at multiples of it, and so should whatever is read or written by itself: no disk asks for more."""


def round_up(num_bytes: int) -> int:
    """The next multiple of ``PAGE_BYTES``."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Extent:
    """``num_bytes`` bytes of a store from ``begin`` on, a multiple of ``PAGE_BYTES``."""

    begin: int
    num_bytes: int

    def at(self, begin: int, num_bytes: int) -> int:
        """Position in the store of ``num_bytes`` bytes that begin at ``begin`` of the extent; StateError if outside."""
        if begin < 0 or begin + num_bytes > self.num_bytes:
            raise StateError(
                f"Bytes {begin} to {begin + num_bytes} of an extent of {self.num_bytes} bytes were asked for."
            )
        return self.begin + begin


class Extents:
    """Lays extents one after the other; closed once the store is allocated."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.closed = False

    def reserve(self, num_bytes: int) -> Extent:
        """The next ``num_bytes`` bytes."""
        if self.closed:
            raise StateError("An extent was reserved after its store was allocated; reserve all of them before.")
        if num_bytes < 0:
            raise StateError(f"An extent of {num_bytes} bytes was reserved; a size is 0 or more.")
        extent = Extent(self.num_bytes, num_bytes)
        self.num_bytes += round_up(num_bytes)
        return extent


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes moved so far, and for how long at least one transfer of that direction was under way."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0

    def plus(self, num_bytes: int, seconds: float, writes: bool) -> Traffic:
        """With one more transfer."""
        if writes:
            return replace(
                self, bytes_written=self.bytes_written + num_bytes, write_seconds=self.write_seconds + seconds
            )
        return replace(self, bytes_read=self.bytes_read + num_bytes, read_seconds=self.read_seconds + seconds)

    def since(self, earlier: Traffic) -> Traffic:
        """What happened after ``earlier``."""
        return Traffic(
            self.bytes_read - earlier.bytes_read,
            self.bytes_written - earlier.bytes_written,
            self.read_seconds - earlier.read_seconds,
            self.write_seconds - earlier.write_seconds,
        )


class Transfer(ABC):
    """A read or write under way."""

    in_order = True
    """Whether later transfers of the store that touch the same memory wait for this one by themselves."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether it has ended, well or badly; ``wait`` then returns or raises at once."""

    @abstractmethod
    def wait(self) -> None:
        """Return when it has ended; StorageError if it failed."""


class Done(Transfer):
    """A transfer that had ended when it began."""

    @property
    def done(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Return at once."""


class Store(ABC):
    """A place of bytes off the training device. Not collective: every rank has its own."""

    @abstractmethod
    def reserve(self, num_bytes: int) -> Extent:
        """Set bytes apart; StateError after ``allocate``."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all extents, each rounded up to whole pages."""

    @property
    @abstractmethod
    def host_bytes(self) -> int:
        """Host memory that the store itself holds, for memory reports."""

    @abstractmethod
    def allocate(self) -> None:
        """Make room for all extents, filled with zeros; ConfigError where there is not enough."""

    @abstractmethod
    def start_read(self, extent: Extent, begin: int, memory: memoryview) -> Transfer:
        """Fill ``memory`` from byte ``begin`` of the extent on."""

    @abstractmethod
    def start_write(self, extent: Extent, begin: int, memory: memoryview) -> Transfer:
        """Keep ``memory`` at byte ``begin`` of the extent and after it."""

    def read(self, extent: Extent, begin: int, memory: memoryview) -> None:
        """``start_read``, then wait for its end."""
        self.start_read(extent, begin, memory).wait()

    def write(self, extent: Extent, begin: int, memory: memoryview) -> None:
        """``start_write``, then wait for its end."""
        self.start_write(extent, begin, memory).wait()

    def in_place(self, extent: Extent) -> Slab | None:
        """The extent's own memory where the store is host memory: work there and transfer nothing; else None."""
        return None

    def check(self) -> None:
        """StorageError where a transfer has failed, or where somebody else touched what is kept here."""
        return None

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """What was moved so far."""

    @abstractmethod
    def close(self) -> None:
        """Wait for transfers under way, then give everything up; what was kept is lost. Twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
