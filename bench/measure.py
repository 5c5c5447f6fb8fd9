"""What the ranks of a training benchmark run: a timed group of contenders, or one contender watched for memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from bench.contenders import CONTENDERS
from bench.interleave import Ratios, Rounds, Turns, ratios, slowest_rank, train_in_turns
from bench.memory import PeakMemory, ProcessMemory, current_memory
from bench.workload import Workload
from bench.world import run_in_world


@dataclass(frozen=True)
class TimedContender:
    """One contender's share of one launch."""

    seconds_per_step: list[float]  # one entry a round, of the slowest rank
    ratios: Ratios
    last_losses: list[float]  # by rank


@dataclass(frozen=True)
class ContenderMemory:
    """One rank's memory above what it held before the model was built."""

    whole_run: ProcessMemory  # building the model and the engine included
    training: ProcessMemory  # from the second step on


def time_together(
    workload: Workload, names: Sequence[str], baseline: str, rounds: Rounds, world_size: int, threads: int
) -> dict[str, TimedContender]:
    """Train ``names`` in one launch, turn by turn; ratios are to ``baseline``, which is one of them."""
    by_rank = run_in_world(world_size, threads, _train_rank, workload, list(names), rounds)
    seconds = {name: slowest_rank([rank[name].seconds_per_step for rank in by_rank]) for name in names}
    return {
        name: TimedContender(
            seconds[name], ratios(seconds[name], seconds[baseline]), [rank[name].last_loss for rank in by_rank]
        )
        for name in names
    }


def measure_memory(workload: Workload, name: str, steps: int, world_size: int, threads: int) -> list[ContenderMemory]:
    """Train one contender for ``steps`` steps in fresh processes; its memory by rank."""
    return run_in_world(world_size, threads, _watch_rank, workload, name, steps)


def _train_rank(workload: Workload, names: list[str], rounds: Rounds) -> dict[str, Turns]:
    for name in names:
        CONTENDERS[name].prepare()
    trainers = {name: CONTENDERS[name].build(workload) for name in names}
    turns = train_in_turns(trainers, workload, rounds)
    for trainer in trainers.values():
        trainer.close()
    return turns


def _watch_rank(workload: Workload, name: str, steps: int) -> ContenderMemory:
    rank = dist.get_rank()
    contender = CONTENDERS[name]
    contender.prepare()
    dist.barrier()  # both ranks have loaded their libraries: whose pages they share is settled
    before = current_memory()
    with PeakMemory() as start:
        trainer = contender.build(workload)
        trainer.step(workload.tokens(0, rank))  # makes the optimizer's state
        dist.barrier()
    with PeakMemory() as training:
        for step in range(1, steps):
            trainer.step(workload.tokens(step, rank))
        dist.barrier()  # a rank that is gone would leave all shared pages to the other
    trainer.close()
    return ContenderMemory(
        whole_run=ProcessMemory.highest(start.peak, training.peak) - before, training=training.peak - before
    )
