"""Quantised travel, part by part: ``python -m bench.zeropp --help``.

``kernels``  encoding and decoding in each format, in turns with a copy of memory. What counts is the share of the
             copy's speed: bytes read and written a second, over those of the copy in the same round
``link``     time of a step over a slowed cable between two network namespaces, plain stage 3 and ZeRO++ in turns
``convergence``
             validation loss of a language model on four ranks as two nodes, with each technique and with all of them,
             against plain stage 3 on the same data. What its file holds already is not trained again
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench import zeropp_convergence, zeropp_link
from bench.interleave import Rounds, time_in_turns
from bench.machine import machine_facts
from bench.options import at_least, comma_separated, one_of
from bench.report import CONSOLE, print_facts, write_json
from bench.world import run_in_world
from shardwise.quantize import FORMATS, Quantizer, build_quantizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIRES_OF_SUM = 4
COPY = "copy"


@dataclass(frozen=True)
class Speed:
    """Of one operation on one rank."""

    num_bytes: int
    """Read and written in one call."""
    seconds: list[float]  # one entry a round
    share_of_copy: list[float]  # likewise


def main() -> None:
    """Run what the command line asks for and print it."""
    options = _parse_options()
    facts = machine_facts() | _device_facts(options.device)
    print_facts("machine", facts)
    results = {part: PARTS[part](options) for part in options.parts}
    if options.json is not None:
        write_json(options.json, {"machine": facts, "results": results})


def _device_facts(device: str) -> dict[str, str]:
    if device == "cpu":
        return {}
    return {"device": torch.cuda.get_device_name(device), "triton": metadata.version("triton")}


# --- kernels against a copy of memory ---------------------------------------------------------------------------------


def _kernels(options: argparse.Namespace) -> dict[str, dict[str, Speed]]:
    found = {}
    for dtype in options.dtypes:
        rounds = Rounds(2, options.rounds)
        (speeds,) = run_in_world(1, options.threads, measure_kernels, KernelRun.of(options, dtype), rounds)
        title = f"{options.million} million values of {dtype}, blocks of {options.block}, {options.device}"
        table = Table(title=title, title_justify="left")
        table.add_column("operation")
        for column in ("ms", "GB/s", "share of the copy's speed", "quartiles"):
            table.add_column(column, justify="right")
        for name, speed in speeds.items():
            seconds = statistics.median(speed.seconds)
            share, quartiles = _median_and_quartiles(speed.share_of_copy)
            table.add_row(name, f"{1e3 * seconds:.2f}", f"{speed.num_bytes / seconds / 1e9:.1f}", share, quartiles)
        CONSOLE.print(table)
        found[dtype] = speeds
    return found


@dataclass(frozen=True)
class KernelRun:
    """What is encoded, and where."""

    dtype: str
    numel: int
    block: int
    device: str
    formats: Sequence[str]
    seed: int

    @classmethod
    def of(cls, options: argparse.Namespace, dtype: str) -> KernelRun:
        """What the command line asks for."""
        numel = round(options.million * 1e6 / options.block) * options.block
        return cls(dtype, numel, options.block, options.device, options.formats, options.seed)


def measure_kernels(run: KernelRun, rounds: Rounds) -> dict[str, Speed]:
    """In one process: all operations of all formats and the copy, in turns."""
    torch.manual_seed(run.seed)
    values = torch.randn(1, run.numel, device=run.device).to(DTYPES[run.dtype])
    into = torch.zeros_like(values)
    total = torch.zeros(run.numel, device=run.device)
    turns: dict[str, Callable[[], None]] = {COPY: lambda: _ignore(into.copy_(values))}
    moved = {COPY: 2 * values.nbytes}
    for name in run.formats:
        quantizer = build_quantizer(name, run.block, run.device)
        wires = torch.zeros(WIRES_OF_SUM, quantizer.wire_bytes(run.numel), dtype=torch.uint8, device=run.device)
        for wire in wires:
            quantizer.encode(values, wire[None])
        for operation, (turn, num_bytes) in _operations(quantizer, values, into, wires, total).items():
            turns[f"{name} {operation}"], moved[f"{name} {operation}"] = turn, num_bytes
    if run.device != "cpu":
        turns = {name: _synchronised(turn) for name, turn in turns.items()}
    seconds = time_in_turns(turns, rounds, run.seed)
    speed_of_copy = [moved[COPY] / each for each in seconds[COPY]]
    return {
        name: Speed(
            moved[name],
            measured,
            [moved[name] / each / copy for each, copy in zip(measured, speed_of_copy, strict=True)],
        )
        for name, measured in seconds.items()
    }


def _operations(
    quantizer: Quantizer, values: torch.Tensor, into: torch.Tensor, wires: torch.Tensor, total: torch.Tensor
) -> dict[str, tuple[Callable[[], None], int]]:
    """Each operation and the bytes that it reads and writes."""
    wire = wires[:1]
    written = torch.zeros_like(wire)  # what is encoded is not what is decoded: every turn finds the same
    once = values.nbytes + wire.nbytes
    return {
        "encode": (lambda: quantizer.encode(values, written), once),
        "decode": (lambda: quantizer.decode(wire, into), once),
        "accumulate": (lambda: quantizer.decode(wire, into, accumulate=True), once + values.nbytes),
        f"sum of {WIRES_OF_SUM}": (lambda: quantizer.sum_decoded(wires, total), wires.nbytes + total.nbytes),
    }


def _synchronised(turn: Callable[[], None]) -> Callable[[], None]:
    def whole() -> None:
        turn()
        torch.cuda.synchronize()

    return whole


def _ignore(_: object) -> None:
    pass


def _median_and_quartiles(values: Sequence[float]) -> tuple[str, str]:
    if len(values) < 2:
        return f"{values[0]:.2f}", ""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.2f}", f"{lower:.2f} - {upper:.2f}"


# --- the command line -------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "kernels": _kernels,
    "link": zeropp_link.run,
    "convergence": zeropp_convergence.run,
}


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.zeropp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", type=comma_separated(one_of(PARTS)), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    add("--formats", type=comma_separated(one_of(FORMATS)), default=list(FORMATS), help=f"of {', '.join(FORMATS)}")
    add("--dtypes", type=comma_separated(one_of(DTYPES)), default=["fp32", "bf16"], help=f"of {', '.join(DTYPES)}")
    add("--block", type=at_least(32), default=256, help="values that share a scale")
    add("--million", type=at_least(1), default=16, help="values, in millions")
    add("--device", default="cpu", help="cpu, or a GPU such as cuda")
    add("--rounds", type=at_least(1), default=11, help="measured rounds")
    add("--threads", type=at_least(1), default=1, help="threads of the rank")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write everything measured to this file")
    zeropp_link.add_options(parser)
    zeropp_convergence.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
