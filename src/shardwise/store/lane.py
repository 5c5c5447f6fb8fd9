"""The threads of one direction. Each stands in one system call, without the interpreter's lock, most of its time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from shardwise.errors import StorageError

Job = Callable[[], int]
"""Moves one block; returns its bytes, 0 where it failed."""


class Lane:
    """Takes jobs in order; counts bytes, and the seconds in which at least one job was under way."""

    def __init__(self, name: str, most_threads: int) -> None:
        self._name = name
        self._most_threads = most_threads
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._threads: list[threading.Thread] = []
        self._stopped = False
        self._num_busy = 0
        self._busy_since = 0.0
        self._busy_seconds = 0.0
        self._num_bytes = 0

    def put(self, jobs: Iterable[Job]) -> None:
        """Queue jobs; threads start when there is work for them.

        Raises:
            StorageError: The system gives this process no thread at all. The jobs are not queued.
        """
        with self._changed:
            before = len(self._jobs)
            self._jobs.extend(jobs)
            try:
                while len(self._threads) < min(self._most_threads, self._num_busy + len(self._jobs)):
                    self._start_thread()
            except RuntimeError as error:
                if not self._threads:
                    while len(self._jobs) > before:
                        self._jobs.pop()
                    raise StorageError(
                        f"No thread could be started for transfers ({error}): raise the limits of this process "
                        "(ulimit -u, ulimit -v)."
                    ) from error
            self._changed.notify(len(self._jobs))

    def _start_thread(self) -> None:
        # A daemon: a process that ends badly does not wait for a disk that may be the reason.
        thread = threading.Thread(target=self._work, name=f"shardwise-{self._name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    if self._stopped:
                        return
                    self._changed.wait()
                job = self._jobs.popleft()
                if self._num_busy == 0:
                    self._busy_since = time.perf_counter()
                self._num_busy += 1
            num_bytes = job()
            del job  # an idle thread keeps no memory alive
            with self._changed:
                self._num_busy -= 1
                self._num_bytes += num_bytes
                if self._num_busy == 0:
                    self._busy_seconds += time.perf_counter() - self._busy_since

    def moved(self) -> tuple[int, float]:
        """Bytes so far, and seconds in which at least one job was under way."""
        with self._changed:
            running = time.perf_counter() - self._busy_since if self._num_busy else 0.0
            return self._num_bytes, self._busy_seconds + running

    def stop(self) -> None:
        """Let the threads end when the queue is empty. Twice is fine."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the threads' end, after ``stop``."""
        for thread in self._threads:
            thread.join()
