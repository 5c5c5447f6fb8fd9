"""The two collectives of ZeRO, each by every way there is on gloo: ``python -m bench.communication --help``.

Reduce-scatter and all-gather are measured interleaved, in one launch of ``--world`` processes. What is reported is the
median over rounds of the ratio to torch's own collective in the same round. Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from bench.interleave import Rounds, ratios, slowest_rank, time_in_turns
from bench.machine import machine_facts
from bench.options import at_least, comma_separated
from bench.report import CONSOLE, print_facts, ratio_text, write_json
from bench.world import run_in_world
from shardwise import torch_compat

BYTES_PER_ELEMENT = 4  # fp32


@dataclass(frozen=True)
class Way:
    """One way to do a collective. ``run`` takes the whole buffer [N] and this rank's shard [N / W]."""

    name: str
    run: Callable[[Tensor, Tensor], None]


# --- reduce-scatter: buffer [N] of every rank -> shard [N / W], the sum over ranks ------------------------------------


def _native_reduce_scatter(buffer: Tensor, shard: Tensor) -> None:
    torch_compat.reduce_scatter_single(shard, buffer, _world_group()).wait()


def _all_reduce_and_slice(buffer: Tensor, shard: Tensor) -> None:
    dist.all_reduce(buffer)
    shard.copy_(buffer.chunk(dist.get_world_size())[dist.get_rank()])


def _all_to_all_and_sum(buffer: Tensor, shard: Tensor) -> None:
    received = torch.empty_like(buffer)
    dist.all_to_all_single(received, buffer)
    torch.sum(received.view(dist.get_world_size(), -1), dim=0, out=shard)


# --- all-gather: shard [N / W] of every rank -> buffer [N] ------------------------------------------------------------


def _native_all_gather(buffer: Tensor, shard: Tensor) -> None:
    torch_compat.all_gather_single(buffer, shard, _world_group()).wait()


def _broadcasts(buffer: Tensor, shard: Tensor) -> None:
    pieces = buffer.chunk(dist.get_world_size())
    pieces[dist.get_rank()].copy_(shard)
    pending = [dist.broadcast(piece, src=owner, async_op=True) for owner, piece in enumerate(pieces)]
    for work in pending:
        work.wait()


def _point_to_point(buffer: Tensor, shard: Tensor) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pieces = buffer.chunk(world_size)
    others = [(rank + distance) % world_size for distance in range(1, world_size)]
    sends = [dist.P2POp(dist.isend, shard, other) for other in others]
    receives = [dist.P2POp(dist.irecv, pieces[other], other) for other in others]
    pending = dist.batch_isend_irecv(sends + receives) if others else []
    pieces[rank].copy_(shard)
    for work in pending:
        work.wait()


# By collective; the first way of each is the baseline. A transport takes part by standing in its list.
WAYS: dict[str, tuple[Way, ...]] = {
    "reduce-scatter": (
        Way("reduce_scatter", _native_reduce_scatter),
        Way("all_reduce + slice", _all_reduce_and_slice),
        Way("all_to_all + sum", _all_to_all_and_sum),
    ),
    "all-gather": (
        Way("all_gather", _native_all_gather),
        Way("broadcasts", _broadcasts),
        Way("point to point", _point_to_point),
    ),
}


def main() -> None:
    """Run what the command line asks for and print it."""
    options = _parse_options()
    facts = machine_facts()
    print_facts("machine", facts)
    measured: dict[str, dict[str, dict[str, list[float]]]] = {}
    for elements in options.elements:
        padded = -(-elements // options.world) * options.world
        by_rank = run_in_world(
            options.world, options.threads, measure_ways, padded, Rounds(options.warmup, options.rounds), options.seed
        )
        measured[str(padded)] = {
            collective: {
                way.name: slowest_rank([rank[collective][way.name] for rank in by_rank]) for way in WAYS[collective]
            }
            for collective in WAYS
        }
        CONSOLE.print(_table(padded, options.world, measured[str(padded)]))
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"machine": facts, "options": settings, "seconds": measured})


def measure_ways(elements: int, rounds: Rounds, seed: int) -> dict[str, dict[str, list[float]]]:
    """Runs on every rank: check, then time all ways for a buffer of ``elements``; seconds by collective and way."""
    buffer, shard = torch.empty(elements), torch.empty(elements // dist.get_world_size())
    seconds: dict[str, dict[str, list[float]]] = {}
    for collective, ways in WAYS.items():
        for way in ways:
            _check(collective, way, buffer, shard)
        # Sums that are fed back would grow without end, and time of infinities is not time of numbers.
        buffer.zero_()
        shard.zero_()
        seconds[collective] = time_in_turns({way.name: partial(way.run, buffer, shard) for way in ways}, rounds, seed)
    return seconds


def _check(collective: str, way: Way, buffer: Tensor, shard: Tensor) -> None:
    """Small whole numbers, whose sums are exact in any order: the result must be equal to the last bit."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    everything = torch.arange(buffer.numel()).remainder_(1021).float()
    mine = everything.chunk(world_size)[rank]
    if collective == "reduce-scatter":
        buffer.copy_(everything * (rank + 1))
        way.run(buffer, shard)
        found, expected = shard, mine * (world_size * (world_size + 1) // 2)
    else:
        buffer.zero_()
        shard.copy_(mine)
        way.run(buffer, shard)
        found, expected = buffer, everything
    if not torch.equal(found, expected):
        wrong = int((found != expected).sum())
        raise RuntimeError(f"{collective} by {way.name}: {wrong} of {found.numel()} elements are wrong on rank {rank}")


def _world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "run_in_world has made it"
    return group


def _table(elements: int, world_size: int, seconds: dict[str, dict[str, list[float]]]) -> Table:
    size_bytes = elements * BYTES_PER_ELEMENT
    table = Table(title=f"buffer of {size_bytes / 2**20:.2f} MiB, {world_size} ranks", title_justify="left")
    table.add_column("collective")
    table.add_column("way")
    for column in ("ratio, median", "quartiles", "ms, median", "GB/s received per rank"):
        table.add_column(column, justify="right")
    # What a rank must receive at least, in either collective: everybody else's part of its result.
    received_bytes = size_bytes * (world_size - 1) / world_size
    for collective, ways in seconds.items():
        baseline = next(iter(ways.values()))
        for name, times in ways.items():
            median = statistics.median(times)
            table.add_row(
                collective,
                name,
                *ratio_text(ratios(times, baseline)),
                f"{1e3 * median:.2f}",
                f"{received_bytes / median / 1e9:.2f}",
            )
        table.add_section()
    return table


def _parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.communication", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--elements",
        type=comma_separated(at_least(1)),
        default=[2**14, 2**18, 2**22],
        help="fp32 elements of the whole buffer, comma separated, rounded up to a multiple of the world",
    )
    add("--rounds", type=at_least(1), default=30, help="measured rounds")
    add("--warmup", type=at_least(1), default=5, help="rounds before them")
    add("--world", type=at_least(1), default=2, help="processes")
    add("--threads", type=at_least(1), default=1, help="threads per process")
    add("--seed", type=int, default=0, help="of the order in which ways take turns")
    add("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
