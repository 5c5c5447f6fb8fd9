"""States off the device, against disk, arithmetic and DeepSpeed: ``python -m bench.offload --help``.

``step``       ``engine.step()`` of one rank whose optimizer states rest in a file, in turns with the same reads and
               writes without arithmetic, and with the same arithmetic without a file, each turn in a process of its
               own. A step is as good as its bottleneck: the larger of the two shares is what counts
``train``      whole training steps of two ranks, beside DeepSpeed with its states in host memory
``growth``     the time of a whole step as the model doubles
``inference``  tokens one at a time with the weights in a file, against reading the file
``speculation``
               a step that can be taken back, for one that does not wait for the gradient's norm
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from bench import speculation
from bench.contenders import CONTENDERS
from bench.contenders.engines import NVME_PATH
from bench.interleave import Rounds, time_in_turns
from bench.machine import machine_facts
from bench.measure import time_together
from bench.models import SHAPES, GPTShape
from bench.options import at_least, comma_separated, one_of
from bench.report import CONSOLE, print_facts, write_json
from bench.workload import Workload
from bench.world import run_in_world
from shardwise.store.aligned import SlabPool
from shardwise.store.base import PAGE_BYTES
from shardwise.store.chunk_stream import Chunk, ChunkStream
from shardwise.store.direct_io import DirectIO
from shardwise.store.swap_file import SwapFile

PARTS = ("step", "train", "growth", "inference", "speculation")
GROWING = {
    "50M": GPTShape(8, 704, 11, 2048, 512),
    "100M": GPTShape(8, 1008, 12, 2048, 512),
    "200M": GPTShape(12, 1176, 12, 2048, 512),
    "400M": GPTShape(14, 1536, 12, 2048, 512),
    "800M": GPTShape(16, 2048, 16, 2048, 512),
}
TOKENS_A_TURN = 4
STEPS_A_TURN = 4
BASELINE = "shardwise2_cpu"
TRAINED = (
    "shardwise2_cpu", "shardwise3_cpu", "shardwise2_nvme", "shardwise2_nvme_early", "shardwise3_nvme",
    "shardwise3_nvme_early", "deepspeed2_cpu", "deepspeed3_cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Medians of one rank, seconds; and shares of them, each the median of ratios within a round."""

    step: float
    disk_alone: float
    arithmetic_alone: float
    bytes_moved: int
    disk_share: float
    """Of the step, what the disk would need for the same bytes: how near the stream is to the disk."""
    arithmetic_share: float


def main() -> None:
    """Run what the command line asks for and print it."""
    options = _parse_options()
    os.environ[NVME_PATH] = str(options.path)
    facts = machine_facts()
    print_facts("machine", facts)
    results: dict[str, Any] = {}
    run = dict(zip(PARTS, (_steps, _train, _growth, _inference, speculation.run), strict=True))
    for part in options.parts:
        results[part] = run[part](options)
    if options.json is not None:
        write_json(options.json, {"machine": facts, "results": results})


# --- the step against its bottlenecks ---------------------------------------------------------------------------------


def _steps(options: argparse.Namespace) -> dict[str, Step]:
    table = Table(title="the optimizer's step through a file, one rank", title_justify="left")
    table.add_column("model")
    for column in ("step, ms", "disk alone, ms", "arithmetic alone, ms", "GB moved", "disk share", "arithmetic share"):
        table.add_column(column, justify="right")
    found = {}
    for size in options.sizes:
        workload = Workload(SHAPES[size], options.batch, options.seq, "adamw-fused", options.seed)
        step = _measure_step(workload, options)
        found[size] = step
        table.add_row(
            size, *(f"{1e3 * seconds:.0f}" for seconds in (step.step, step.disk_alone, step.arithmetic_alone)),
            f"{step.bytes_moved / 1e9:.2f}", f"{step.disk_share:.2f}", f"{step.arithmetic_share:.2f}",
        )  # fmt: skip
    CONSOLE.print(table)
    return found


