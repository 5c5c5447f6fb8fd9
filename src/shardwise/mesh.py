"""Ranks, device and process groups: the one place that creates them and that reads torchrun's environment.

The mesh names its axes. ``dp_shard`` is the axis that model states are sharded over, ``dp_replicate`` the one along
which each shard is held several times, ``world`` joins all ranks. Where ``dp_shard`` has k ranks, rank r of the world
is rank r % k on it and rank r // k on ``dp_replicate``.
"""

from __future__ import annotations

import atexit
import gc
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from shardwise import torch_compat
from shardwise.errors import ConfigError

DEFAULT_TIMEOUT = timedelta(minutes=30)
_SECONDS_TO_PUT_AWAY = 0.05


Parts = tuple[tuple[int, ...], ...]
"""Ranks of the world, each in one of these groups."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh as this rank sees it."""

    name: str
    rank: int
    size: int
    group: ProcessGroup | None
    """Carries tensors of the mesh's device; None where the axis has one rank."""
    control_group: ProcessGroup | None
    """gloo: carries a few host bytes a step, without waiting for the device."""
    timeout: timedelta
    parts: Parts
    """All groups of the axis, this rank's among them."""
    part: int
    """Which of them is this rank's."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the world that this rank meets here, in their order on the axis."""
        return self.parts[self.part]


@dataclass(frozen=True, slots=True)
class Mesh:
    """The device of this process and the axes that it takes part in."""

    device: torch.device
    dp_shard: Axis
    dp_replicate: Axis
    world: Axis


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this process: ``cuda:LOCAL_RANK`` where there is one, else the CPU; or the one that is asked for.

    Raises:
        ConfigError: CUDA is asked for where there is none, or fewer GPUs than local ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = torch.device(device) if device is not None else torch.device("cuda" if gpus else "cpu")
    if wanted.type == "cpu":
        return wanted
    if wanted.type != "cuda":
        raise ConfigError(f"device {str(wanted)!r} is not supported: expected 'cpu' or 'cuda'.")
    index = wanted.index if wanted.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
    if index >= gpus:
        raise ConfigError(
            f"device cuda:{index} is asked for, but this machine shows {gpus} CUDA device(s). "
            "Start at most one process a GPU, or ask for the CPU."
        )
    return torch.device("cuda", index)


def local_rank(rank: int) -> int:
    """Place of this process on its node, as its launcher says it; ``rank`` where none does: all on one node."""
    return int(os.environ.get("LOCAL_RANK", rank))


