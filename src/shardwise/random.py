"""Random numbers alike on all processes, or on purpose not alike."""

from __future__ import annotations

import random
from collections.abc import Iterable
from enum import StrEnum

import numpy as np
import torch

from shardwise.errors import ConfigError
from shardwise.operations import broadcast
from shardwise.process import PartialState, process_index


class RNGType(StrEnum):
    """The generators of random numbers that can be synchronised."""

    TORCH = "torch"
    CUDA = "cuda"
    GENERATOR = "generator"


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed ``random``, NumPy and torch, on the CPU and on all GPUs.

    Args:
        seed: the same on all processes.
        device_specific: add the process's index, so that every process draws its own numbers.
        deterministic: let torch refuse kernels that do not give the same bits each time.
    """
    if device_specific:
        seed += process_index()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def synchronize_rng_state(rng_type: RNGType | str | None = None, generator: torch.Generator | None = None) -> None:
    """Give every process the first one's state of one generator.

    Args:
        rng_type: "torch" (on the CPU), "cuda" (on this process's GPU), or "generator" for the one that is given.
        generator: a torch generator.

    Raises:
        ConfigError: there is no such type, or no generator was given.
    """
    try:
        kind = RNGType(rng_type or RNGType.GENERATOR)
    except ValueError:
        raise ConfigError(f"rng type {rng_type!r} is unknown: expected one of {', '.join(RNGType)}.") from None
    if kind is RNGType.TORCH:
        torch.set_rng_state(broadcast(torch.get_rng_state()))
    elif kind is RNGType.CUDA:
        device = PartialState().device
        if device.type != "cuda":
            raise ConfigError(f"rng type 'cuda' cannot be synchronised: this process runs on {device}.")
        torch.cuda.set_rng_state(broadcast(torch.cuda.get_rng_state(device)), device)
    else:
        if generator is None:
            raise ConfigError("rng type 'generator' needs a generator: pass a torch.Generator.")
        generator.set_state(broadcast(generator.get_state()))


def synchronize_rng_states(rng_types: Iterable[RNGType | str], generator: torch.Generator | None = None) -> None:
    """``synchronize_rng_state`` for each of ``rng_types``."""
    for rng_type in rng_types:
        synchronize_rng_state(rng_type, generator)
