"""Do values arrive as they were sent? Each collective with numbers whose right answer is known on paper."""

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from shardwise.mesh import Axis, Mesh
from shardwise.selftest.book import CheckFailed

NUMEL = 1000  # of each message: more than one packet, in less than a moment

_ADVICE = (
    "The messages arrive, but with wrong values: this build of torch, a driver or a network card is at fault. "
    "Run `shardwise test --use_cpu` to tell the device from the network, and compare `shardwise env` on all machines."
)


def _groups(mesh: Mesh) -> dict[torch.device, ProcessGroup]:
    """The groups that training uses: for tensors of the device, and for a few host bytes a step."""
    axis = mesh.dp_shard
    pairs = ((mesh.device, axis.group), (torch.device("cpu"), axis.control_group))
    return {device: group for device, group in pairs if group is not None}


def broadcast(mesh: Mesh) -> str:
    """Every rank sends in turn; all must hold what it sent."""
    axis = mesh.dp_shard
    for device, group in _groups(mesh).items():
        for source in range(axis.size):
            row = torch.full((NUMEL,), float(axis.rank), device=device)  # [N]
            dist.broadcast(row, group=group, group_src=source)
            _expect(row, torch.full((NUMEL,), float(source)), f"broadcast from rank {source}", device)
    return _detail(mesh, f"{axis.size} sources")


def reduce(mesh: Mesh) -> str:
    """Ranks add 1, 2, …, W; all must hold W (W + 1) / 2."""
    axis = mesh.dp_shard
    for device, group in _groups(mesh).items():
        row = torch.full((NUMEL,), float(axis.rank + 1), device=device)  # [N]
        dist.all_reduce(row, group=group)
        _expect(row, torch.full((NUMEL,), axis.size * (axis.size + 1) / 2), "all-reduce", device)
    return _detail(mesh, f"the sum of 1 to {axis.size}")


def gather(mesh: Mesh) -> str:
    """Each rank sends its own number; all must hold them in the order of ranks."""
    axis = mesh.dp_shard
    for device, group in _groups(mesh).items():
        mine = torch.full((NUMEL,), float(axis.rank), device=device)  # [N]
        parts = [torch.empty_like(mine) for _ in range(axis.size)]
        dist.all_gather(parts, mine, group=group)
        expected = torch.arange(axis.size, dtype=torch.float32).repeat_interleave(NUMEL)  # [W N]
        _expect(torch.cat(parts), expected, "all-gather", device)
    return _detail(mesh, f"{axis.size} parts in order")


def gathered_bytes(axis: Axis, mine: bytes) -> list[bytes]:
    """What each rank says, by rank; all say the same number of bytes."""
    if axis.control_group is None:
        return [mine]
    row = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    rows = [torch.empty_like(row) for _ in range(axis.size)]
    dist.all_gather(rows, row, group=axis.control_group)
    return [bytes(found.tolist()) for found in rows]


def _expect(found: torch.Tensor, expected: torch.Tensor, operation: str, device: torch.device) -> None:
    found = found.cpu()
    wrong = (found != expected).nonzero().flatten()
    if wrong.numel():
        at = int(wrong[0])
        raise CheckFailed(
            f"{operation} on {device.type}: element {at} is {found[at].item():g}, expected {expected[at].item():g} "
            f"({wrong.numel()} of {found.numel()} are wrong).",
            _ADVICE,
        )


def _detail(mesh: Mesh, what: str) -> str:
    devices = [device.type for device in _groups(mesh)]
    return f"{what}, on {' and '.join(devices)}" if devices else "one rank: nothing travels"
