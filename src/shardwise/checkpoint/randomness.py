"""The random generators of a rank, as a value that a checkpoint keeps."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from shardwise.errors import CheckpointError


def take(device: torch.device) -> dict[str, Any]:
    """The states of torch's, Python's and NumPy's generators, and of torch's on this rank's GPU."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def put_back(states: dict[str, Any], device: torch.device) -> None:
    """Go on drawing where ``take`` was."""
    try:
        version, internal, gauss = states["python"]
        name, keys, position, has_gauss, cached = states["numpy"]
        torch.set_rng_state(states["torch"])
        random.setstate((version, tuple(internal.tolist()), gauss))
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"the checkpoint's random states are not what was saved: {error!r}.") from error
