"""What an engine costs where there is nothing to shard: ``python -m bench.overhead --help``.

World size 1 and a step of about 5 ms: the engine's own work (hooks, bookkeeping, its step) against the bare torch loop
around the same model, optimizer and data. The width of a small GPT is chosen on this machine, so that the bare step
takes about ``--milliseconds``; then all contenders take turns in one process. What is reported is the median over
rounds of the ratio to the bare loop in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from bench.contenders import CONTENDERS
from bench.interleave import Rounds
from bench.machine import machine_facts
from bench.measure import time_together
from bench.models import GPTShape
from bench.options import at_least, comma_separated, one_of
from bench.report import CONSOLE, print_facts, ratio_text, write_json
from bench.workload import OPTIMIZERS, Workload
from bench.world import run_in_world

BASELINE = "nocomm"
DEFAULT_CONTENDERS = ("ddp", "fsdp2", "shardwise0", "shardwise1", "shardwise2", "shardwise3")
_HEADS = 4
_WIDTHS = range(32, 513, 32)
_CALIBRATION_STEPS = 30
_SKIPPED_STEPS = 5  # the first ones make optimizer state and warm caches


@dataclass(frozen=True)
class Calibration:
    """The chosen model and what its bare step took."""

    shape: GPTShape
    seconds_per_step: float


def main() -> None:
    """Run what the command line asks for and print it."""
    options = _parse_options()
    facts = machine_facts()
    print_facts("machine", facts)
    reasons = {name: CONTENDERS[name].reason_to_skip() for name in dict.fromkeys((BASELINE, *options.contenders))}
    for name, reason in reasons.items():
        if reason is not None:
            CONSOLE.print(f"[yellow]skipped[/] {name}: {reason}")
    names = [name for name, reason in reasons.items() if reason is None]

    narrowest = GPTShape(options.blocks, min(_WIDTHS), _HEADS, vocabulary=512, positions=options.seq)
    workload = Workload(narrowest, options.batch, options.seq, options.optimizer, options.seed)
    (calibration,) = run_in_world(1, options.threads, calibrate, workload, options.milliseconds / 1e3)
    workload = replace(workload, shape=calibration.shape)
    width, milliseconds = calibration.shape.width, 1e3 * calibration.seconds_per_step
    parameters = workload.count_parameters()
    CONSOLE.print(
        f"model: {options.blocks} blocks of width {width}, {parameters:,} parameters; the bare step alone takes "
        f"{milliseconds:.2f} ms"
    )

    rounds = Rounds(options.warmup, options.rounds, options.steps_per_turn)
    timed = time_together(workload, names, BASELINE, rounds, world_size=1, threads=options.threads)
    table = Table(title=f"one process, {options.optimizer}", title_justify="left")
    table.add_column("contender")
    for column in (f"ratio to {BASELINE}, median", "quartiles", "ms a step, median", "last loss"):
        table.add_column(column, justify="right")
    for name, measured in timed.items():
        milliseconds = 1e3 * measured.ratios.median_seconds
        table.add_row(name, *ratio_text(measured.ratios), f"{milliseconds:.3f}", f"{measured.last_losses[0]:.9f}")
    CONSOLE.print(table)
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"machine": facts, "options": settings, "model": calibration, "timed": timed})


def calibrate(workload: Workload, target_seconds: float) -> Calibration:
    """Widen the model until a bare step takes longer than asked for; the width that came nearest."""
    nearest: Calibration | None = None
    for width in _WIDTHS:
        shape = replace(workload.shape, width=width)
        tried = Calibration(shape, _bare_step_seconds(replace(workload, shape=shape)))
        if nearest is None or _miss(tried, target_seconds) < _miss(nearest, target_seconds):
            nearest = tried
        if tried.seconds_per_step > target_seconds:
            break
    assert nearest is not None, "the range of widths is not empty"
    return nearest


def _miss(calibration: Calibration, target_seconds: float) -> float:
    return abs(calibration.seconds_per_step - target_seconds)


def _bare_step_seconds(workload: Workload) -> float:
    trainer = CONTENDERS[BASELINE].build(workload)
    seconds = []
    for step in range(_CALIBRATION_STEPS):
        tokens = workload.tokens(step, rank=0)
        start = time.perf_counter()
        trainer.step(tokens)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_SKIPPED_STEPS:])


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--contenders",
        type=comma_separated(one_of(CONTENDERS)),
        default=list(DEFAULT_CONTENDERS),
        help=f"of {', '.join(CONTENDERS)}; {BASELINE} always runs; default: {','.join(DEFAULT_CONTENDERS)}",
    )
    add("--milliseconds", type=float, default=5.0, help="what the bare step shall take")
    add("--blocks", type=at_least(1), default=4, help="transformer blocks")
    # Few tensors stepped one by one would flatter an engine that steps long flat shards: fused is the sterner measure.
    add("--optimizer", choices=OPTIMIZERS, default="adamw-fused", help="torch's AdamW by its defaults, or fused=True")
    add("--rounds", type=at_least(1), default=100, help="measured rounds")
    add("--warmup", type=at_least(1), default=10, help="rounds before them")
    add("--steps-per-turn", type=at_least(1), default=10, help="steps that a contender takes when it is its turn")
    add("--batch", type=at_least(1), default=2, help="sequences a step")
    add("--seq", type=at_least(1), default=32, help="tokens per sequence")
    add("--threads", type=at_least(1), default=1, help="threads of the process")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
