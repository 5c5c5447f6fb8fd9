"""Reads and writes in the background: two groups of threads, each of which moves one block at a time.

A transfer is cut into blocks of ``block_bytes``; the threads of its direction take them in order. A thread stands in
one system call without the interpreter's lock, so threads are how deep the disk's queue is filled, not processors that
are used: ``queue_depth * num_threads`` blocks are under way in each direction.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardwise.config.tools import AioConfig
from shardwise.errors import StateError, StorageError
from shardwise.store.base import PAGE_BYTES, Traffic, Transfer, round_up
from shardwise.store.direct_file import DirectFile

MOST_IN_FLIGHT = 64
"""Blocks under way in one direction at most, whatever the settings: each takes a thread."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IOSettings:
    """The block ``aio`` of the JSON, as far as it acts."""

    block_bytes: int = 1 << 20
    """What one system call moves; rounded up to whole pages."""
    queue_depth: int = 8
    num_threads: int = 1
    """``intra_op_parallelism``; times ``queue_depth``: blocks under way in each direction."""
    single_submit: bool = False
    """One block of a transfer at a time: gentle to a disk that is shared."""
    overlap_events: bool = True
    """False: a transfer's next blocks start when all of its earlier ones have ended."""

    @classmethod
    def of(cls, aio: AioConfig) -> IOSettings:
        """What the JSON says."""
        return cls(
            aio.block_size,
            aio.queue_depth,
            max(aio.intra_op_parallelism, aio.thread_count),
            aio.single_submit,
            aio.overlap_events,
        )

    @property
    def num_in_flight(self) -> int:
        """Blocks under way in each direction at most."""
        return max(1, min(self.queue_depth * self.num_threads, MOST_IN_FLIGHT))

    @property
    def num_at_once(self) -> int:
        """Blocks of one transfer that are handed over together; 0: all of them."""
        if self.single_submit:
            return 1
        return 0 if self.overlap_events else self.num_in_flight


@dataclass(frozen=True, slots=True)
class _Block:
    transfer: FileTransfer
    offset: int
    memory: memoryview


