"""A store with a disk on paper: time passes only while somebody waits or works, so stalls are exact numbers.

The reading and the writing side of the disk each serve one transfer at a time. What a read delivers, and what a write
takes, is moved when the transfer *ends*; until then the memory of a read holds garbage. So a schedule that touches
memory too early computes wrong numbers, whatever the speeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shardwise.errors import StateError, StorageError
from shardwise.store.base import Extent, Extents, Store, Traffic, Transfer


@dataclass(frozen=True)
class Event:
    """One line of the log."""

    seconds: float
    what: str  # "started" (asked for), "ended", "work", "stall"
    kind: str = ""  # "read", "write"; the name of the work
    extent: Extent | None = None
    begin: int = 0
    num_bytes: int = 0
    duration: float = 0.0  # of "work" and "stall"


class SlowTransfer(Transfer):
    def __init__(self, disk: Disk, store: SlowStore, kind: str, extent: Extent, begin: int, memory: memoryview) -> None:
        self.disk = disk
        self.store = store
        self.kind = kind
        self.extent = extent
        self.begin = begin
        self.offset = extent.at(begin, memory.nbytes)
        self.memory = memory
        self.before: list[SlowTransfer] = []
        self.ends_at: float | None = None  # None: it waits for its turn
        self.error: StorageError | None = None
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    def wait(self) -> None:
        self.disk.run_until_ended(self)
        if self.error is not None:
            raise self.error

    def meets(self, other: SlowTransfer) -> bool:
        if self.store is other.store and "write" in (self.kind, other.kind):
            sizes = self.memory.nbytes, other.memory.nbytes
            if self.offset < other.offset + sizes[1] and other.offset < self.offset + sizes[0]:
                return True
        return "read" in (self.kind, other.kind) and _share_memory(self.memory, other.memory)

    def finish(self) -> None:
        self._done = True
        data = self.store.data
        if self.error is None and self.kind == "read":
            self.memory[:] = data[self.offset : self.offset + self.memory.nbytes]
        elif self.error is None:
            data[self.offset : self.offset + self.memory.nbytes] = self.memory


def _share_memory(left: memoryview, right: memoryview) -> bool:
    return bool(np.shares_memory(np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8)))


@dataclass
class Disk:
    """Speeds, the time, and the log; several stores may share one disk, as files do."""

    read_bytes_per_second: float = 1e9
    write_bytes_per_second: float = 1e9
    latency_seconds: float = 0.0
    now: float = 0.0
    log: list[Event] = field(default_factory=list)
    pending: list[SlowTransfer] = field(default_factory=list)
    stall_seconds: float = 0.0
    """Time that somebody waited for transfers: 0 beyond what cannot be hidden is a perfect schedule."""
    busy_seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "write": 0.0})

    def work(self, seconds: float, name: str = "") -> None:
        """Arithmetic takes ``seconds``; the disk goes on meanwhile."""
        self.log.append(Event(self.now, "work", name, duration=seconds))
        end = self.now + seconds
        self._serve()
        while (following := self._next_end()) is not None and following <= end:
            self._pass_to(following)
        self.now = end

    def run_until_ended(self, transfer: SlowTransfer) -> None:
        begin = self.now
        self._serve()
        while not transfer.done:
            following = self._next_end()
            assert following is not None, "transfers wait for each other in a circle"
            self._pass_to(following)
        if self.now > begin:
            self.stall_seconds += self.now - begin
            self.log.append(Event(begin, "stall", transfer.kind, transfer.extent, duration=self.now - begin))

    def start(self, transfer: SlowTransfer) -> SlowTransfer:
        transfer.before = [other for other in self.pending if transfer.meets(other)]
        self.pending.append(transfer)
        self._note("started", transfer)
        self._serve()
        return transfer

    def _note(self, what: str, transfer: SlowTransfer) -> None:
        size = transfer.memory.nbytes
        self.log.append(Event(self.now, what, transfer.kind, transfer.extent, transfer.begin, size))

    def _next_end(self) -> float | None:
        return min((each.ends_at for each in self.pending if each.ends_at is not None), default=None)

    def _pass_to(self, moment: float) -> None:
        self.now = moment
        for transfer in [each for each in self.pending if each.ends_at is not None and each.ends_at <= moment]:
            self.pending.remove(transfer)
            transfer.finish()
            self._note("ended", transfer)
        self._serve()

    def _serve(self) -> None:
        """Each idle side takes the first transfer that waits for no other."""
        for kind, speed in (("read", self.read_bytes_per_second), ("write", self.write_bytes_per_second)):
            waiting = [each for each in self.pending if each.kind == kind]
            if any(each.ends_at is not None for each in waiting):
                continue
            ready = next((each for each in waiting if all(other.done for other in each.before)), None)
            if ready is not None:
                duration = self.latency_seconds + ready.memory.nbytes / speed
                ready.ends_at = self.now + duration
                self.busy_seconds[kind] += duration
                if kind == "read":
                    ready.memory[:] = b"\xa5" * ready.memory.nbytes


class SlowStore(Store):
    """In-memory, on a `Disk` of its own or shared. ``fail_after`` more transfers the next one fails."""

    def __init__(self, disk: Disk | None = None) -> None:
        self.disk = disk or Disk()
        self.data = bytearray()
        self.fail_after: int | None = None
        self._extents = Extents()
        self._allocated = False
        self._traffic = Traffic()

    def reserve(self, num_bytes: int) -> Extent:
        return self._extents.reserve(num_bytes)

    @property
    def num_bytes(self) -> int:
        return self._extents.num_bytes

    @property
    def host_bytes(self) -> int:
        return 0

    def allocate(self) -> None:
        self._extents.closed = True
        self._allocated = True
        self.data = bytearray(self._extents.num_bytes)

    def start_read(self, extent: Extent, begin: int, memory: memoryview) -> SlowTransfer:
        return self._start("read", extent, begin, memory)

    def start_write(self, extent: Extent, begin: int, memory: memoryview) -> SlowTransfer:
        return self._start("write", extent, begin, memory)

    def _start(self, kind: str, extent: Extent, begin: int, memory: memoryview) -> SlowTransfer:
        if not self._allocated:
            raise StateError("The store was used before it was allocated, or after it was closed.")
        transfer = SlowTransfer(self.disk, self, kind, extent, begin, memory.cast("B"))
        if self.fail_after is not None:
            if self.fail_after == 0:
                transfer.error = StorageError("The disk on paper failed, as it was told to.")
            self.fail_after = max(0, self.fail_after - 1)
        seconds = self.disk.latency_seconds + memory.nbytes / self.disk.read_bytes_per_second
        self._traffic = self._traffic.plus(memory.nbytes, seconds, writes=kind == "write")
        return self.disk.start(transfer)

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    def check(self) -> None:
        if not self._allocated:
            raise StateError("The store was checked before it was allocated, or after it was closed.")

    def close(self) -> None:
        for transfer in [each for each in self.disk.pending if each.store is self]:
            self.disk.run_until_ended(transfer)
        self._allocated = False