def _measure_step(workload: Workload, options: argparse.Namespace) -> Step:
    """Turns in processes of their own, with one file on the disk at a time.

    Disks lend speed to who let them rest, and hold what was used last: each turn is several steps of one kind, of which
    the first does not count.
    """
    steps: list[float] = []
    streams: list[float] = []
    arithmetic: list[float] = []
    for _ in range(options.rounds):
        ((found, pieces),) = run_in_world(1, options.threads, measure_through_the_file, workload, str(options.path))
        steps.append(statistics.median(found))
        ((alone, computed),) = run_in_world(1, options.threads, measure_apart, workload, str(options.path), pieces)
        streams.append(statistics.median(alone))
        arithmetic.append(statistics.median(computed))
    return Step(
        statistics.median(steps),
        statistics.median(streams),
        statistics.median(arithmetic),
        sum(2 * piece.num_bytes - piece.write_begin for piece in pieces),
        _share(streams, steps),
        _share(arithmetic, steps),
    )


@dataclass(frozen=True)
class Piece:
    """What one window of states moves in a step: all of it is read, its end is written."""

    num_bytes: int
    write_begin: int


def measure_through_the_file(workload: Workload, path: str) -> tuple[list[float], list[Piece]]:
    """Seconds of steps behind passes whose gradients went to the file; and what each of them moves."""
    engine = _engine(workload, {"stage": 2, **_nvme_optimizer(path)})
    tokens, seconds = workload.tokens(0, 0), []
    for _ in range(STEPS_A_TURN):
        engine.backward(engine(tokens))
        engine._offloading.settle()
        begin = time.perf_counter()
        engine.step()
        engine._offloading.settle()
        seconds.append(time.perf_counter() - begin)
    pieces = [
        Piece(
            segment.states.plan.kept_bytes(window.span.numel), segment.states.plan.begin("exp_avg", window.span.numel)
        )
        for unit in engine._units
        for segment in unit.segments
        if segment.states is not None
        for window in segment.states.windows
    ]
    engine.close()
    return seconds[1:], pieces


def measure_apart(workload: Workload, path: str, pieces: Sequence[Piece]) -> tuple[list[float], list[float]]:
    """Seconds of the bare stream and of the bare arithmetic, behind the same passes and the same writes."""
    engine = _engine(workload, {"stage": 2})
    tokens, streams, arithmetic = workload.tokens(0, 0), [], []
    with tempfile.TemporaryDirectory(dir=path) as directory:
        io = DirectIO()
        store = SwapFile(Path(directory) / "alone", io)
        chunks = [Chunk(store.reserve(piece.num_bytes), piece.write_begin) for piece in pieces]
        store.allocate()
        largest = max(piece.num_bytes for piece in pieces)
        slabs, outside = SlabPool(4, largest), SlabPool(1, largest)
        memory = outside.take()
        for chunk in chunks:  # what was never written is read as zeros, without the disk
            store.write(chunk.extent, 0, memory.bytes(0, chunk.extent.num_bytes))
        stream = ChunkStream(store, slabs)
        for _ in range(STEPS_A_TURN):
            engine.backward(engine(tokens))
            begin = time.perf_counter()
            engine.step()
            arithmetic.append(time.perf_counter() - begin)
            for chunk in chunks:
                store.write(chunk.extent, 0, memory.bytes(0, chunk.write_begin))
            begin = time.perf_counter()
            stream.run(chunks, lambda index, slab: None)
            streams.append(time.perf_counter() - begin)
        outside.give_back(memory)
        store.close()
        for pool in (slabs, outside):
            pool.close()
        io.close()
    engine.close()
    return streams[1:], arithmetic[1:]


def _share(part: Sequence[float], whole: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(part, whole, strict=True))


