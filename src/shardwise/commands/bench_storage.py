"""`shardwise bench-storage`: what a disk gives, and the settings to write into the JSON."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shardwise.store.survey import Survey


def bench_storage(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A directory, on the disk that nvme_path will name.", show_default=False),
    ],
    size: Annotated[str, typer.Option("--size", help="Of the file that is written, read and removed.")] = "2GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure a disk for offload to NVMe: speeds by settings, the optimizer's own pattern, and the best `aio` block.

    Takes about a minute and leaves nothing behind.
    """
    import json
    import logging
    from dataclasses import asdict
    from pathlib import Path

    from rich.console import Console

    from shardwise.checkpoint.zero_to_fp32 import parse_size
    from shardwise.store.survey import survey

    logging.getLogger("shardwise.store.direct_io").setLevel(logging.ERROR)  # the table says it
    screen = Console(stderr=True)
    num_bytes = parse_size(size)
    with screen.status("") if screen.is_terminal else _Silence() as status:
        found = survey(Path(path), num_bytes, lambda what, part: status.update(f"{part:4.0%}  {what}"))
    if as_json:
        print(json.dumps(asdict(found) | {"aio": found.aio}, indent=2))
    else:
        _show(found, Console(soft_wrap=True))


class _Silence:
    """Progress where nobody watches."""

    def __enter__(self) -> "_Silence":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, text: str) -> None:
        """Says nothing."""


def _show(found: "Survey", console: "Console") -> None:
    import json

    console.print(_grid(found))
    way = "past the page cache" if found.is_direct else "through the page cache, for O_DIRECT is refused here"
    cached = f"read {_speed(found.page_cache_read)}, write {_speed(found.page_cache_write)}"
    share = found.stream / found.both_ways if found.both_ways else 0.0
    for line in (
        f"File of {found.num_bytes / 1e9:.1f} GB, {way}. Through the page cache instead: {cached}.",
        f"Both ways at once, {_words(found)}: {_speed(found.both_ways)}, read and written together.",
        f"The optimizer's pattern: {_speed(found.stream)}, {share:.0%} of that; beside arithmetic that is a fifth "
        f"slower than the disk, arithmetic is busy {found.work_busy:.0%} of the time.",
        "For the JSON:",
        f'"aio": {json.dumps(found.aio, indent=2)}',
    ):
        console.print(line, markup=False, highlight=False)


def _grid(found: "Survey") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=f"{found.path}, GB/s", box=box.SIMPLE)
    for heading in ("block", "at once", "read", "write"):
        table.add_column(heading, justify="right")
    for cell in found.cells:
        numbers = (f"{cell.block_size >> 10} KiB", str(cell.queue_depth), _giga(cell.read), _giga(cell.write))
        table.add_row(*numbers, style="bold" if cell == found.best else None)
    return table


def _words(found: "Survey") -> str:
    return f"{found.best.queue_depth} blocks of {found.best.block_size >> 10} KiB each"


def _giga(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f}"


def _speed(bytes_per_second: float) -> str:
    return f"{_giga(bytes_per_second)} GB/s"
