"""The screens and the JSON of the benchmarks."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.interleave import Ratios

CONSOLE = Console(width=None if sys.stdout.isatty() else 140)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """A two-column list."""
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(f"[bold]{name}", value)
    CONSOLE.print(table)


def ratio_text(ratios: Ratios) -> tuple[str, str]:
    """The median ratio, and the quartiles around it."""
    return f"{ratios.median:.3f}", f"{ratios.lower_quartile:.3f} - {ratios.upper_quartile:.3f}"


def mebibytes(size_bytes: int) -> str:
    """Bytes as whole MiB."""
    return f"{size_bytes / 2**20:,.0f}"


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, dataclasses included, as readable JSON."""
    path.write_text(json.dumps(result, indent=1, default=_as_json) + "\n")
    CONSOLE.print(f"written: {path}")


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form here")
