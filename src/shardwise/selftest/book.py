"""What each rank found, written down as it happens: a line when a check begins and a line when it ends."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from shardwise.errors import ConfigError

Found = TypeVar("Found")

CHECKS = ("settings", "process group", "broadcast", "reduce", "gather", "training", "reference", "loss", "ranks agree")
"""In the order in which a rank comes to them."""


class Verdict(StrEnum):
    """How a check stands on one rank."""

    BEGUN = "begun"  # the last word of a rank that died or was ended in the middle
    PASSED = "passed"
    FAILED = "failed"


@dataclass(frozen=True)
class Entry:
    """One line of a book."""

    check: str
    verdict: Verdict
    detail: str = ""
    advice: str = ""  # what to do about a failure


class CheckFailed(Exception):
    """A check came to its end and found something wrong; the others may go on."""

    def __init__(self, detail: str, advice: str) -> None:
        super().__init__(detail)
        self.advice = advice


class NothingMoreToCheck(Exception):
    """The configuration cannot work, as every rank finds out for itself; this rank leaves without an error."""


class Book:
    """The file of one rank. Its first line names the ranks on this machine."""

    def __init__(self, directory: Path, rank: int, ranks_here: range) -> None:
        self._path = directory / f"{rank}.jsonl"
        self._write({"ranks_here": list(ranks_here)})

    def check(self, name: str, body: Callable[[], tuple[Found, str]], advice: Callable[[Exception], str]) -> Found:
        """Run a check that later ones need; `body` returns what they need and a detail for the report.

        Raises NothingMoreToCheck where the configuration cannot work, and passes any other error on: the rank then
        ends, and with it the run.
        """
        self._enter(Entry(name, Verdict.BEGUN))
        try:
            found, detail = body()
        except ConfigError as error:
            self._enter(Entry(name, Verdict.FAILED, str(error)))
            raise NothingMoreToCheck from None
        except CheckFailed as failure:
            self._enter(Entry(name, Verdict.FAILED, str(failure), failure.advice))
            raise
        except Exception as error:
            self._enter(Entry(name, Verdict.FAILED, f"{type(error).__name__}: {error}", advice(error)))
            raise
        self._enter(Entry(name, Verdict.PASSED, detail))
        return found

    def compare(self, name: str, body: Callable[[], str], advice: Callable[[Exception], str]) -> None:
        """Run a check that nothing depends on: where `body` raises CheckFailed, the rank goes on."""
        with suppress(CheckFailed):
            self.check(name, lambda: (None, body()), advice)

    def _enter(self, entry: Entry) -> None:
        self._write(asdict(entry))

    def _write(self, line: dict[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Pages:
    """What one rank has written."""

    rank: int
    entries: tuple[Entry, ...]

    def last(self, check: str) -> Entry | None:
        """The last word on a check; None if the rank did not come to it."""
        return next((entry for entry in reversed(self.entries) if entry.check == check), None)


def read_books(directory: Path) -> list[Pages]:
    """The pages of every rank that should have been on this machine; empty ones for a rank that never began."""
    ranks: set[int] = set()
    written: dict[int, tuple[Entry, ...]] = {}
    for path in directory.glob("*.jsonl"):
        head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        ranks |= set(head["ranks_here"])
        written[int(path.stem)] = tuple(_entries(lines))
    return [Pages(rank, written.get(rank, ())) for rank in sorted(ranks)]


def _entries(lines: list[dict[str, str]]) -> Iterator[Entry]:
    for line in lines:
        yield Entry(**{**line, "verdict": Verdict(line["verdict"])})  # type: ignore[arg-type]
