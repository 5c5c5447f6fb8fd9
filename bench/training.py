"""Training time and memory of shardwise against its peers: ``python -m bench.training --help``.

For each model size
1. time: contenders train side by side in one launch of ``--world`` processes, one step each in a shuffled order, round
   after round. What is reported is the median over rounds of the ratio to DDP in the same round. Where memory does not
   hold all contenders at once, they are cut into groups, each with its own DDP;
2. memory: each contender alone in fresh processes, its peak above what the process held before the model was built.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.table import Table

from bench import memory
from bench.contenders import CONTENDERS
from bench.interleave import Rounds
from bench.machine import machine_facts
from bench.measure import ContenderMemory, TimedContender, measure_memory, time_together
from bench.models import SHAPES
from bench.options import at_least, comma_separated, one_of
from bench.report import CONSOLE, mebibytes, print_facts, ratio_text, write_json
from bench.workload import OPTIMIZERS, Workload

BASELINE = "ddp"
# fp32 parameter, gradient and Adam's two moments are 16; DDP's buckets are 4 more. Engines that shard hold less.
_BYTES_PER_PARAMETER = 20
# Of the memory that is free at the start; the rest is for activations, libraries and the machine's other users.
_MEMORY_SHARE = 0.75


@dataclass
class SizeResult:
    """All that was measured at one model size."""

    parameters: int
    timed: dict[str, list[TimedContender]] = field(default_factory=dict)  # the baseline has one entry per group
    memory: dict[str, list[ContenderMemory]] = field(default_factory=dict)  # by rank


def main() -> None:
    """Run what the command line asks for and print it."""
    options = _parse_options()
    names, skipped = _runnable(options.contenders)
    facts = machine_facts()
    print_facts("machine", facts)
    print_facts("run", {name: f"{value}" for name, value in vars(options).items() if value is not None})
    for name, reason in skipped.items():
        CONSOLE.print(f"[yellow]skipped[/] {name}: {reason}")

    results: dict[str, SizeResult] = {}
    for size in options.sizes:
        workload = Workload(SHAPES[size], options.batch, options.seq, options.optimizer, options.seed)
        results[size] = result = SizeResult(workload.count_parameters())
        if "time" in options.measure:
            _time(workload, names, options, result)
            CONSOLE.print(_time_table(size, result))
        if "memory" in options.measure:
            _watch(workload, names, options, result)
            CONSOLE.print(_memory_table(size, result))
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"machine": facts, "options": settings, "skipped": skipped, "sizes": results})


def groups_within(names: Sequence[str], baseline: str, at_once: int) -> list[list[str]]:
    """Cut ``names`` into launches of at most ``at_once`` contenders, each beginning with the baseline.

    A launch holds at least the baseline and one more, whatever ``at_once`` says: less would compare nothing.
    """
    others = [name for name in names if name != baseline]
    share = max(1, at_once - 1)
    return [[baseline, *others[start : start + share]] for start in range(0, len(others), share)] or [[baseline]]


def _time(workload: Workload, names: list[str], options: argparse.Namespace, result: SizeResult) -> None:
    rounds = Rounds(options.warmup, options.rounds, options.steps_per_turn)
    budget_bytes = (
        options.memory_budget_gb * 10**9
        if options.memory_budget_gb is not None
        else psutil.virtual_memory().available * _MEMORY_SHARE
    )
    at_once = int(budget_bytes // (_BYTES_PER_PARAMETER * result.parameters * options.world))
    for group in groups_within(names, BASELINE, at_once):
        CONSOLE.print(f"[dim]timing in one launch: {', '.join(group)}")
        timed = time_together(workload, group, BASELINE, rounds, options.world, options.threads)
        for name, measured in timed.items():
            result.timed.setdefault(name, []).append(measured)


def _watch(workload: Workload, names: list[str], options: argparse.Namespace, result: SizeResult) -> None:
    if reason := memory.reason_to_skip():
        CONSOLE.print(f"[yellow]skipped[/] memory: {reason}")
        return
    for name in names:
        CONSOLE.print(f"[dim]memory, alone in fresh processes: {name}")
        result.memory[name] = measure_memory(workload, name, options.memory_steps, options.world, options.threads)


def _time_table(size: str, result: SizeResult) -> Table:
    table = Table(title=f"{_heading(size, result)}, time of a step", title_justify="left")
    table.add_column("contender")
    for column in (f"ratio to {BASELINE}, median", "quartiles", "ms a step, median", "last loss, mean of ranks"):
        table.add_column(column, justify="right")
    for name, launches in result.timed.items():
        # The baseline is in every launch with ratio 1 and the same loss; its time is given over all of them.
        median_ms = 1e3 * statistics.median(second for launch in launches for second in launch.seconds_per_step)
        loss = statistics.fmean(launches[-1].last_losses)
        table.add_row(name, *ratio_text(launches[-1].ratios), f"{median_ms:.1f}", f"{loss:.9f}")
    return table


def _memory_table(size: str, result: SizeResult) -> Table:
    table = Table(
        title=f"{_heading(size, result)}, peak MiB of the fullest rank",
        title_justify="left",
        caption="PSS divides the pages that ranks share; RSS does not.",
    )
    table.add_column("contender")
    for column in ("training, PSS", "training, RSS", "whole run, PSS", "whole run, RSS"):
        table.add_column(column, justify="right")
    for name, ranks in result.memory.items():
        counts: tuple[Callable[[ContenderMemory], int], ...] = (
            lambda rank: rank.training.proportional_bytes,
            lambda rank: rank.training.resident_bytes,
            lambda rank: rank.whole_run.proportional_bytes,
            lambda rank: rank.whole_run.resident_bytes,
        )
        table.add_row(name, *(mebibytes(max(map(count, ranks))) for count in counts))
    return table


def _heading(size: str, result: SizeResult) -> str:
    return f"{size}: {result.parameters / 1e6:.1f} M parameters"


def _runnable(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The contenders that can run here, the baseline first, and why the others cannot."""
    reasons = {name: CONTENDERS[name].reason_to_skip() for name in dict.fromkeys((BASELINE, *names))}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in reasons if name not in skipped], skipped


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--sizes",
        type=comma_separated(one_of(SHAPES)),
        default=list(SHAPES),
        help=f"of {', '.join(SHAPES)}; default: all",
    )
    add(
        "--contenders",
        type=comma_separated(one_of(CONTENDERS)),
        default=list(CONTENDERS),
        help=f"of {', '.join(CONTENDERS)}; {BASELINE} always runs; default: all",
    )
    add(
        "--measure",
        type=comma_separated(one_of(("time", "memory"))),
        default=["time", "memory"],
        help="time, memory or both",
    )
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="torch's AdamW by its defaults, or with fused=True")
    add("--dtype", choices=("fp32",), default="fp32", help="of parameters, gradients and optimizer state")
    add("--rounds", type=at_least(1), default=15, help="measured rounds")
    add("--warmup", type=at_least(1), default=3, help="rounds before them")
    add("--steps-per-turn", type=at_least(1), default=1, help="steps that a contender takes when it is its turn")
    add("--memory-steps", type=at_least(2), default=4, help="steps under the memory count")
    add("--memory-budget-gb", type=float, help="bytes for all contenders of one launch; default: 75 %% of what is free")
    add("--batch", type=at_least(1), default=2, help="sequences per rank and step")
    add("--seq", type=at_least(1), default=128, help="tokens per sequence")
    add("--world", type=at_least(1), default=2, help="processes")
    add("--threads", type=at_least(1), default=1, help="threads per process")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
