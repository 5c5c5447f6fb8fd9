"""What ZeRO++ saves where the network between nodes is slow: two network namespaces with two ranks each, on gloo.

Plain stage 3 and stage 3 with all of ZeRO++ train the same model in the same processes, in turns. What leaves a node
passes the kernel's token bucket filter. Bytes are those that the transport counts, and the time that the cable alone
needs for them stands beside the measured one. Where there are no namespaces, or nothing to slow a cable with, that time
is all that is printed: computed from counted bytes, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

import shardwise
from bench.interleave import Rounds, slowest_rank, time_in_turns
from bench.machine import machine_facts
from bench.models import SHAPES
from bench.options import at_least, comma_separated, one_of
from bench.report import CONSOLE, write_json
from bench.workload import Workload
from bench.world import run_in_world
from tests import namespaces

NODES, RANKS_PER_NODE = 2, 2
WORLD = NODES * RANKS_PER_NODE
PORT = 29571  # inside of a namespace of our own, where nobody else listens
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}

PLAIN, ALL = "stage 3", "stage 3, hpZ + qwZ + qgZ"
ZERO: dict[str, dict[str, Any]] = {
    PLAIN: {},
    ALL: {
        "zero_hpz_partition_size": RANKS_PER_NODE,
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
    },
}


@dataclass(frozen=True)
class Job:
    """What every rank runs."""

    size: str
    dtype: str
    batch: int  # sequences a rank
    sequence: int  # tokens
    seed: int
    rates: tuple[str, ...]  # one after the other; none: bytes are counted, and nothing is timed
    rounds: int


@dataclass
class Measured:
    """One rank's part."""

    across_bytes: dict[str, int]  # that came from the other node in one step, by contender
    seconds: dict[str, dict[str, list[float]]]  # by rate and contender, a step each
    cpu_seconds: dict[str, list[float]]  # of this rank's threads in each step, the first one included
    losses: dict[str, float]
    why_not: str = ""
    """Why the cable could not be slowed."""


