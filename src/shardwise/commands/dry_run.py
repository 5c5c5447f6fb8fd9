"""What `shardwise launch --dry-run` prints: the processes, and every setting with the place that it comes from."""

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwise.config.messages import dotted, shown
from shardwise.config.run.resolved import Resolved
from shardwise.config.run.said import Origin, Said
from shardwise.launch.environment import rank_environment
from shardwise.launch.job import Job

_ALWAYS = ("mixed_precision",)  # worth reading also where nobody said them
_ALWAYS_WITH_ZERO = ("zero_stage", "offload_optimizer_device", "offload_param_device")
_WIDE = 10_000  # columns: where no terminal wraps lines, neither do we


def print_job(job: Job, resolved: Resolved, inherited: Mapping[str, str]) -> None:
    """Prints what would run; plain lines where the screen is no terminal."""
    screen = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    run_file = Path("(run directory)", "asked.json")
    for name, value in rank_environment(job, inherited, run_file).items():
        print(f"{name}={shlex.quote(value)}")
    print(f"{job.num_local_processes} x {shlex.join(job.command)}    # on {job.device.value}{_machine(job)}")
    _print_table(screen, "setting", _settings(job, resolved))
    if resolved.ds_config is not None:
        _print_table(screen, "DeepSpeed JSON", ((dotted(path), said) for path, said in resolved.origins.items()))


def _machine(job: Job) -> str:
    meeting = job.meeting
    if meeting.num_machines == 1:
        return ""
    return (
        f", machine {meeting.machine_rank} of {meeting.num_machines}, "
        f"met at {meeting.address}:{meeting.port} ({meeting.backend})"
    )


def _settings(job: Job, resolved: Resolved) -> Iterator[tuple[str, Said]]:
    always = {*_ALWAYS, *(_ALWAYS_WITH_ZERO if resolved.ds_config is not None else ())}
    for name, said in resolved.values.items():
        if name == "num_processes" and said.value is None:
            place = f"this machine, on {job.device.value}" if job.meeting.num_machines == 1 else "slots of the hostfile"
            yield name, Said(job.num_processes, Origin.DEFAULT, place)
        elif said.origin is not Origin.DEFAULT or name in always:
            yield name, said


def _print_table(screen: Console, title: str, rows: Iterator[tuple[str, Said]]) -> None:
    table = Table()
    for heading in (title, "value", "from"):
        table.add_column(heading, overflow="fold")  # a key that is cut short names nothing
    plain = not screen.is_terminal
    if plain:
        table.box = None
        table.pad_edge = False
    for name, said in rows:
        table.add_row(Text(name), Text(shown(said.value)), Text(said.place))
    with screen.capture() as capture:
        screen.print(table)
    text = capture.get()
    print()
    print("\n".join(line.rstrip() for line in text.splitlines()) if plain else text.rstrip("\n"))
