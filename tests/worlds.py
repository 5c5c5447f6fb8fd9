"""Worlds of real ranks for tests: processes are started once a world size and then serve many cases.

    def case(width):                       # a module-level function: it travels by name
        ...
        return loss

    def test_something(world2):
        losses = world2.run(case, 1021)    # one result per rank

Whatever goes wrong on a rank comes back to the test: an exception with its traceback, a rank that died with the tail of
its log, a rank that hangs with the stacks of all ranks. After a failure the processes are thrown away and the next case
meets a fresh world, so one broken case never spoils the next.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.ranks import Answer, Case, CaseFunction, Failure, RankSettings, serve

START_ATTEMPTS = 3  # the free port that we found may be taken by somebody else before our ranks listen on it
LOG_TAIL_CHARACTERS = 3000
RANK_SERVER = "tests.rank_server"


class CaseError(AssertionError):
    """A case failed on at least one rank. `failures` holds one entry a failed rank."""

    def __init__(self, message: str, failures: list[Failure]) -> None:
        super().__init__(message)
        self.failures = failures


class HungError(CaseError):
    """At least one rank did not answer; the message carries the stacks of all ranks."""


class LeakError(CaseError):
    """The case gave its results, but left threads, process groups, mappings or environment variables behind."""


@dataclass(frozen=True)
class WorldSettings:
    """How a world is started and how long it waits."""

    backend: str = "gloo"
    process_group: bool = True  # False: the case itself calls init_distributed
    forked: bool = False  # starts in a fraction of the time, but its ranks share one hash seed; not for CUDA
    timeout_seconds: float = 60.0  # of the default process group's collectives
    hang_seconds: float = 240.0  # after this long without an answer a rank counts as hung
    grace_seconds: float = 20.0  # how long the others may go on once one rank has failed


@dataclass
class _Rank:
    process: BaseProcess
    connection: Connection
    settings: RankSettings


class World:
    """`size` processes that form one process group and run the same case at the same time.

    Processes start at the first case. The object stays valid after a failure: it then starts fresh processes.
    """

    def __init__(self, size: int, settings: WorldSettings | None = None) -> None:
        self.size = size
        self.settings = settings or WorldSettings()
        self._ranks: list[_Rank] = []
        self._cases_run = 0
        self._directory: Path | None = None

    def __repr__(self) -> str:
        return f"World(size={self.size}, backend={self.settings.backend!r}, running={bool(self._ranks)})"

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the ranks, in rank order; empty while nothing has been started."""
        return [rank.process.pid or 0 for rank in self._ranks]

    def run(self, function: CaseFunction, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank and return the results in rank order.

        Raises CaseError when a rank raised or died, HungError when one never answered, LeakError when one left
        something behind.
        """
        __tracebackhide__ = True
        answers = self._ask(function, args, kwargs)
        failures = [answer.failure for answer in answers if answer.failure is not None]
        if failures:
            self.close()
            raise CaseError(_describe(function, self.size, failures), failures)
        self._refuse_leaks(function, answers)
        return [answer.value for answer in answers]

    def run_expecting_errors(
        self, function: CaseFunction, *args: Any, reusable: bool = False, **kwargs: Any
    ) -> list[Failure | None]:
        """Like `run`, but an exception is a result: returns each rank's Failure, None for a rank that ended well.

        `reusable` promises that no message is under way when the error comes (a mistake that is found while building,
        say). Then the processes are kept, unless the ranks turn out to have done different numbers of collectives, and
        leaks are refused as in `run`. Without it the world starts afresh, because a message that nobody received could
        otherwise be taken for one of the next case.
        """
        answers = self._ask(function, args, kwargs)
        if not reusable and any(answer.failure is not None for answer in answers):
            self.close()
        else:
            self._refuse_leaks(function, answers)
            if len({answer.collectives_done for answer in answers}) > 1:
                self.close()
        return [answer.failure for answer in answers]

    def close(self) -> None:
        """End the processes (those that this world started, by their id) and remove their logs."""
        for rank in self._ranks:
            rank.connection.close()
        for rank in self._ranks:
            rank.process.join(timeout=2)
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join()
        self._ranks = []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    # -- starting

    def _start(self) -> None:
        for attempt in range(1, START_ATTEMPTS + 1):
            self._spawn(_free_port())
            try:
                answers = self._collect()
            except HungError:
                if attempt == START_ATTEMPTS:
                    raise
                continue
            failures = [answer.failure for answer in answers if answer.failure is not None]
            if not failures:
                return
            self.close()
            if attempt == START_ATTEMPTS:
                raise CaseError(_describe("the start of the world", self.size, failures), failures)

    def _spawn(self, port: int) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="shardwise-world-"))
        context = _forking() if self.settings.forked else multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            settings = RankSettings(
                rank=rank,
                size=self.size,
                port=port,
                backend=self.settings.backend,
                timeout_seconds=self.settings.timeout_seconds,
                process_group=self.settings.process_group,
                log_file=self._directory / f"rank{rank}.log",
                stack_file=self._directory / f"rank{rank}.stacks",
            )
            process = context.Process(target=serve, args=(theirs, settings), name=f"rank {rank} of {self.size}")
            process.start()
            theirs.close()  # so that a rank's death is an end-of-file here
            self._ranks.append(_Rank(process, ours, settings))

    # -- one case

    def _ask(self, function: CaseFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Answer]:
        payload = pickle.dumps((function, args, kwargs))
        if not self._ranks:
            self._start()
        self._cases_run += 1
        case = pickle.dumps(Case(self._cases_run, payload, tuple(sys.path)))
        for rank in self._ranks:
            with suppress(BrokenPipeError):  # a dead rank is reported by _collect
                rank.connection.send_bytes(case)
        return self._collect()

    def _collect(self) -> list[Answer]:
        answers: dict[int, Answer] = {}
        pending = {rank.connection: rank for rank in self._ranks}
        deadline = time.monotonic() + self.settings.hang_seconds
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._report_hang(sorted(rank.settings.rank for rank in pending.values()), answers)
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                answers[rank.settings.rank] = answer = self._receive(rank)
                if answer.failure is not None:
                    deadline = min(deadline, time.monotonic() + self.settings.grace_seconds)
        return [answers[rank] for rank in range(self.size)]

    def _receive(self, rank: _Rank) -> Answer:
        try:
            answer: Answer = pickle.loads(rank.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            rank.process.join(timeout=10)
            message = f"the process ended with exit code {rank.process.exitcode}; its last output:\n{_tail(rank)}"
            answer = Answer(failure=Failure(rank.settings.rank, "ProcessDied", message, traceback=message))
        return answer

    def _report_hang(self, hung: list[int], answers: dict[int, Answer]) -> None:
        for rank in self._ranks:
            with suppress(ProcessLookupError):
                os.kill(rank.process.pid or 0, signal.SIGUSR1)
        time.sleep(1.0)  # faulthandler answers from the signal handler; give it the time to write
        stacks = "\n".join(
            f"--- stacks of rank {rank.settings.rank}\n{rank.settings.stack_file.read_text()}" for rank in self._ranks
        )
        failures = [answer.failure for answer in answers.values() if answer.failure is not None]
        for rank in self._ranks:
            rank.process.kill()
        self.close()
        head = f"rank{'s' if len(hung) > 1 else ''} {', '.join(map(str, hung))} of {self.size} did not answer"
        told = "".join(f"\n--- rank {failure.rank} had failed:\n{failure.traceback}" for failure in failures)
        raise HungError(f"{head}{told}\n{stacks}", failures)

    def _refuse_leaks(self, function: CaseFunction, answers: list[Answer]) -> None:
        leaks = [f"rank {rank}: {leak}" for rank, answer in enumerate(answers) for leak in answer.leaks]
        if leaks:
            self.close()
            raise LeakError(f"{_name_of(function)} left something behind\n" + "\n".join(leaks), [])


class WorldPool:
    """One world a size, started when first asked for and kept until the pool is closed."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def __getitem__(self, size: int) -> World:
        """The world of `size` ranks."""
        return self._worlds.setdefault(size, World(size))

    def __iter__(self) -> Iterator[World]:
        return iter(self._worlds.values())

    def close(self) -> None:
        """End all processes of all worlds."""
        for world in self:
            world.close()


def _forking() -> BaseContext:
    """What starts ranks as forks of a server that has imported torch, runs no test and joins no group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([RANK_SERVER])
    with chdir(Path(__file__).parents[1]):  # where it finds what it is to import
        ensure_running()
    return context


def _describe(function: CaseFunction | str, size: int, failures: list[Failure]) -> str:
    ranks = ", ".join(str(failure.rank) for failure in failures)
    parts = [f"{_name_of(function)} failed on rank {ranks} of {size}"]
    seen: dict[str, int] = {}
    for failure in failures:
        if failure.traceback in seen:
            parts.append(f"--- rank {failure.rank}: as rank {seen[failure.traceback]}")
        else:
            seen[failure.traceback] = failure.rank
            parts.append(f"--- rank {failure.rank}\n{failure.traceback}")
    return "\n".join(parts)


def _name_of(function: CaseFunction | str) -> str:
    return function if isinstance(function, str) else f"{function.__module__}.{function.__qualname__}"


def _tail(rank: _Rank) -> str:
    with suppress(FileNotFoundError):
        return rank.settings.log_file.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
    return "(it wrote nothing)"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