def add_options(parser: Any) -> None:
    """The options of this part."""
    add = parser.add_argument_group("link").add_argument
    add("--sizes", type=comma_separated(one_of(SHAPES)), default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    add("--rates", type=comma_separated(_rate), default=["1gbit", "100mbit"], help="of the cable; default: both")
    add("--link-rounds", type=at_least(1), default=2, help="measured steps at each rate, after one that is not")
    add("--link-dtype", choices=("fp32", "bf16"), default="bf16", help="of what travels and computes")
    add("--link-batch", type=at_least(1), default=1, help="sequences per rank and step")
    add("--seq", type=at_least(1), default=8, help="tokens per sequence: few, for the cable is what is measured")
    add("--link-json", type=Path, default=Path("bench/results/zeropp_link.json"))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every size, write the file after each, and print the comparison."""
    facts = machine_facts()
    why_not = namespaces.missing()
    results: dict[str, Any] = {}
    for size in options.sizes:
        job = Job(
            size, options.link_dtype, options.link_batch, options.seq, options.seed, tuple(options.rates),
            options.link_rounds,
        )  # fmt: skip
        CONSOLE.print(f"[dim]link: {size}")
        ranks = [] if why_not else _over_a_cable(job)
        why_not = why_not or ranks[0].why_not
        if why_not:
            CONSOLE.print(f"[yellow]not measured[/]: {why_not}")
            ranks = run_in_world(WORLD, 1, measure, Job(**{**asdict(job), "rates": ()}), NODES)
        seconds = {
            rate: {name: slowest_rank([rank.seconds[rate][name] for rank in ranks]) for name in ZERO}
            for rate in (() if why_not else job.rates)
        }
        entering = {name: sum(rank.across_bytes[name] for rank in ranks) // NODES for name in ZERO}
        losses = {name: statistics.fmean(rank.losses[name] for rank in ranks) for name in ZERO}
        cpu = {name: max(statistics.median(rank.cpu_seconds[name][1:] or [0.0]) for rank in ranks) for name in ZERO}
        results[size] = {
            "job": job, "not_measured": why_not, "bytes_entering_a_node": entering, "seconds": seconds,
            "cpu_seconds_of_a_rank": cpu, "losses": losses,
        }  # fmt: skip
        CONSOLE.print(_table(job, entering, cpu, seconds))
        options.link_json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.link_json, {"machine": facts, "sizes": results})
    return results


def measure(job: Job, simulated_nodes: int | None) -> Measured:
    """One rank's turns with both engines."""
    workload = Workload(SHAPES[job.size], job.batch, job.sequence, "adamw-fused", job.seed)
    rank, losses, steps = dist.get_rank(), dict[str, float](), dict.fromkeys(ZERO, 0)
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ZERO}
    engines = {name: _engine(job, workload, ZERO[name], simulated_nodes) for name in ZERO}

    def turn_of(name: str) -> Callable[[], None]:
        def turn() -> None:
            engine, begin = engines[name], time.process_time()
            engine._comm.traffic.clear()
            loss = engine(workload.tokens(steps[name], rank))
            engine.backward(loss)
            engine.step()
            losses[name] = loss.item()
            steps[name] += 1
            cpu_seconds[name].append(time.process_time() - begin)

        return turn

    turns = {name: turn_of(name) for name in ZERO}
    measured = Measured({}, {}, cpu_seconds, losses)
    for name in () if job.rates else ZERO:
        turns[name]()
    for rate in job.rates:
        if rank % RANKS_PER_NODE == 0:
            measured.why_not = namespaces.slow_down(rate)
        excuses: list[str] = [""] * WORLD
        dist.all_gather_object(excuses, measured.why_not)
        measured.why_not = next(filter(None, excuses), "")
        if measured.why_not:
            break
        measured.seconds[rate] = time_in_turns(turns, Rounds(1, job.rounds), job.seed)
        if rank == 0:
            print(f"{rate}: {measured.seconds[rate]}", flush=True)
    measured.across_bytes = {name: engine._comm.traffic.across_bytes for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    return measured


def _engine(job: Job, workload: Workload, zero: dict[str, Any], simulated_nodes: int | None) -> Any:
    model = workload.build_model()
    engine, *_ = shardwise.initialize(
        model=model,
        optimizer=workload.build_optimizer(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": workload.batch,
            "bf16": {"enabled": job.dtype == "bf16"},
            "zero_optimization": {"stage": 3, **zero},
            # The namespaces are one machine's, whose ranks would else find each other's memory.
            "shardwise": {"transport": "process_group", "simulated_nodes": simulated_nodes},
        },
    )
    return engine


# --- over a cable -----------------------------------------------------------------------------------------------------


def _over_a_cable(job: Job) -> list[Measured]:
    """Run ``measure`` on two machines; what all ranks measured."""
    prefix = f"zeropp-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder, namespaces.cabled(prefix):
        ranks = [
            subprocess.Popen(
                [
                    *("ip", "netns", "exec", namespaces.namespace_of(prefix, host)),
                    *(sys.executable, "-m", "bench.zeropp_link", json.dumps(asdict(job)), folder),
                ],
                env=os.environ | _variables(node * RANKS_PER_NODE + place, place),
                start_new_session=True,  # as launchers do: by sessions the kernel shares out a busy machine
            )
            for node, host in enumerate(namespaces.ADDRESSES)
            for place in range(RANKS_PER_NODE)
        ]
        try:
            _wait(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [Measured(**json.loads((Path(folder) / f"{rank}.json").read_text())) for rank in range(WORLD)]


def _variables(rank: int, place: int) -> dict[str, str]:
    """As torchrun sets them on a node."""
    values = {"RANK": rank, "LOCAL_RANK": place, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": RANKS_PER_NODE}
    return {
        **{name: str(value) for name, value in values.items()},
        "MASTER_ADDR": next(iter(namespaces.ADDRESSES.values())),
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": namespaces.INTERFACE,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # else it warns that the addresses have no names
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all are done, or one has failed."""
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            break
        time.sleep(0.5)
    if failed := [rank for rank, process in enumerate(ranks) if process.poll()]:
        raise RuntimeError(f"link: rank {failed[0]} failed; its error is above")


def _rank_main(job_text: str, folder: str) -> None:
    data = json.loads(job_text)
    job = Job(**{**data, "rates": tuple(data["rates"])})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        measured = measure(job, None)
        (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(asdict(measured)))
        dist.barrier()  # a rank that leaves early would break the last collectives of the others
    finally:
        dist.destroy_process_group()


# --- the comparison ---------------------------------------------------------------------------------------------------


def _table(
    job: Job, entering: dict[str, int], cpu: dict[str, float], seconds: dict[str, dict[str, list[float]]]
) -> Table:
    kind = "measured" if seconds else "computed from counted bytes, not measured"
    table = Table(
        title=f"{job.size}, {job.dtype}, {NODES} nodes of {RANKS_PER_NODE} ranks: {kind}", title_justify="left"
    )
    table.add_column("rate")
    table.add_column("contender")
    for column in (
        "MB into a node, a step",
        "cable alone, s",
        "CPU of a rank, s",
        "step, s",
        "plain / this, median of rounds",
    ):
        table.add_column(column, justify="right")
    for rate in job.rates:
        for name in ZERO:
            floor = 8 * entering[name] / bits_per_second(rate)
            cells = ["", f"{entering[PLAIN] / entering[name]:.2f} (of the cable alone)"]
            if seconds:
                mine, plain = seconds[rate][name], seconds[rate][PLAIN]
                ratio = statistics.median(theirs / ours for theirs, ours in zip(plain, mine, strict=True))
                cells = [f"{statistics.median(mine):.1f}", f"{ratio:.2f}"]
            table.add_row(rate, name, f"{entering[name] / 1e6:.1f}", f"{floor:.1f}", f"{cpu[name]:.1f}", *cells)
    return table


def bits_per_second(rate: str) -> float:
    """Of a rate as `tc` writes it."""
    number, unit = _split(rate)
    return number * UNITS[unit]


def _split(rate: str) -> tuple[float, str]:
    unit = next((unit for unit in UNITS if rate.endswith(unit)), "")
    return float(rate.removesuffix(unit)), unit


def _rate(text: str) -> str:
    try:
        number, unit = _split(text)
    except ValueError:
        number, unit = 0.0, ""
    if not unit or number <= 0:
        raise argparse.ArgumentTypeError(f"found {text}; expected a rate such as 100mbit or 1gbit")
    return text


if __name__ == "__main__":
    _rank_main(*sys.argv[1:])
