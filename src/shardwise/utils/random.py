"""Names alone: random numbers live in `shardwise.random`."""

from shardwise.random import (
    RNGType,
    set_seed,
    synchronize_rng_state,
    synchronize_rng_states,
)

__all__ = [
    "RNGType",
    "set_seed",
    "synchronize_rng_state",
    "synchronize_rng_states",
]
