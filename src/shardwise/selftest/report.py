"""The books of all ranks as one table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwise.selftest.book import Entry, Pages, Verdict

_STYLES = {"passed": "green", "failed": "bold red", "not reached": "dim"}


@dataclass(frozen=True)
class Line:
    """One check over all ranks."""

    check: str
    verdict: str  # passed, failed, not reached
    details: tuple[str, ...]
    advice: tuple[str, ...] = ()


def judge(checks: Sequence[str], books: Sequence[Pages]) -> list[Line]:
    """One line a check. A failure names its ranks; what several ranks say alike is said once."""
    return [_line(check, books) for check in checks]


def all_passed(lines: Sequence[Line]) -> bool:
    """Whether every check passed on every rank."""
    return all(line.verdict == "passed" for line in lines)


def show(lines: Sequence[Line], num_ranks: int, console: Console) -> None:
    """Print the table and, under it, what to do."""
    if console.is_terminal:
        table = Table(title=f"shardwise test on {_ranks(range(num_ranks))}", title_justify="left", title_style="bold")
        for name in ("check", "verdict", "what was found"):
            table.add_column(name, overflow="fold")
        for line in lines:
            verdict = Text(line.verdict, style=_STYLES[line.verdict])
            table.add_row(line.check, verdict, Text("\n".join(line.details)))
        console.print(table)
    else:
        for line in lines:
            _print(console, f"{line.check:<14} {line.verdict:<12} {'; '.join(line.details)}".rstrip())
    for line in lines:
        for advice in line.advice:
            _print(console, f"{line.check}: {advice}")
    if all_passed(lines):
        _print(console, f"All {len(lines)} checks passed.")
    else:
        _print(console, f"Failed: {', '.join(line.check for line in lines if line.verdict == 'failed')}.")


def _line(check: str, books: Sequence[Pages]) -> Line:
    last = {pages.rank: pages.last(check) for pages in books}
    entries = [entry for entry in last.values() if entry is not None]
    failures = list(_failures(last, books))
    if failures:
        advice = dict.fromkeys(entry.advice for entry in entries if entry.advice)
        return Line(check, "failed", tuple(failures), tuple(advice))
    if not entries or any(entry is None or entry.verdict is Verdict.BEGUN for entry in last.values()):
        return Line(check, "not reached", ())
    return Line(check, "passed", tuple(dict.fromkeys(entry.detail for entry in entries))[:1])


def _failures(last: dict[int, Entry | None], books: Sequence[Pages]) -> Iterator[str]:
    """What failed, once for all ranks that say the same, and ranks that died in the middle while none failed."""
    said: dict[str, list[int]] = {}
    for rank, entry in last.items():
        if entry is not None and entry.verdict is Verdict.FAILED:
            said.setdefault(entry.detail, []).append(rank)
    for detail, ranks in said.items():
        yield f"{_ranks(ranks)}: {detail}"
    if said or any(entry.verdict is Verdict.FAILED for pages in books for entry in pages.entries):
        return
    died = [rank for rank, entry in last.items() if entry is not None and entry.verdict is Verdict.BEGUN]
    if died:
        yield f"{_ranks(died)}: ended in the middle of it; what is printed above says how."


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
