"""An explanation on the screen: tables in a terminal, plain lines in a pipe, JSON for programs."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from shardwise.explain.rows import Explanation, Row
from shardwise.explain.states import States

_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_NARROWEST_GRID = 100  # columns; below it four columns of words are harder to read than lines
_WORDS = "P parameters · W ranks · g micro-batches a step · b bytes an element · size the value of the key itself"


def show(
    explanation: Explanation, states: States | None, verdicts: tuple[str, ...], console: Console, everything: bool
) -> None:
    """Print the rows that matter, or all of them; then the numbers, and what is wrong."""
    as_grids = console.is_terminal and console.width >= _NARROWEST_GRID
    for table in explanation.tables:
        rows = [row for row in table.rows if everything or row.shown_first]
        if rows and as_grids:
            console.print(_grid(table.title, rows))
        elif rows:
            _print_plain(console, table.title, rows)
    if explanation.config is None:
        _line(console, "The run is without ZeRO: nothing asks for it, so no model state is sharded.\n")
    else:
        _line(console, f"In costs: {_WORDS}.\n")
    if states is not None:
        _show_states(console, states)
    for warning in explanation.warnings:
        _line(console, f"warning: {warning}", "yellow")
    for verdict in verdicts:
        _line(console, verdict, "red")


def as_json(explanation: Explanation, states: States | None, verdicts: tuple[str, ...], everything: bool) -> str:
    """The same for programs; endless numbers are null."""
    return json.dumps(
        _without_infinity(
            to_jsonable_python(
                {
                    "settings": [
                        {"block": table.title, **_plain_row(row)}
                        for table in explanation.tables
                        for row in table.rows
                        if everything or row.shown_first
                    ],
                    "zero": explanation.config is not None,
                    "model_states": None if states is None else _plain_states(states),
                    "warnings": explanation.warnings,
                    "faults": verdicts,
                }
            )
        ),
        indent=2,
        ensure_ascii=False,
    )


def size_text(num_bytes: int) -> str:
    """Bytes for people: ``26.08 GiB``."""
    for unit, factor in _UNITS:
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes} B"


def _details(row: Row) -> Iterator[tuple[str, str, str]]:
    """What there is to say of a row: a label, the text, a style."""
    yield "does", row.meaning, ""
    yield "auto", row.auto, "cyan"
    yield "costs", row.cost, "dim"
    yield "no effect", row.idle, "dim"
    yield "refused", row.refused, "red"
    yield "DeepSpeed", row.deepspeed, "yellow"


def _grid(title: str, rows: list[Row]) -> Grid:
    grid = Grid(title=title, title_justify="left", title_style="bold", show_lines=True, expand=True)
    grid.add_column("setting", overflow="fold", min_width=30)
    grid.add_column("value", overflow="fold", ratio=2)
    grid.add_column("said by", overflow="fold", ratio=2)
    grid.add_column("what it does · what it costs", overflow="fold", ratio=7)
    for row in rows:
        details = Text()
        for label, text, style in _details(row):
            if text:
                details.append("\n" if details else "")
                details.append(text if label == "does" else f"{label}: {text}", style=style)
        grid.add_row(Text(row.key, style="bold"), Text(row.value_text), Text(row.place), details)
    return grid


def _print_plain(console: Console, title: str, rows: list[Row]) -> None:
    _line(console, title)
    for row in rows:
        _line(console, f"  {row.key} = {row.value_text}    [{row.place}]")
        for label, text, _ in _details(row):
            if text:
                _line(console, f"      {label}: {text}")
    _line(console, "")


def _show_states(console: Console, states: States) -> None:
    title = (
        f"Model states at rest on one rank: {states.num_parameters:,} parameters, {states.num_ranks} "
        f"rank{'s' * (states.num_ranks > 1)}, {states.dtype}, {states.optimizer}"
    )
    head = ("stage", "parameters", "gradients", "optimizer", "in all")
    grid = Grid(*head, title=title, title_justify="left", title_style="bold")
    lines = [title]
    for found in states.stages:
        parts = (found.bytes.parameters, found.bytes.gradients, found.bytes.optimizer, found.bytes.total)
        cells = [str(found.stage), *map(size_text, parts)]
        grid.add_row(*cells, style="bold" if found.in_force else "dim")
        named = ", ".join(f"{name} {cell}" for name, cell in zip(head[1:], cells[1:], strict=True))
        lines.append(f"  stage {found.stage}: {named}{'    <- this config' if found.in_force else ''}")
    if console.is_terminal:
        console.print(grid)
    else:
        _line(console, "\n".join(lines))
    if states.off_the_device:
        _line(console, f"Of this config's, off the device: {'; '.join(states.off_the_device)}.")
    if states.secondary_bytes:
        _line(console, f"zero_hpz_partition_size keeps {size_text(states.secondary_bytes)} of parameters beside them.")
    _line(console, "Activations and the units that are whole for a moment come on top.\n", "dim")


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(Text(text, style=style or ""), soft_wrap=True)


def _plain_row(row: Row) -> dict[str, Any]:
    plain = asdict(row)
    del plain["shown_first"]
    return plain


def _plain_states(states: States) -> dict[str, Any]:
    return {
        "num_parameters": states.num_parameters,
        "num_ranks": states.num_ranks,
        "dtype": states.dtype,
        "optimizer": states.optimizer,
        "off_the_device": states.off_the_device,
        "secondary_bytes": states.secondary_bytes,
        "bytes_per_rank": [
            {"stage": found.stage, "in_force": found.in_force, **asdict(found.bytes), "total": found.bytes.total}
            for found in states.stages
        ],
    }


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
