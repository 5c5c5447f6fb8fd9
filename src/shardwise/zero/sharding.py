"""A stage is a row of a table: which of the three model states each rank holds only its shard of.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2019), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shardwise.errors import ConfigError
from shardwise.layout import Layout
from shardwise.zero.offload import ON_THE_DEVICE, Places


@dataclass(frozen=True, slots=True)
class Sharding:
    """For each model state: is it sharded over the ranks (True), or whole on every rank (False)?"""

    optimizer: bool
    gradient: bool
    parameter: bool

    def __post_init__(self) -> None:
        for implied, implying, reason in (
            (self.gradient, self.parameter, "a rank that holds a shard of a parameter steps only that shard"),
            (self.optimizer, self.gradient, "an optimizer over whole parameters needs whole gradients"),
        ):
            if implying and not implied:
                raise ConfigError(f"{self} makes no sense: {reason}.")

    @property
    def reduces_every_backward(self) -> bool:
        """Sharded gradients have no room for what was not reduced yet; whole ones wait for the step's last backward."""
        return self.gradient


STAGES: tuple[Sharding, ...] = (
    Sharding(optimizer=False, gradient=False, parameter=False),
    Sharding(optimizer=True, gradient=False, parameter=False),
    Sharding(optimizer=True, gradient=True, parameter=False),
    Sharding(optimizer=True, gradient=True, parameter=True),
)
"""``STAGES[k]`` is ZeRO stage k; 0 is plain data parallelism."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of model states at rest on one rank."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All model states."""
        return self.parameters + self.gradients + self.optimizer

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            self.parameters + other.parameters, self.gradients + other.gradients, self.optimizer + other.optimizer
        )


def state_bytes(
    layout: Layout,
    rank: int,
    sharding: Sharding,
    compute_itemsize: int,
    master_itemsize: int,
    trainable: bool,
    has_gradients: bool,
    places: Places = ON_THE_DEVICE,
    codes_bytes: Callable[[int], int] | None = None,
) -> StateBytes:
    """What ``rank`` holds of one flat buffer in memory, before the optimizer's own state is counted.

    A parameter that computes in its master's dtype is its own master. One that computes in 16 bits has a separate
    master, which counts as optimizer state; where the parameter is sharded the master alone rests and is cast on its
    way. Frozen parameters have neither gradient nor master; without an optimizer there are no gradients.

    With W ranks and Adam's two moments this gives, in bytes a parameter, at stages 0 to 3: in fp32 16, 8 + 8/W,
    4 + 12/W, 16/W; in 16 bits 18, 6 + 12/W, 2 + 16/W, 16/W. What rests in a store is not in memory.
    ``codes_bytes`` gives the bytes of a shard that rests quantised.
    """
    whole, shard = layout.numel, layout.shard(rank).numel
    in_memory = places.states is None
    separate_master = trainable and compute_itemsize != master_itemsize
    if places.parameters is not None:
        separate_master = trainable and places.trained
    parameters = compute_itemsize * (shard if sharding.parameter else whole)
    if codes_bytes is not None:
        parameters, separate_master = codes_bytes(shard), False
    if places.parameters is not None or (separate_master and sharding.parameter and in_memory):
        parameters = 0
    has_gradients = has_gradients and (in_memory or not sharding.gradient)
    return StateBytes(
        parameters=parameters,
        gradients=master_itemsize * (shard if sharding.gradient else whole) * has_gradients,
        optimizer=master_itemsize * (shard if sharding.optimizer else whole) * (separate_master and in_memory),
    )


def sum_bytes(parts: Iterable[StateBytes]) -> StateBytes:
    """The bytes of several buffers."""
    return sum(parts, StateBytes(0, 0, 0))
