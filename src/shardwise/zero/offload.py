"""Where each model state rests: on the training device, in host memory, or in a file on NVMe.

Ren et al., "ZeRO-Offload" (2021); Rajbhandari et al., "ZeRO-Infinity" (2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what only asks for bytes by formula waits for no torch
    from shardwise.zero.offloaded_parameters import ShardPlace
    from shardwise.zero.shard_states import ShardStates


class Place(Enum):
    """A place to rest."""

    DEVICE = "device"
    """Where the model computes. On a CPU that is host memory, so there HOST is the same place and never chosen."""
    HOST = "host"
    """Host memory beside a GPU, pinned if asked for."""
    NVME = "nvme"
    """A file of this rank."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Where the states of one flat buffer rest."""

    parameter: Place = Place.DEVICE
    optimizer: Place = Place.DEVICE
    """Masters and the optimizer's own state; gradients too, where each rank keeps only its shard of them."""

    @property
    def is_any(self) -> bool:
        """Whether something leaves the device."""
        return self != Offload()


@dataclass(frozen=True, slots=True)
class Places:
    """Where the states of one flat buffer rest, as objects."""

    parameters: ShardPlace | None = None
    """None: on the device."""
    states: ShardStates | None = None
    """Masters, gradients and the optimizer's own state; None: on the device."""
    trained: bool = True
    """Whether an optimizer steps the buffer: without one there are no masters off the device."""


ON_THE_DEVICE = Places()


def choose_offload(parameter: str | None, optimizer: str | None, device_type: str) -> Offload:
    """What the configuration's words mean on a device of that type.

    Args:
        parameter: "none", "cpu" or "nvme": ``offload_param.device``.
        optimizer: the same of ``offload_optimizer.device``.
        device_type: "cpu" or "cuda".
    """
    return Offload(_place(parameter, device_type), _place(optimizer, device_type))


def _place(word: str | None, device_type: str) -> Place:
    if word == "nvme":
        return Place.NVME
    return Place.HOST if word == "cpu" and device_type != "cpu" else Place.DEVICE
