"""Fair timing on a noisy machine: all contenders in the same processes, turn by turn.

A slow moment of the machine hits neighbouring turns alike, so what is compared is the ratio within one round; the
median over rounds drops the rounds in which it did not.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bench.contenders import Trainer
from bench.workload import Workload


@dataclass(frozen=True)
class Rounds:
    """How often everyone has a turn."""

    warmup: int
    measured: int
    steps_per_turn: int = 1


@dataclass(frozen=True)
class Turns:
    """What one contender measured on one rank."""

    seconds_per_step: list[float]  # one entry a measured round
    last_loss: float


@dataclass(frozen=True)
class Ratios:
    """One contender against the baseline of the same launch."""

    median_seconds: float
    median: float
    lower_quartile: float
    upper_quartile: float


def shuffled_orders(names: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """One order a round, equal on all ranks: who follows whom changes, so no contender always pays for another."""
    generator = random.Random(seed)
    return [generator.sample(names, len(names)) for _ in range(rounds)]


def time_in_turns(turns: Mapping[str, Callable[[], None]], rounds: Rounds, seed: int) -> dict[str, list[float]]:
    """Call everyone once a round in a shuffled order; seconds of this rank's measured calls, by name.

    Ranks start a turn together. What a turn leaves to other threads is not waited for: it is the next turn's loss.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for index, order in enumerate(shuffled_orders(list(turns), rounds.warmup + rounds.measured, seed)):
        if index == rounds.warmup:
            # A collection triggered in one contender's turn would also walk over the objects of all others.
            gc.collect()
            gc.freeze()
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            turns[name]()
            elapsed = time.perf_counter() - start
            if index >= rounds.warmup:
                seconds[name].append(elapsed)
    gc.unfreeze()
    return seconds


def train_in_turns(trainers: Mapping[str, Trainer], workload: Workload, rounds: Rounds) -> dict[str, Turns]:
    """Train every contender on the same data, ``steps_per_turn`` steps a turn, and time the turns on this rank."""
    rank = dist.get_rank()
    steps_taken = dict.fromkeys(trainers, 0)
    losses: dict[str, torch.Tensor] = {}

    def turn_of(name: str, trainer: Trainer) -> Callable[[], None]:
        def turn() -> None:
            for _ in range(rounds.steps_per_turn):
                losses[name] = trainer.step(workload.tokens(steps_taken[name], rank))
                steps_taken[name] += 1

        return turn

    turns = {name: turn_of(name, trainer) for name, trainer in trainers.items()}
    seconds = time_in_turns(turns, rounds, workload.seed)
    return {
        name: Turns([turn / rounds.steps_per_turn for turn in seconds[name]], losses[name].item()) for name in trainers
    }


def slowest_rank(seconds_by_rank: Sequence[Sequence[float]]) -> list[float]:
    """[ranks][rounds] -> [rounds]: a step has ended when it has ended on every rank."""
    return [max(times) for times in zip(*seconds_by_rank, strict=True)]


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> Ratios:
    """Ratios within each round, summed up by their quartiles."""
    each = [ours / theirs for ours, theirs in zip(seconds, baseline, strict=True)]
    lower, median, upper = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return Ratios(statistics.median(seconds), median, lower, upper)
