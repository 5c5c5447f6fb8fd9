"""Ranks that are forks of the test, linked by pipes: real processes to kill, and cheap enough to do so often."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

PEER_HAS_DIED = 4  # an exit code
GIVE_UP_SECONDS = 60.0  # a net under a rank that does not end, not a measure of speed


class Star:
    """How they meet: all by way of rank 0; a rank whose peer has died gets EOFError or ConnectionResetError."""

    def __init__(self, rank: int, size: int, links: list[Connection]) -> None:
        self.rank = rank
        self.size = size
        self._links = links

    def exchange(self, subject: str, payload: bytes) -> list[bytes]:
        if self.rank == 0:
            gathered = [payload, *(link.recv_bytes() for link in self._links)]
            for link in self._links:
                for each in gathered:
                    link.send_bytes(each)
            return gathered
        self._links[0].send_bytes(payload)
        return [self._links[0].recv_bytes() for _ in range(self.size)]


class Job:
    """`work(star, say)` in `size` forks; what they `say` comes to the test, also of ranks that are killed."""

    def __init__(self, size: int, work: Callable[[Star, Callable[[bytes], None]], None]) -> None:
        self._ears, mouth = Pipe(duplex=False)
        ends = [Pipe() for _ in range(1, size)]
        self.pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                self._ears.close()
                links = [ours for ours, _ in ends] if rank == 0 else [ends[rank - 1][1]]
                for end in [end for pair in ends for end in pair]:
                    if end not in links:
                        end.close()  # else nobody would notice a death
                _work(work, Star(rank, size, links), mouth)
            self.pids.append(pid)
        for end in (mouth, *(end for pair in ends for end in pair)):
            end.close()

    def hear(self, timeout: float | None = None) -> bytes | None:
        """What was said next; None if all have ended, or nothing is said in time."""
        if not wait([self._ears], timeout):
            return None
        try:
            return self._ears.recv_bytes()
        except EOFError:
            return None

    def kill(self, *ranks: int) -> None:
        """At once, as one signal follows another."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def end(self) -> list[int]:
        """Wait for all; their exit codes, -9 for the killed."""
        codes, deadline = [], time.monotonic() + GIVE_UP_SECONDS
        for pid in self.pids:
            found, status = os.waitpid(pid, os.WNOHANG)
            while not found:
                if time.monotonic() > deadline:
                    self.kill(*range(len(self.pids)))
                    raise AssertionError(f"process {pid} did not end by itself")
                time.sleep(0.002)
                found, status = os.waitpid(pid, os.WNOHANG)
            codes.append(os.waitstatus_to_exitcode(status))
        self._ears.close()
        return codes


def _work(work: Callable[[Star, Callable[[bytes], None]], None], star: Star, mouth: Connection) -> None:
    code = 3
    try:
        work(star, mouth.send_bytes)
        code = 0
    except (EOFError, ConnectionResetError, BrokenPipeError):
        code = PEER_HAS_DIED
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)