def _nvme_optimizer(path: str) -> dict[str, Any]:
    return {"offload_optimizer": {"device": "nvme", "nvme_path": path}}


def _engine(workload: Workload, zero: dict[str, Any], trains: bool = True) -> Any:
    import shardwise

    model = workload.build_model()
    engine, *_ = shardwise.initialize(
        model=model,
        optimizer=workload.build_optimizer(model.parameters()) if trains else None,
        config={"train_micro_batch_size_per_gpu": workload.batch, "zero_optimization": zero},
    )
    return engine


# --- training beside DeepSpeed ----------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> dict[str, Any]:
    reasons = {name: CONTENDERS[name].reason_to_skip() for name in TRAINED if name in (BASELINE, *options.contenders)}
    for name, reason in reasons.items():
        if reason is not None:
            CONSOLE.print(f"[yellow]skipped[/] {name}: {reason}")
    names = [name for name, reason in reasons.items() if reason is None]
    found: dict[str, Any] = {}
    for size in options.sizes:
        workload = Workload(SHAPES[size], options.batch, options.seq, "adamw-fused", options.seed)
        timed = time_together(workload, names, BASELINE, Rounds(2, options.rounds), 2, 1)
        table = Table(title=f"{size}, two ranks, whole steps", title_justify="left")
        for column in ("contender", "ms a step", f"ratio to {BASELINE}", "last loss"):
            table.add_column(column)
        for name, result in timed.items():
            milliseconds = 1e3 * statistics.median(result.seconds_per_step)
            table.add_row(name, f"{milliseconds:.0f}", f"{result.ratios.median:.2f}", f"{result.last_losses[0]:.6f}")
        CONSOLE.print(table)
        found[size] = timed
    return found


# --- growth and inference ---------------------------------------------------------------------------------------------


def _growth(options: argparse.Namespace) -> dict[str, list[float]]:
    table = Table(title="whole steps, parameters and optimizer in files, one rank", title_justify="left")
    for column in ("model", "parameters", "s a step", "times the one before", "times the parameters"):
        table.add_column(column, justify="right")
    found: dict[str, list[float]] = {}
    before: tuple[int, float] | None = None
    for size in options.growing:
        workload = Workload(GROWING[size], 1, options.seq, "adamw-fused", options.seed)
        (seconds,) = run_in_world(1, options.threads, measure_whole_steps, workload, str(options.path))
        found[size] = seconds
        number, median = workload.count_parameters(), statistics.median(seconds)
        ratios = ("", "") if before is None else (f"{median / before[1]:.2f}", f"{number / before[0]:.2f}")
        table.add_row(size, f"{number / 1e6:.0f} M", f"{median:.2f}", *ratios)
        before = number, median
    CONSOLE.print(table)
    return found


def measure_whole_steps(workload: Workload, path: str) -> list[float]:
    """Seconds of three steps after the first, which makes the optimizer's state."""
    engine = _engine(workload, {"stage": 3, **_nvme_optimizer(path), **_nvme_parameters(path)})
    seconds = []
    for step in range(4):
        begin = time.perf_counter()
        engine.backward(engine(workload.tokens(step, 0)))
        engine.step()
        engine._offloading.settle()
        seconds.append(time.perf_counter() - begin)
    engine.close()
    return seconds[1:]


def _nvme_parameters(path: str) -> dict[str, Any]:
    return {"offload_param": {"device": "nvme", "nvme_path": path}}


@dataclass(frozen=True)
class Inference:
    """Speeds in bytes/s, medians over turns."""

    num_bytes: int
    """Of the weights' file."""
    token_seconds: float
    token_speed: float
    read_speed: float
    share: float
    """Median of their quotients in one round."""


