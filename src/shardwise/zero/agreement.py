"""What the ranks tell each other once a step, in one small message, and what they conclude from it."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from shardwise.comm.base import CollectiveId, Communicator, different_paths
from shardwise.zero.unit import Unit

_HEAD = struct.Struct("<8s8s8sd?q")


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know after they told each other."""

    sum_of_squares: float
    """Of the averaged gradient, over the shards of the first replica; summed in rank order, so the same bits
    everywhere."""
    unreduced: tuple[int, ...]
    """Positions of the units of which some rank holds a gradient that was not averaged."""
    any_unused: bool
    """Whether some rank has a parameter without a gradient."""
    same_order: bool
    """Whether every rank completed all its units, in one order."""
    num_passes: int | None
    """Backward passes of this step, if all ranks had as many."""


def agree(
    comm: Communicator, units: Sequence[Unit], observed_order: Sequence[int], num_passes: int, step: int
) -> Agreement:
    """Exchange and compare; also the barrier behind which no rank reads parameters or gradients of this step any more.

    Args:
        comm: the transport; its log must be the same on every rank.
        units: the units with trainable parameters.
        observed_order: the order in which this rank's units completed, empty if some did not.
        num_passes: backward passes of this rank in this step.
        step: for messages.

    Raises:
        CollectiveError: the ranks' collectives since the last agreement differ: names the first difference. Inside a
            group that shares shards all are compared in one order, between groups each operation's in its own.
    """
    unreduced = bytes(unit.has_unreduced for unit in units)
    unused = not all(unit.all_used for unit in units)
    paths = _digest(comm.log), _digest(_by_operation(comm.log))
    head = _HEAD.pack(*paths, _digest(observed_order), _sum_of_squares(units), unused, num_passes)
    heads, masks = [], []
    for payload in comm.exchange(CollectiveId("agreement", "", step), head + unreduced):
        heads.append(_HEAD.unpack_from(payload))
        masks.append(payload[_HEAD.size :])
    groups = [heads[first : first + comm.size] for first in range(0, len(heads), comm.size)]
    if any(len({in_order for in_order, *_ in group}) > 1 for group in groups) or len({ops for _, ops, *_ in heads}) > 1:
        _raise_first_difference(comm, step)
    comm.log.clear()
    orders = {order for _, _, order, *_ in heads}
    counts = {count for *_, count in heads}
    return Agreement(
        sum_of_squares=math.fsum(squares for _, _, _, squares, *_ in groups[0]),
        unreduced=tuple(i for i in range(len(units)) if any(mask[i] for mask in masks)),
        any_unused=any(flag for *_, flag, _ in heads),
        same_order=len(orders) == 1 and len(observed_order) > 0,
        num_passes=counts.pop() if len(counts) == 1 else None,
    )


def agree_unused(comm: Communicator, units: Sequence[Unit], step: int) -> frozenset[str]:
    """Names of the parameters that got no gradient on any rank in this step."""
    mine = b"".join(bytes(flags) for unit in units for flags in unit.used)
    names = [name for unit in units for segment, _ in unit.trainable for name in segment.names]
    masks = comm.exchange(CollectiveId("agreement on used parameters", "", step), mine)
    return frozenset(name for i, name in enumerate(names) if not any(mask[i] for mask in masks))


def _digest(items: Sequence[object]) -> bytes:
    return hashlib.blake2b("\n".join(map(str, items)).encode(), digest_size=8).digest()


def sum_of_squares(norms: Sequence[float]) -> float:
    """Rounded once, so that it does not depend on their order."""
    return math.fsum(norm * norm for norm in norms)


def _sum_of_squares(units: Sequence[Unit]) -> float:
    """Over this rank's shards, buffer by buffer: the same sums whatever the stage, for shards do not depend on it."""
    norms = [gradients.norms() for unit in units for _, gradients in unit.trainable]
    return sum_of_squares(torch.cat(norms).tolist()) if norms else 0.0


def _by_operation(log: Sequence[str]) -> list[str]:
    """The order that replicas must share: they meet in reductions, wherever between these each has its gathers."""
    return sorted(log, key=lambda entry: entry.partition(" of unit ")[0])


def _raise_first_difference(comm: Communicator, step: int) -> None:
    logs = [
        text.decode().split("\n")
        for text in comm.exchange(CollectiveId("comparison of paths", "", step), "\n".join(comm.log).encode())
    ]
    firsts = range(0, len(logs), comm.size)
    for first in firsts:
        _compare({rank: logs[rank] for rank in range(first, first + comm.size)})
    _compare({first: _by_operation(logs[first]) for first in firsts})


def _compare(logs: Mapping[int, Sequence[str]]) -> None:
    """Raise CollectiveError for the first entry that differs between ranks."""
    first, *others = logs
    for mine, *theirs in zip_longest(*logs.values(), fillvalue="no collective"):
        for rank, entry in zip(others, theirs, strict=True):
            if entry != mine:
                raise different_paths(first, mine, rank, entry)
