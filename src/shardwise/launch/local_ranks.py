"""The ranks of this machine, as their launcher sees them from outside."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from shardwise.launch.bootstrap import write_error_file

LOOK_SECONDS = 1.0


class LocalRanks:
    """Ends ranks that torch's agent would not: those that a SIGSTOP holds, and all where the run must begin anew.

    The reason goes into the rank's error file, where the agent finds it.
    """

    def __init__(self, signed_in: Path, timeout_seconds: float) -> None:
        self._signed_in = signed_in
        self._timeout_seconds = timeout_seconds  # how long a rank may be stopped
        self._since: dict[int, tuple[float, float]] = {}  # by pid: when first seen, on the monotonic and the wall clock

    def end_stopped(self) -> None:
        """Ends those that have been stopped for too long; called every second or so.

        The others would wait for them in a collective until its time-out, and would then be the ones that failed. A
        rank that a debugger holds is left alone.
        """
        stopped = {process.pid: process for process in self._running() if _is_stopped(process)}
        now, wall = time.monotonic(), time.time()
        self._since = {pid: self._since.get(pid, (now, wall)) for pid in stopped}
        for pid, (since, wall_since) in self._since.items():
            if now - since >= self._timeout_seconds:
                words = (
                    f"It was stopped (SIGSTOP) for {self._timeout_seconds:g} s, so it was ended. Look at what stops "
                    "processes on that machine, or give a longer --health_timeout."
                )
                _end(stopped[pid], words, wall_since)

    def end_all(self, words: str) -> None:
        """Ends every rank, for the reason that `words` give."""
        for process in self._running():
            _end(process, words, time.time())

    def forgive(self) -> None:
        """Forgets since when ranks were stopped: this process was stopped itself, and looked at nothing."""
        self._since.clear()

    def _running(self) -> Iterator[psutil.Process]:
        for name in os.listdir(self._signed_in):
            with suppress(psutil.Error):
                process = psutil.Process(int(name))
                if process.ppid() == os.getpid():  # else the number has gone to another process
                    yield process


@contextmanager
def watched(look: Callable[[], None]) -> Iterator[None]:
    """Calls `look` every second, from a thread, as long as the block runs."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def _end(process: psutil.Process, words: str, time_seconds: float) -> None:
    with suppress(psutil.Error, OSError, KeyError):
        path = process.environ()["TORCHELASTIC_ERROR_FILE"]
        write_error_file(words, stack="", path=path, time_seconds=time_seconds)
    with suppress(psutil.Error, OSError):
        os.killpg(process.pid, signal.SIGKILL)
