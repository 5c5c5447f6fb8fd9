"""One thread that does jobs in order, beside the thread that hands them over."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

Job = Callable[[], None]


class Worker:
    """The thread starts with the first job and ends with ``close``, or with this object.

    After the first job that fails no other is done: whoever hands over or waits gets the failure, until ``drop``.

    Args:
        name: of the thread.
        around: what all jobs run in.
    """

    def __init__(self, name: str, around: Callable[[], AbstractContextManager[None]]) -> None:
        self._name = name
        self._queue = _Queue(around)
        self._thread: threading.Thread | None = None
        weakref.finalize(self, _stop, self._queue, os.getpid()).atexit = False

    def put(self, job: Job) -> None:
        """Have it done after those before it; an earlier job's failure is raised instead."""
        if self._queue.put(job):
            # A daemon: a process that ends badly does not wait for a disk that may be the reason.
            thread = threading.Thread(target=self._queue.work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self._queue.leave(None)
                raise
            self._thread = thread

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return when ``holds``, which jobs make so; a job's failure is raised."""
        self._queue.wait_until(holds)

    def finish(self) -> None:
        """Return when all jobs are done; a job's failure is raised."""
        self._queue.wait_until(self._queue.is_idle)

    def drop(self) -> None:
        """Forget the jobs that have not begun, and failures, and wait for the end of the one that has."""
        self._queue.drop()

    def close(self) -> None:
        """``drop``, and end the thread. Twice is fine."""
        self._queue.drop()
        self._queue.stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class _Queue:
    """What the thread and those who hand over share; the thread knows no more than this, so that owners may go."""

    def __init__(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        self._around = around
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._served = False
        """Whether there is a thread."""
        self._busy = False
        self._failure: BaseException | None = None
        self._stopped = False

    def work(self) -> None:
        """The life of the thread."""
        try:
            with self._around(), torch.no_grad():
                while (job := self._next()) is not None:
                    self._do(job)
                    del job  # an idle thread keeps nothing alive
        except BaseException as error:  # whoever waits would do so for ever
            self.leave(error)

    def _next(self) -> Job | None:
        """Waits for it; None is the end."""
        with self._changed:
            while not self._jobs:
                if self._stopped:
                    return None
                self._changed.wait()
            self._busy = True
            return self._jobs.popleft()

    def _do(self, job: Job) -> None:
        try:
            job()
        except BaseException as error:  # it belongs to those who wait
            self._end_job(error)
        else:
            self._end_job(None)

    def _end_job(self, failure: BaseException | None) -> None:
        with self._changed:
            self._busy = False
            if failure is not None:
                self._failure = failure
                self._jobs.clear()
            self._changed.notify_all()

    def leave(self, failure: BaseException | None) -> None:
        """There is no thread, or will be none."""
        with self._changed:
            self._served, self._failure = False, failure
            self._jobs.clear()
            self._changed.notify_all()

    def put(self, job: Job) -> bool:
        """Whether a thread must be started for it."""
        with self._changed:
            self._raise_failure()
            self._jobs.append(job)
            self._changed.notify_all()
            served, self._served = self._served, True
            return not served

    def wait_until(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            while self._failure is None and not holds():
                self._changed.wait()
            self._raise_failure()

    def is_idle(self) -> bool:
        """Under the lock."""
        return not self._jobs and not self._busy

    def drop(self) -> None:
        with self._changed:
            self._jobs.clear()
            while self._busy:
                self._changed.wait()
            self._failure = None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def _stop(queue: _Queue, process: int) -> None:
    if os.getpid() == process:  # a fork has no such thread, and the lock as it happened to be
        queue.stop()
