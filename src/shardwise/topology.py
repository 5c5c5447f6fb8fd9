"""Which ranks share a node: what is near, and what lies behind the slower network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """The node of each rank. Ranks of a node are neighbours, and nodes are counted from 0."""

    node_of: tuple[int, ...]

    @classmethod
    def even(cls, world: int, ranks_per_node: int) -> Topology:
        """Nodes of one size: rank r is on node r // ranks_per_node.

        Raises:
            ConfigError: the size does not divide the world.
        """
        if ranks_per_node < 1 or world % ranks_per_node:
            raise ConfigError(
                f"{ranks_per_node} ranks a node do not divide a world of {world}. Expected "
                f"{' or '.join(map(str, divisors(world)))}."
            )
        return cls(tuple(rank // ranks_per_node for rank in range(world)))

    @classmethod
    def of_local_ranks(cls, local_ranks: Sequence[int]) -> Topology:
        """A node begins wherever a rank is the first one of its node."""
        node_of: list[int] = []
        for rank, local in enumerate(local_ranks):
            node_of.append(0 if rank == 0 else node_of[-1] + (local == 0))
        return cls(tuple(node_of))

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.node_of)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.node_of[-1] + 1

    @property
    def ranks_per_node(self) -> int | None:
        """The common size of the nodes; None where they differ."""
        sizes = {self.node_of.count(node) for node in range(self.num_nodes)}
        return sizes.pop() if len(sizes) == 1 else None

    def among(self, ranks: Sequence[int]) -> Topology:
        """The same for some of the ranks, in ascending order, who are counted from 0."""
        node_of: list[int] = []
        for place, rank in enumerate(ranks):
            begins = place > 0 and self.node_of[rank] != self.node_of[ranks[place - 1]]
            node_of.append(node_of[-1] + begins if node_of else 0)
        return Topology(tuple(node_of))

    def inside(self, rank: int) -> tuple[int, ...]:
        """The ranks of the node that ``rank`` is on."""
        return tuple(other for other in range(self.world) if self.node_of[other] == self.node_of[rank])

    def across(self, rank: int) -> tuple[int, ...]:
        """The ranks that have the place on their node that ``rank`` has on its own; nodes of one size."""
        size = self.ranks_per_node
        assert size is not None
        return tuple(range(rank % size, self.world, size))


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
