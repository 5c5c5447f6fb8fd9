"""Engines whose states rest off the device, on a machine without a GPU.

A model on the CPU has its states in host memory in any case, so "cpu" moves nothing there. These engines are made to
take host memory for another place than the device: the path of a GPU's offload, without the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from shardwise.zero.offload import Offload, Place
from tests.world.engine_runs import Config

PLACES = {"none": Place.DEVICE, "cpu": Place.HOST, "nvme": Place.NVME}
PAIRS = [
    (parameter, optimizer) for parameter in PLACES for optimizer in PLACES if (parameter, optimizer) != ("none",) * 2
]


def zero_block(parameter: str, optimizer: str, directory: Path, **others: object) -> Config:
    """What offloads, for the block zero_optimization."""
    block = {"nvme_path": str(directory)}
    return {
        "offload_param": {"device": parameter, **block},
        "offload_optimizer": {"device": optimizer, **block, **others},
    }


def _as_on_a_gpu(parameter: str | None, optimizer: str | None, device_type: str) -> Offload:
    return Offload(PLACES[parameter or "none"], PLACES[optimizer or "none"])


@contextmanager
def host_memory_apart() -> Iterator[None]:
    """Inside, "cpu" is a place of its own."""
    with mock.patch("shardwise.zero.init.choose_offload", _as_on_a_gpu):
        yield
