"""Reads and writes in the background, in order wherever the order matters.

A transfer is cut into blocks; the threads of its direction move them, ``queue_depth * num_threads`` at a time, past
each other and past those of other transfers. A transfer waits for earlier ones that it *meets*: both touch the same
pages of a file, or the same bytes of memory, and one of the two changes them. So a slab's next read may be started
right after its write was, and begins the moment that the write ends.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from pathlib import Path

from shardwise.errors import StateError, StorageError
from shardwise.store.base import PAGE_BYTES, Traffic, Transfer, round_up
from shardwise.store.direct_file import DirectFile, address_of
from shardwise.store.io_settings import IOSettings
from shardwise.store.lane import Job, Lane

_logger = logging.getLogger(__name__)


class FileTransfer(Transfer):
    """A read or write of one contiguous part of a file. All but ``done`` and ``wait`` is for `DirectIO`."""

    def __init__(self, file: DirectFile, offset: int, memory: memoryview, writes: bool) -> None:
        self.file = file
        self.offset = offset
        self.memory = memory
        self.writes = writes
        self.address = address_of(memory)
        self.size = memory.nbytes
        self.handed_over = 0  # bytes
        self.num_open_blocks = 0
        self.pages = range(offset // PAGE_BYTES, round_up(offset + self.size) // PAGE_BYTES)
        self.num_before = 0  # transfers that must end first
        self.followers: list[FileTransfer] = []
        self.error: StorageError | None = None
        self._ended = threading.Event()

    def meets(self, other: FileTransfer) -> bool:
        """Whether the later of the two must wait for the earlier."""
        in_file = self.file is other.file and (self.writes or other.writes)
        # Whole pages: a part of one is written by reading and writing all of it.
        if in_file and self.pages.start < other.pages.stop and other.pages.start < self.pages.stop:
            return True
        in_memory = not (self.writes and other.writes)  # a read changes memory, a write does not
        return in_memory and self.address < other.address + other.size and other.address < self.address + self.size

    @property
    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Return when it has ended; StorageError if it failed."""
        self._ended.wait()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """Note the end, and let go of the memory."""
        self.memory = memoryview(b"")
        self._ended.set()


class DirectIO:
    """The threads that all files of a rank share, and the order among their transfers."""

    def __init__(self, settings: IOSettings | None = None) -> None:
        self.settings = settings or IOSettings()
        self._reading = Lane("read", self.settings.num_in_flight)
        self._writing = Lane("write", self.settings.num_in_flight)
        self._lock = threading.Lock()
        self._active: list[FileTransfer] = []
        self._closed = False
        self._said_plain = False
        # Only stops the threads: what finalizes may run in one of them.
        weakref.finalize(self, _stop, (self._reading, self._writing), os.getpid()).atexit = False

    def create(self, path: Path, num_bytes: int, verify: bool = False) -> DirectFile:
        """Create a file; see `DirectFile`. Where it goes through the page cache, one warning says so."""
        file = DirectFile(path, num_bytes, verify)
        if not file.is_direct and not self._said_plain:
            self._said_plain = True
            _logger.warning(
                "the filesystem of %s refuses O_DIRECT: offloaded state goes through the page cache, which is slower "
                "and takes host memory. A local disk with ext4 or xfs does better.",
                path.parent,
            )
        return file

    def start_read(self, file: DirectFile, offset: int, memory: memoryview) -> Transfer:
        """Fill ``memory`` from byte ``offset`` of the file on; StorageError where the file has failed before."""
        return self._start(FileTransfer(file, offset, memory.cast("B"), writes=False))

    def start_write(self, file: DirectFile, offset: int, memory: memoryview) -> Transfer:
        """Write ``memory`` at byte ``offset`` of the file; StorageError where the file has failed before."""
        return self._start(FileTransfer(file, offset, memory.cast("B"), writes=True))

    def _start(self, transfer: FileTransfer) -> Transfer:
        file = transfer.file
        with self._lock:
            if self._closed:
                raise StateError(f"A transfer of {file.path} was started after its threads were closed.")
            file.begin(transfer.writes)
            for other in self._active:
                if transfer.meets(other):
                    other.followers.append(transfer)
                    transfer.num_before += 1
            self._active.append(transfer)
            if transfer.num_before == 0:
                self._hand_over(transfer)
        return transfer

    def _hand_over(self, transfer: FileTransfer) -> None:
        """Give the transfer's next blocks to the threads, or end it where none is left. Under the lock."""
        jobs: list[Job] = []
        most = self.settings.num_at_once or transfer.size
        while transfer.handed_over < transfer.size and len(jobs) < most and transfer.file.failure is None:
            offset = transfer.offset + transfer.handed_over
            # All blocks but the first begin on a page of the file.
            end = min(transfer.size, transfer.handed_over + self.settings.block_bytes - offset % PAGE_BYTES)
            block = transfer.memory[transfer.handed_over : end]
            jobs.append(functools.partial(self._move, transfer, offset, block))
            transfer.handed_over = end
        if jobs:
            transfer.num_open_blocks = len(jobs)
            try:
                (self._writing if transfer.writes else self._reading).put(jobs)
                return
            except StorageError as error:
                transfer.file.fail(error)
        self._end(transfer)

    def _move(self, transfer: FileTransfer, offset: int, block: memoryview) -> int:
        """Move one block; in one of the threads."""
        moved = 0
        error: StorageError | None = None
        if transfer.file.failure is None:
            try:
                if transfer.writes:
                    transfer.file.write(block, offset)
                else:
                    transfer.file.read(block, offset)
                moved = block.nbytes
            except StorageError as caught:
                error = caught
            except Exception as caught:  # a thread that dies would leave everybody waiting
                error = StorageError(f"A transfer of {transfer.file.path} failed: {caught!r}.")
                error.__cause__ = caught
        with self._lock:
            if error is not None:
                transfer.file.fail(error)
            transfer.num_open_blocks -= 1
            if transfer.num_open_blocks == 0:
                self._hand_over(transfer)
        return moved

    def _end(self, transfer: FileTransfer) -> None:
        self._active.remove(transfer)
        transfer.file.end(transfer.writes)
        transfer.error = transfer.file.failure
        transfer.end()
        for follower in transfer.followers:
            follower.num_before -= 1
            if follower.num_before == 0:
                self._hand_over(follower)

    def finish(self, file: DirectFile) -> None:
        """Wait until no transfer of ``file`` is under way; how they ended does not matter any more."""
        with self._lock:
            under_way = [transfer for transfer in self._active if transfer.file is file]
        for transfer in under_way:
            try:
                transfer.wait()
            except StorageError:
                continue

    def check(self, file: DirectFile) -> None:
        """StorageError where a transfer of ``file`` has failed, or where somebody else touched the file."""
        with self._lock:
            file.check()

    @property
    def traffic(self) -> Traffic:
        """What was moved so far."""
        bytes_read, read_seconds = self._reading.moved()
        bytes_written, write_seconds = self._writing.moved()
        return Traffic(bytes_read, bytes_written, read_seconds, write_seconds)

    def close(self) -> None:
        """Finish what was started, then end the threads. Twice is fine."""
        with self._lock:
            self._closed = True
            under_way = list(self._active)
        for transfer in under_way:
            self.finish(transfer.file)
        for lane in (self._reading, self._writing):
            lane.stop()
            lane.join()


def _stop(lanes: tuple[Lane, ...], process: int) -> None:
    if os.getpid() == process:  # a fork has no such threads, and locks as they happened to be
        for lane in lanes:
            lane.stop()
