"""Collectives on nested data: every dtype, shape and memory layout arrives as it was, in rank order, on every rank."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch

from shardwise import operations
from shardwise.errors import ConfigError
from shardwise.operations import DistributedOperationException, UnsupportedTypeError
from shardwise.process import PartialState
from tests.worlds import World

Pair = namedtuple("Pair", ["left", "right"])
both = pytest.mark.parametrize("world", [2, 3], indirect=True)
DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e4m3fn),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def open_state() -> PartialState:
    PartialState._reset_state()
    return PartialState(cpu=True)


def of_rank(rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 50, (3, 5), generator=generator).to(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit: not every dtype can be compared."""
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def gather_everything() -> None:
    state = open_state()
    rank, ranks = state.process_index, range(state.num_processes)
    for dtype in DTYPES:
        mine = of_rank(rank, dtype)
        expected = torch.cat([of_rank(r, dtype) for r in ranks])
        assert same(operations.gather(mine), expected), dtype
        assert same(operations.gather(mine.t()), torch.cat([of_rank(r, dtype).t() for r in ranks])), f"{dtype}, strided"
        assert same(operations.gather(mine[1, 1]), expected[1::3, 1]), f"{dtype}, a number"
        assert same(operations.gather(mine[:0]), expected[:0]), f"{dtype}, empty"
    data = {"loss": torch.tensor(1.0 + rank, requires_grad=True), "more": [Pair(torch.full((2,), rank), ())]}
    found = operations.gather(data)
    assert found["loss"].tolist() == [1.0 + r for r in ranks]
    assert type(found["more"][0]) is Pair and found["more"][0].left.tolist() == [r for r in ranks for _ in range(2)]
    assert operations.gather_object([rank, {"r": rank}]) == [item for r in ranks for item in (r, {"r": r})]
    with pytest.raises(UnsupportedTypeError, match="int"):
        operations.gather([torch.ones(1), 1])


def broadcast_everything() -> None:
    state = open_state()
    rank, last = state.process_index, state.num_processes - 1
    for dtype in DTYPES:
        mine = of_rank(rank, dtype)
        assert same(operations.broadcast(mine), of_rank(0, dtype)), dtype
        assert same(mine, of_rank(0, dtype)), "in place"
        strided = of_rank(rank, dtype).t()
        assert same(operations.broadcast(strided, from_process=last), of_rank(last, dtype).t()), f"{dtype}, strided"
    parameter = torch.nn.Parameter(torch.full((2,), float(rank)))
    operations.broadcast([parameter, torch.tensor(rank), torch.empty(0)], from_process=last)
    assert parameter.tolist() == [last, last] and parameter.requires_grad
    objects: list[Any] = [rank, {"r": rank}]
    assert operations.broadcast_object_list(objects, from_process=last) is objects == [last, {"r": last}]
    for source in (0, last):
        theirs = torch.arange(3, dtype=torch.int32) if rank == source else None
        assert same(operations.copy_tensor_to_devices(theirs), torch.arange(3, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"[23] have one"):
        operations.copy_tensor_to_devices(torch.ones(1))


def reduce_everything() -> None:
    state = open_state()
    rank, size = state.process_index, state.num_processes
    stacks = {d: torch.stack([of_rank(r, d) for r in range(size)]) for d in DTYPES if d != torch.float8_e4m3fn}
    for dtype, stack in stacks.items():
        mine = of_rank(rank, dtype)
        total, mean = operations.reduce(mine, "sum"), operations.reduce(mine)
        assert same(mine, of_rank(rank, dtype)), "the argument was changed"
        # Small whole numbers: every sum is exact.
        assert same(total, stack.sum(0).to(torch.int64 if dtype == torch.bool else dtype)), dtype
        wide = stack if dtype.is_complex or dtype == torch.float64 else stack.float()
        expected = wide.sum(0) / size
        assert same(mean, expected.to(dtype) if dtype.is_floating_point else expected), f"{dtype}, mean"
        if not dtype.is_complex and dtype != torch.bool:
            assert same(operations.reduce(mine, "max"), stack.max(0).values), f"{dtype}, max"
    strided = of_rank(rank, torch.float32).t()
    assert same(operations.reduce(strided, "sum", scale=0.5), stacks[torch.float32].sum(0).t() / 2)
    one = torch.tensor(float(rank))
    assert same(operations.reduce({"x": [one, torch.empty(0)]}, "sum")["x"][0], torch.tensor(sum(range(size)) + 0.0))
    assert operations.reduce(one, "none") is not one and operations.reduce(one, "none").item() == rank


def pad_everything() -> None:
    state = open_state()
    rank, longest = state.process_index, state.num_processes
    mine = torch.full((rank + 1, 2), rank + 1)
    data = {"x": mine, "wide": mine.t().contiguous(), "number": torch.tensor(rank), "empty": torch.empty(rank)}
    along_0 = operations.pad_across_processes(data, pad_index=-100)
    missing = longest - rank - 1
    assert along_0["x"].tolist() == [[rank + 1] * 2] * (rank + 1) + [[-100] * 2] * missing
    assert along_0["wide"] is data["wide"] and along_0["number"] is data["number"]
    assert along_0["empty"].shape == (longest - 1,)
    for dim in (1, -1):
        wide = operations.pad_across_processes(data["wide"], dim=dim, pad_first=True)
        assert wide.tolist() == [[0] * missing + [rank + 1] * (rank + 1)] * 2
    assert operations.pad_across_processes(mine, dim=5) is mine
    assert operations.gather(along_0["x"]).shape == (longest * longest, 2)


OPERATIONS = {
    "gather": operations.gather,
    "broadcast": operations.broadcast,
    "reduce": operations.reduce,
    "pad_across_processes": operations.pad_across_processes,
}


def disagree(name: str, debug: bool, what: str) -> None:
    state = open_state()
    state.debug = debug
    last = state.process_index == state.num_processes - 1
    shape: tuple[int, ...] = (2, 1) if what == "dims" and last else (2,)
    dtype = torch.int32 if what == "dtype" and last else torch.float32
    data = {"first": torch.ones(1), "logits": torch.ones(shape, dtype=dtype)}
    OPERATIONS[name](dict(reversed(data.items())) if what == "order" and last else data)


@both
@pytest.mark.parametrize("case", [gather_everything, broadcast_everything, reduce_everything, pad_everything])
def test_data_arrive_as_they_were(world: World, case: Any) -> None:
    world.run(case)


@pytest.mark.parametrize(
    ("name", "debug", "what"),
    [
        ("gather", False, "dims"),
        ("gather", False, "order"),
        ("reduce", True, "dtype"),
        ("broadcast", True, "dims"),
        ("pad_across_processes", True, "dims"),
    ],
)
def test_data_that_differ_between_ranks_are_an_error_on_every_rank(
    world3: World, name: str, debug: bool, what: str
) -> None:
    failures = world3.run_expecting_errors(disagree, name, debug, what, reusable=True)
    for rank, failure in enumerate(failures):
        assert failure is not None, f"rank {rank} went on"
        assert isinstance(failure.exception, DistributedOperationException), failure.traceback
        assert name in failure.message and "logits" in failure.message
        assert f"rank {rank}" in failure.message or f"process {rank}" in failure.message
    if debug:
        assert failures[0] is not None and all(f"process {r}" in failures[0].message for r in range(3))
