"""What ``train_gpt.py`` shows: a live display on a terminal, plain lines elsewhere, nothing on the other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Bytes a parameter that Adam's training holds on EVERY rank without sharding: parameters, gradients, optimizer state.
# In fp32 the weights are their own master copy; in half precision an fp32 master copy counts as optimizer state.
DATA_PARALLEL_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 4, 12), "fp16": (2, 4, 12)}
PLAIN_WIDTH = 110  # columns of a log file


@dataclass(frozen=True)
class Progressed:
    """What is known after a step; the numbers are means over ranks, except for the bytes, which are this rank's."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float  # of all ranks together
    held_bytes: int


class Screen:
    """One per process; only the main process's writes."""

    def __init__(self, *, is_main: bool) -> None:
        self._console = Console(quiet=not is_main, highlight=False)
        if not self._console.is_terminal:
            self._console = Console(quiet=not is_main, highlight=False, width=PLAIN_WIDTH)
        self._num_steps = 0
        self._bar: Progress | None = None  # while a live display is open
        self._task = TaskID(0)
        self._numbers = Text("…")

    def facts(self, facts: dict[str, str]) -> None:
        """What is about to be run: a framed list of names and values."""
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(Text(name, style="dim"), Text(value))
        self._console.print(Panel(table, title="shardwise · train_gpt", title_align="left", expand=False))

    def say(self, line: str) -> None:
        """One line; square brackets in it are text, not styles."""
        self._console.print(Text(line))

    def status(self, line: str) -> None:
        """A line about work that is about to begin."""
        self._console.print(Text(line, style="dim"))

    def error(self, message: str) -> None:
        """The user's mistake, in red, on the error stream."""
        Console(stderr=True, highlight=False).print(
            Text("error: ", style="bold red").append(message, style="default"), soft_wrap=True
        )

    @contextmanager
    def training(self, num_steps: int) -> Iterator[None]:
        """While this is open, ``advance`` and ``report`` show the progress of ``num_steps`` steps."""
        self._num_steps = num_steps
        if self._console.quiet or not self._console.is_terminal:
            yield
            return
        columns = (BarColumn(bar_width=40), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
        self._bar = Progress(*columns, console=self._console)  # drawn by Live, together with the numbers
        self._task = self._bar.add_task("training", total=num_steps)
        panel = Panel(Group(self._bar, self._numbers), title="training", title_align="left", expand=False)
        with Live(panel, console=self._console, refresh_per_second=4):
            yield
        self._bar = None

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def report(self, now: Progressed) -> None:
        """Show the numbers of a step: in the live display, or as a line of a log."""
        numbers = (
            f"loss {now.loss:.3f} · {now.tokens_per_second:,.0f} tokens/s · gradient norm {now.gradient_norm:.2f} · "
            f"{_megabytes(now.held_bytes)} per rank"
        )
        if self._bar is not None:
            self._numbers.plain = numbers
        else:
            width = len(str(self._num_steps))
            self.say(f"step {now.step:>{width}}/{self._num_steps} · {numbers} · lr {now.learning_rate:.1e}")

    def sample(self, prompt: str, continuation: str) -> None:
        """What the trained model wrote, its beginning set apart from its own words."""
        text = Text(_printable(prompt), style="bold").append(_printable(continuation), style="green")
        self._console.print(Panel(text, title="a sample from the trained model", title_align="left"))

    def savings(
        self, held: tuple[int, ...], *, num_parameters: int, precision: str, stage: int, num_ranks: int
    ) -> None:
        """Bytes of parameters, gradients and optimizer held here, beside those of plain data parallel with Adam."""
        plain = tuple(bytes_each * num_parameters for bytes_each in DATA_PARALLEL_BYTES[precision])
        ranks = "the only rank" if num_ranks == 1 else f"each of {num_ranks} ranks"
        table = Table(title=f"model states on {ranks}", title_justify="left", title_style="bold", show_footer=True)
        table.add_column("", footer="together")
        table.add_column("plain data parallel", footer=_megabytes(sum(plain)), justify="right")
        table.add_column(f"this run, ZeRO stage {stage}", footer=_megabytes(sum(held)), justify="right")
        table.add_column("saved", footer=_saved(sum(held), sum(plain)), justify="right")
        for name, ours, theirs in zip(("parameters", "gradients", "optimizer (Adam)"), held, plain, strict=True):
            table.add_row(name, _megabytes(theirs), _megabytes(ours), _saved(ours, theirs))
        if precision != "fp32" and stage == 3:
            table.caption = "Stage 3 keeps no half-precision copy at rest: its parameters are the fp32 masters."
        self._console.print(table)


def _printable(text: str) -> str:
    """The text without what a terminal would obey: an untrained model writes any byte."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "·" for sign in text.expandtabs())


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _saved(ours: int, theirs: int) -> str:
    return f"{1 - ours / theirs:.0%}"
