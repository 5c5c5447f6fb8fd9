"""What starting costs: ``shardwise launch`` against torchrun, and ``--help``: ``python -m bench.launch --help``.

Each round runs every command once, in a shuffled order. A launch is timed from the command to the first line that a
script prints; its difference is to torchrun in the same round. The promises: a launch is no more than 0.5 s behind
torchrun, and ``shardwise --help`` answers within 0.3 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from bench.interleave import shuffled_orders
from bench.machine import machine_facts
from bench.options import at_least
from bench.report import CONSOLE, print_facts, write_json

TORCHRUN = "torchrun script.py"
SCRIPT = "print('the first line of the script', flush=True)\n"
_SHARDWISE = (sys.executable, "-m", "shardwise.commands.main")


def main() -> None:
    """Run what the command line asks for and print it."""
    options = _parse_options()
    facts = machine_facts()
    print_facts("machine", facts)
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "script.py")
        script.write_text(SCRIPT)
        seconds = time_commands(_commands(script, options.world), options.warmup, options.rounds, options.seed)
    CONSOLE.print(_table(seconds, options.world))
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"machine": facts, "options": settings, "seconds": seconds})


def _commands(script: Path, num_processes: int) -> dict[str, tuple[str, ...]]:
    """By the name in the table; the config of whoever runs this has no say."""
    count, no_config = str(num_processes), script.with_name("empty.yaml")
    no_config.touch()
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count)
    launch = (*_SHARDWISE, "launch", "--cpu", "-n", count, "--config_file", str(no_config))
    return {
        TORCHRUN: (*torchrun, str(script)),
        "shardwise launch script.py": (*launch, str(script)),
        "shardwise launch --zero_stage 3 script.py": (*launch, "--zero_stage", "3", str(script)),
        "shardwise --help": (*_SHARDWISE, "--help"),
        "shardwise launch --help": (*_SHARDWISE, "launch", "--help"),
    }


def time_commands(commands: Mapping[str, Sequence[str]], warmup: int, rounds: int, seed: int) -> dict[str, list[float]]:
    """Run every command once a round; seconds of the measured rounds until it has said something of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for index, order in enumerate(shuffled_orders(list(commands), warmup + rounds, seed)):
        for name in order:
            elapsed = _seconds_to_speak(commands[name])
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _seconds_to_speak(command: Sequence[str]) -> float:
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        elapsed = time.perf_counter() - start
        process.stdout.read()
        errors = process.stderr.read()
    if process.returncode != 0 or not line:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors}")
    return elapsed


def _table(seconds: Mapping[str, Sequence[float]], num_processes: int) -> Table:
    table = Table(title=f"to the first line, {num_processes} processes a launch", title_justify="left")
    table.add_column("command")
    for column in ("s, median", "quartiles", "s behind torchrun, median"):
        table.add_column(column, justify="right")
    for name, times in seconds.items():
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [*times] * 3
        behind = [ours - theirs for ours, theirs in zip(times, seconds[TORCHRUN], strict=True)]
        is_launch = name != TORCHRUN and not name.endswith("--help")
        table.add_row(
            name,
            f"{median:.3f}",
            f"{lower:.3f} - {upper:.3f}",
            f"{statistics.median(behind):+.3f}" if is_launch else "",
        )
    return table


def _parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=at_least(1), default=10, help="measured rounds")
    add("--warmup", type=at_least(0), default=1, help="rounds before them")
    add("--world", type=at_least(1), default=2, help="processes of a launch")
    add("--seed", type=int, default=0, help="of the order in which commands take turns")
    add("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