class _Lane:
    """The threads of one direction; they start when they are first needed."""

    def __init__(self, name: str, most_threads: int) -> None:
        self._name = name
        self._most_threads = most_threads
        self._changed = threading.Condition()
        self._blocks: deque[_Block] = deque()
        self._num_idle = 0
        self._threads: list[threading.Thread] = []
        self._closed = False

    def put(self, blocks: list[_Block]) -> None:
        with self._changed:
            self._blocks.extend(blocks)
            wanted = min(len(self._blocks) - self._num_idle, self._most_threads - len(self._threads))
            for _ in range(wanted):
                thread = threading.Thread(target=self._run, name=f"shardwise-{self._name}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify(len(blocks))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._num_idle += 1
                while not self._blocks:
                    if self._closed:
                        return
                    self._changed.wait()
                self._num_idle -= 1
                block = self._blocks.popleft()
            block.transfer.move(block)
            del block  # its memory must not be held while the thread waits

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()


class WatchedFile:
    """A file with its transfers under way, kept in order where they touch the same bytes."""

    def __init__(self, file: DirectFile) -> None:
        self.file = file
        self.lock = threading.Lock()
        self.active: list[FileTransfer] = []
        self.failure: StorageError | None = None


class FileTransfer(Transfer):
    """A read or write of one contiguous part of a file."""

    def __init__(self, io: DirectIO, target: WatchedFile, offset: int, memory: memoryview, writes: bool) -> None:
        self.begin = offset
        self.end = offset + memory.nbytes
        self.writes = writes
        self._io = io
        self._target = target
        self._memory = memory
        self._handed_over = 0  # bytes
        self._num_open = 0  # blocks handed over and not ended
        self.num_before = 0  # transfers that must end first
        self.followers: list[FileTransfer] = []
        self._ended = threading.Event()
        self._error: StorageError | None = None

    def meets(self, other: FileTransfer) -> bool:
        """Whether the order of the two matters."""
        return (self.writes or other.writes) and self.begin < other.end and other.begin < self.end

    @property
    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Return when it has ended; StorageError if it failed."""
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def hand_over(self) -> None:
        """Give the next blocks to the threads, or end where none is left. Under the target's lock."""
        blocks: list[_Block] = []
        settings = self._io.settings
        while self._handed_over < self._memory.nbytes and self._target.failure is None:
            if settings.num_at_once and len(blocks) == settings.num_at_once:
                break
            offset = self.begin + self._handed_over
            size = min(self._io.block_bytes - offset % PAGE_BYTES, self._memory.nbytes - self._handed_over)
            blocks.append(_Block(self, offset, self._memory[self._handed_over : self._handed_over + size]))
            self._handed_over += size
        self._num_open = len(blocks)
        if blocks:
            self._io.lane(self.writes).put(blocks)
        else:
            self._end()

    def move(self, block: _Block) -> None:
        """Do the work of one block; in one of the threads."""
        target, size = self._target, block.memory.nbytes
        if target.failure is None:
            self._io.clock(self.writes).begin()
            error = None
            try:
                if self.writes:
                    target.file.write(block.memory, block.offset)
                else:
                    target.file.read(block.memory, block.offset)
            except StorageError as caught:
                error = caught
            self._io.clock(self.writes).end(0 if error else size)
            if error is not None:
                with target.lock:
                    target.failure = target.failure or error
        with target.lock:
            self._num_open -= 1
            if self._num_open == 0:
                self.hand_over()

    def _end(self) -> None:
        target = self._target
        if target.failure is not None:
            self._error = target.failure
        target.active.remove(self)
        self._memory = memoryview(b"")
        self._ended.set()
        for follower in self.followers:
            follower.num_before -= 1
            if follower.num_before == 0:
                follower.hand_over()


class _Clock:
    """How long at least one block of a direction was under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_open = 0
        self._since = 0.0
        self.num_bytes = 0
        self.seconds = 0.0

    def begin(self) -> None:
        with self._lock:
            if self._num_open == 0:
                self._since = time.perf_counter()
            self._num_open += 1

    def end(self, num_bytes: int) -> None:
        with self._lock:
            self._num_open -= 1
            self.num_bytes += num_bytes
            if self._num_open == 0:
                self.seconds += time.perf_counter() - self._since


class DirectIO:
    """The threads that all files of a rank share."""

    def __init__(self, settings: IOSettings | None = None) -> None:
        self.settings = settings or IOSettings()
        self.block_bytes = round_up(self.settings.block_bytes)
        self._lanes = tuple(_Lane(name, self.settings.num_in_flight) for name in ("read", "write"))
        self._clocks = (_Clock(), _Clock())
        self._closed = False
        self._said_plain = False
        self._stop: Callable[[], object] = weakref.finalize(self, _close, self._lanes)

    def lane(self, writes: bool) -> _Lane:
        """The threads of a direction."""
        return self._lanes[writes]

    def clock(self, writes: bool) -> _Clock:
        """The counters of a direction."""
        return self._clocks[writes]

    def create(self, path: Path, num_bytes: int) -> WatchedFile:
        """Create a file; see DirectFile. Where it goes through the page cache, one warning says so."""
        file = DirectFile(path, num_bytes)
        if not file.is_direct and not self._said_plain:
            self._said_plain = True
            _logger.warning(
                "the filesystem of %s refuses O_DIRECT: offloaded state goes through the page cache, which is slower "
                "and takes host memory. A local disk with ext4 or xfs does better.",
                path.parent,
            )
        return WatchedFile(file)

    def start_read(self, target: WatchedFile, offset: int, memory: memoryview) -> Transfer:
        """Fill ``memory`` from byte ``offset`` of the file on."""
        return self._start(FileTransfer(self, target, offset, memory, writes=False), target)

    def start_write(self, target: WatchedFile, offset: int, memory: memoryview) -> Transfer:
        """Write ``memory`` at byte ``offset`` of the file."""
        return self._start(FileTransfer(self, target, offset, memory, writes=True), target)

    def _start(self, transfer: FileTransfer, target: WatchedFile) -> Transfer:
        if self._closed:
            raise StateError(f"A transfer of {target.file.path} was started after its threads were closed.")
        with target.lock:
            for other in target.active:
                if transfer.meets(other):
                    other.followers.append(transfer)
                    transfer.num_before += 1
            target.active.append(transfer)
            if transfer.num_before == 0:
                transfer.hand_over()
        return transfer

    @property
    def traffic(self) -> Traffic:
        """What was moved so far."""
        reads, writes = self._clocks
        return Traffic(reads.num_bytes, writes.num_bytes, reads.seconds, writes.seconds)

    def close(self) -> None:
        """Finish what was started, then end the threads. Twice is fine."""
        self._closed = True
        self._stop()


def _close(lanes: tuple[_Lane, ...]) -> None:
    for lane in lanes:
        lane.close()