def _inference(options: argparse.Namespace) -> dict[str, Inference]:
    table = Table(title="a token at a time, weights in a file, one rank", title_justify="left")
    for column in ("model", "weights, MB", "s a token", "MB/s", "MB/s of reads alone", "share"):
        table.add_column(column, justify="right")
    found = {}
    for size in options.growing[:3]:
        workload = Workload(GROWING[size], 1, 1, "adamw-fused", options.seed)
        (measured,) = run_in_world(
            1, options.threads, measure_inference, workload, Rounds(2, options.rounds), str(options.path)
        )
        found[size] = measured
        table.add_row(
            size, f"{measured.num_bytes / 1e6:.0f}", f"{measured.token_seconds:.3f}",
            f"{measured.token_speed / 1e6:.0f}", f"{measured.read_speed / 1e6:.0f}", f"{measured.share:.2f}",
        )  # fmt: skip
    CONSOLE.print(table)
    return found


def measure_inference(workload: Workload, rounds: Rounds, path: str) -> Inference:
    """Tokens in turn with reads of the same file without a model.

    The engine reads ahead into the next token, and what it holds it does not read again: speeds are of the bytes that
    the process has read in the turn, which ends with a read behind all others.
    """
    engine = _engine(workload, {"stage": 3, **_nvme_parameters(path)}, trains=False)
    places = [segment.places.parameters for unit in engine._units for segment in unit.segments]
    slabs = SlabPool(5, max(place.extent.num_bytes for place in places))
    ring = [slabs.take() for _ in range(5)]

    def read() -> None:
        transfers: list[Any] = []
        for index, place in enumerate(places):
            if len(transfers) == len(ring):
                transfers.pop(0).wait()
            memory = ring[index % len(ring)].bytes(0, place.extent.num_bytes)
            transfers.append(place.store.start_read(place.extent, 0, memory))
        for transfer in transfers:
            transfer.wait()

    def token() -> None:
        with torch.no_grad():
            engine(workload.tokens(0, 0))

    read_bytes: dict[str, list[int]] = {"token": [], "read": []}

    def turn(name: str, work: Callable[[], None]) -> None:
        before = _bytes_read()
        for _ in range(TOKENS_A_TURN):
            work()
        places[0].store.read(places[0].extent, 0, ring[0].bytes(0, PAGE_BYTES))
        read_bytes[name].append(_bytes_read() - before)

    turns = {"token": partial(turn, "token", token), "read": partial(turn, "read", read)}
    seconds = time_in_turns(turns, rounds, workload.seed)
    engine.close()
    speeds = {
        name: [n / s for n, s in zip(read_bytes[name][-len(each) :], each, strict=True)]
        for name, each in seconds.items()
    }
    return Inference(
        num_bytes=sum(place.extent.num_bytes for place in places),
        token_seconds=statistics.median(seconds["token"]) / TOKENS_A_TURN,
        token_speed=statistics.median(speeds["token"]),
        read_speed=statistics.median(speeds["read"]),
        share=_share(speeds["token"], speeds["read"]),
    )


def _bytes_read() -> int:
    """From disks, by this process so far."""
    found: int = psutil.Process().io_counters().read_bytes
    return found


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.offload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", type=comma_separated(one_of(PARTS)), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    add("--sizes", type=comma_separated(one_of(SHAPES)), default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    add("--growing", type=comma_separated(one_of(GROWING)), default=list(GROWING), help=f"of {', '.join(GROWING)}")
    add("--contenders", type=comma_separated(one_of(TRAINED)), default=list(TRAINED),
        help=f"of the training, all in memory at once; {BASELINE} is always there; default: all")  # fmt: skip
    add("--path", type=Path, default=Path(tempfile.gettempdir()), help="directory on the disk that is measured")
    add("--rounds", type=at_least(1), default=7, help="measured rounds")
    add("--batch", type=at_least(1), default=2, help="sequences per rank and step")
    add("--seq", type=at_least(1), default=128, help="tokens per sequence")
    add("--threads", type=at_least(1), default=1, help="threads of a rank, where there is one rank")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write everything measured to this file")
    speculation.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