def init_distributed(
    dist_backend: str | None = None,
    timeout: timedelta = DEFAULT_TIMEOUT,
    device: str | torch.device | None = None,
) -> None:
    """Join the process group that torchrun's environment describes; without it, stay a single process.

    gloo carries CPU tensors and NCCL carries CUDA tensors, chosen by ``device`` (or from the machine). Does nothing
    where a process group exists already.

    Args:
        dist_backend: "gloo", "nccl", or None for what the device needs.
        timeout: how long a rank waits for the others before it ends with an error that names them.
        device: "cpu", "cuda", or None to choose from the machine.
    """
    if dist.is_initialized():
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return
    if missing:
        raise ConfigError(
            f"the environment has RANK or WORLD_SIZE but lacks {', '.join(missing)}. "
            "Start the script with `shardwise launch` or torchrun, which set all of them."
        )
    torch_compat.import_what_binds_groups()
    chosen = choose_device(device)
    backend = dist_backend or ("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    store = _store_of_this_attempt(timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None  # initialised just above
    atexit.register(_leave, weakref.ref(group), destroys=chosen.type == "cpu")


def _store_of_this_attempt(timeout: timedelta) -> dist.distributed_c10d.Store | None:
    """Where restarted ranks meet; None where torch knows.

    torch's elastic agent may keep one store for all attempts, in which the addresses of the one that failed still
    stand: ranks would call those.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = dist.TCPStore(host, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    return dist.distributed_c10d.PrefixStore(f"attempt_{attempt}", agents)


def _leave(group: weakref.ref[ProcessGroup], destroys: bool) -> None:
    """At the end of a script: let the group and its threads go before the interpreter does.

    A thread of gloo that has not put away the last collective's tensors needs the interpreter for that, and aborts the
    process where it finds none. ``destroys``: the group is ended here where the script has not done so; with NCCL that
    may wait for kernels that never end.
    """
    _subgroups.clear()
    gc.collect()  # an engine that nobody uses any more still holds the group: it is a circle of references
    if destroys and dist.is_initialized():
        dist.destroy_process_group()
    if group() is not None:  # the script's globals hold it: its threads get the interpreter once more
        time.sleep(_SECONDS_TO_PUT_AWAY)


def build_mesh(
    device: str | torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT, shard_size: int | None = None
) -> Mesh:
    """The mesh over all ranks. Collective where ``shard_size`` is given.

    Args:
        device: as ``choose_device`` takes it.
        timeout: how long a rank waits for the others.
        shard_size: ranks of ``dp_shard``, neighbours; it divides the world. None: all ranks.
    """
    chosen = choose_device(device)
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if size > 1 else 0
    shard = shard_size or size
    rows = tuple(tuple(range(first, first + shard)) for first in range(0, size, shard))
    world = _axis("world", (tuple(range(size)),), rank, chosen, timeout)
    return Mesh(
        chosen,
        dp_shard=_axis("dp_shard", rows, rank, chosen, timeout),
        dp_replicate=_axis("dp_replicate", tuple(zip(*rows, strict=True)), rank, chosen, timeout),
        world=world,
    )


def _axis(name: str, parts: Parts, rank: int, device: torch.device, timeout: timedelta) -> Axis:
    part = next(number for number, ranks in enumerate(parts) if rank in ranks)
    place, size = parts[part].index(rank), len(parts[part])
    if size == 1:
        return Axis(name, place, size, None, None, timeout, parts, part)
    world = dist.group.WORLD
    assert world is not None  # several ranks
    group = world if len(parts) == 1 else split(parts, timeout)
    if device.type == "cpu":
        control = group
    else:
        control = _control_group(world, timeout) if len(parts) == 1 else split(parts, timeout, backend="gloo")
    return Axis(name, place, size, group, control, timeout, parts, part)


_subgroups: dict[tuple[ProcessGroup, Parts, str | None], ProcessGroup] = {}


def split(parts: Sequence[Sequence[int]], timeout: timedelta, backend: str | None = None) -> ProcessGroup:
    """The process group of the part that this rank is in. Collective; made once for a partition of the ranks.

    Args:
        parts: every rank of the world is in one of them.
        timeout: of the groups.
        backend: None: that of the world.
    """
    world = dist.group.WORLD
    assert world is not None  # several ranks
    key = (world, tuple(map(tuple, parts)), backend)
    if key not in _subgroups:
        for old in [old for old in _subgroups if old[0] is not world]:
            del _subgroups[old]  # a former world was destroyed, and its groups with it
        group, _ = dist.new_subgroups_by_enumeration([list(part) for part in key[1]], timeout=timeout, backend=backend)
        _subgroups[key] = group
    return _subgroups[key]


_control_groups: dict[ProcessGroup, ProcessGroup] = {}


def _control_group(world: ProcessGroup, timeout: timedelta) -> ProcessGroup:
    """The gloo group for host bytes beside ``world``'s NCCL; made once, for groups live as long as the process."""
    if world not in _control_groups:
        _control_groups.clear()  # a former world was destroyed, and its groups with it
        _control_groups[world] = dist.new_group(backend="gloo", timeout=timeout)
    return _control_groups[world]


def kept_groups() -> frozenset[ProcessGroup]:
    """The groups beside the world's that live as long as it does: whoever asks for them again gets the same."""
    return frozenset((*_subgroups.values(), *_control_groups.values()))
