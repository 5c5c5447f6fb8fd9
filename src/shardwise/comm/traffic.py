"""Bytes that this rank received: by operation, from where, and as what they travelled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from shardwise.topology import Topology


@dataclass(frozen=True, slots=True, order=True)
class Route:
    """One row of the table of traffic."""

    operation: str
    wire: str
    """What a value travelled as: a dtype, or a quantisation format."""
    across: bool
    """From another node."""
    axis: str = "dp_shard"
    """Of the mesh."""


class Traffic:
    """What a formula is compared with.

    A byte counts for the rank that it came in for, once, whatever relays it passed. Where the backend's own collective
    moves a buffer in rings or trees that it does not tell of, every byte counts as entering each node once, and the
    ranks of a node share it: the least that such a collective can do.
    """

    def __init__(self, axis: str, rank: int, size: int) -> None:
        self._axis = axis
        self._rank = rank
        self.topology = Topology((0,) * size)
        """Of the axis: ranks are counted along it."""
        self._bytes: dict[Route, int] = {}

    def count_with(self, other: Traffic) -> None:
        """From now on the rows of both axes stand in the other's table."""
        self._bytes = other._bytes

    @property
    def by_route(self) -> dict[Route, int]:
        """All rows; a copy."""
        return dict(sorted(self._bytes.items()))

    @property
    def received_bytes(self) -> dict[str, int]:
        """By operation."""
        return by_operation(self._bytes)

    @property
    def across_bytes(self) -> int:
        """From other nodes."""
        return sum(num_bytes for route, num_bytes in self._bytes.items() if route.across)

    def clear(self) -> None:
        """Count from zero."""
        self._bytes.clear()

    def from_ranks(self, operation: str, wire: str, sizes: Iterable[tuple[int, int]]) -> None:
        """Count messages: (rank, bytes) each. A rank's own do not travel."""
        mine = self.topology.node_of[self._rank]
        for rank, num_bytes in sizes:
            if rank != self._rank:
                self._add(operation, wire, self.topology.node_of[rank] != mine, num_bytes)

    def by_backend(self, operation: str, wire: str, received: int) -> None:
        """Count a collective of the backend's that brought ``received`` bytes: a buffer but for this rank's share."""
        world, nodes = self.topology.world, self.topology.num_nodes
        near = self.topology.node_of.count(self.topology.node_of[self._rank])
        whole = received * world / (world - 1)
        across = round(whole * (nodes - 1) / nodes / near)
        self._add(operation, wire, True, across)
        self._add(operation, wire, False, received - across)

    def _add(self, operation: str, wire: str, across: bool, num_bytes: int) -> None:
        route = Route(operation, wire, across, self._axis)
        if num_bytes:
            self._bytes[route] = self._bytes.get(route, 0) + num_bytes


def by_operation(received: Mapping[Route, int]) -> dict[str, int]:
    """Rows of the table added up."""
    total: dict[str, int] = {}
    for route, num_bytes in received.items():
        total[route.operation] = total.get(route.operation, 0) + num_bytes
    return total


def wire_of(dtype: torch.dtype) -> str:
    """How a dtype is called in the table."""
    return str(dtype).removeprefix("torch.")
