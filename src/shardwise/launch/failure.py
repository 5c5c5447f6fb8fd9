"""Which rank ended the run, and what it had to say.

One rank's error brings others after it: their collectives break, the agent ends the rest. Only the first says what to
mend.
"""

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_NO_WORD = "It left no traceback; what it printed itself stands above."


@dataclass(frozen=True)
class RankFailure:
    """The end of one rank that did not end well."""

    rank: int
    exit_code: int  # as subprocess has it: -N for signal N
    time_seconds: float  # since the epoch; when the error was raised, or else when the end was noticed
    summary: str = ""  # the error in one line, if the rank left one
    stack: str = ""  # the traceback, if the rank left one
    host: str = ""  # the machine it ran on, where there are several

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that ended the rank, if one did."""
        return signal.Signals(-self.exit_code) if self.exit_code < 0 else None

    @property
    def status(self) -> int:
        """The exit code as a shell reports it: 128 + N for signal N."""
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    @property
    def how(self) -> str:
        """How the rank ended, in words."""
        if self.signal is None:
            return f"exit code {self.exit_code}"
        return f"killed by {self.signal.name}"

    @property
    def place(self) -> str:
        """Where the rank ran, as far as that is a question."""
        return f" on {self.host}" if self.host else ""

    @property
    def _order(self) -> tuple[int, float]:
        if self.signal is signal.SIGTERM:
            return 2, self.time_seconds  # most likely ended by the agent, because another failed
        if self.signal is not None and not self.summary:
            # A crash is noticed later than the errors that it causes in others, which are timed when they are raised.
            return 0, self.time_seconds
        return 1, self.time_seconds


def read_failures(failures: "Mapping[int, ProcessFailure]", host: str = "") -> list[RankFailure]:
    """What torch's elastic agent knows of each failed rank, the one that ended the run first."""
    return in_order(_read(rank, failure, host) for rank, failure in failures.items())


def in_order(failures: Iterable[RankFailure]) -> list[RankFailure]:
    """The one that ended the run first, then the others as they followed."""
    return sorted(failures, key=lambda failure: failure._order)


def _read(rank: int, failure: "ProcessFailure", host: str) -> RankFailure:
    message = failure.error_file_data.get("message")
    if not isinstance(message, dict):  # the rank left no error file
        return RankFailure(rank, failure.exitcode, float(failure.timestamp), host=host)
    details = message["extraInfo"]
    return RankFailure(
        rank,
        failure.exitcode,
        float(details.get("time", failure.timestamp)),
        summary=message["message"],
        stack=details["py_callstack"],
        host=host,
    )


def print_failures(failures: list[RankFailure], num_processes: int, console: Console) -> None:
    """Shows the first failure in full and each other one in a line.

    Where the first left no traceback (a crash), the earliest one that there is stands below it in full.
    """
    first, *others = failures
    title = f"rank {first.rank} of {num_processes}{first.place} failed ({first.how})"
    console.rule(title, style="red", characters="─")
    explained = next((failure for failure in failures if failure.stack), None)
    if first.stack:
        _print_plain(console, first.stack)
    else:
        _print_plain(console, first.summary or _NO_WORD)
        if first.signal is signal.SIGKILL and not first.summary:
            _print_plain(console, "The kernel kills a process in this way when memory runs out.")
        if explained is not None:
            _print_plain(
                console,
                f"\nrank {explained.rank}{explained.place} ({explained.how}) then failed with:\n{explained.stack}",
            )
    for failure in others:
        if failure is not explained and failure.signal is not signal.SIGTERM:
            line = f"rank {failure.rank}{failure.place} failed too ({failure.how}): {failure.summary}"
            _print_plain(console, line.rstrip(": "))


def _print_plain(console: Console, text: str) -> None:
    console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
