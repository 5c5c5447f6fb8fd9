"""Rank 0 reads for all: each rank gets what it would get from Accelerate, and nobody waits for a batch in vain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from shardwise.data_loader import prepare_data_loader
from tests.data_cases import DISPATCHED, Numbers, arguments, plain_loader
from tests.worlds import World

RECORDED = json.loads((Path(__file__).parents[1] / "facts" / "fixtures" / "batches.json").read_text())["dispatched"]
CPU = {"device": "cpu", "put_on_device": True}


def hand_out(world: int) -> dict[str, Any]:
    found = {}
    for case in DISPATCHED:
        if case.world == world:
            loader = prepare_data_loader(plain_loader(case), dispatch_batches=True, **CPU, **arguments(case))
            given = [[batch.tolist() for batch in loader] for _ in range(case.epochs)]
            found[case.name] = (given, loader.remainder)
    return found


@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_each_rank_gets_the_recorded_batches(world: World) -> None:
    ranks = world.run(hand_out, world.size)
    for case in DISPATCHED:
        if case.world != world.size:
            continue
        true_samples = case.samples
        for rank, recorded in enumerate(RECORDED[case.name]):
            given, remainder = ranks[rank][case.name]
            if case.samples == 3 and world.size == 3 and case.batch_size == 2 and not case.drop_last:
                assert [len(batch) for batch in given[-1]] == [1], "one sample each, though they come in two batches"
                continue
            assert given == recorded["given"], case.name
            rows = [row for each in ranks for row in each[case.name][0][-1][-1]]
            cut = recorded["remainder"]
            assert (remainder or len(rows)) == (cut if cut != -1 else len(rows)), f"{case.name}: {true_samples}"


# -- batches of any shape


@dataclass(frozen=True)
class Pair:
    x: Tensor
    y: Any


class Point(NamedTuple):
    x: Tensor
    y: Tensor


class Encoding(dict[str, Any]):
    """Like the batches of a tokenizer: a mapping that moves itself."""

    moved = False

    def to(self, device: torch.device) -> Encoding:
        new = Encoding({key: value.to(device) for key, value in self.items()})
        new.moved = True
        return new


def collate(numbers: list[int]) -> dict[str, Any]:
    x = torch.tensor(numbers)
    return {
        "nested": [x.float(), (x.bool(), x.to(torch.bfloat16))],
        "pair": Pair(x.double(), [f"text {number}" for number in numbers]),
        "point": Point(x[:, None].expand(-1, 3), x.to(torch.complex64).conj()),
        "encoding": Encoding(ids=x),
        "empty": torch.empty(len(numbers), 0),
        "scale": torch.tensor(0.5),
        "name": "a batch",
    }


def plain(batch: dict[str, Any]) -> list[Any]:
    x, (flag, half) = batch["nested"]
    assert isinstance(batch["pair"], Pair) and isinstance(batch["point"], Point)
    assert batch["encoding"].moved and batch["name"] == "a batch" and batch["scale"].item() == 0.5
    assert (x.dtype, flag.dtype, half.dtype) == (torch.float32, torch.bool, torch.bfloat16)
    assert batch["point"].x.shape == (len(x), 3) and batch["empty"].shape == (len(x), 0)
    columns = [x, flag.float(), half, batch["pair"].x, batch["point"].x[:, 0], batch["point"].y.real]
    assert all(
        torch.equal(column.double(), flag.double() if i == 1 else x.double()) for i, column in enumerate(columns)
    )
    assert batch["pair"].y == [f"text {int(number)}" for number in x]
    return batch["encoding"]["ids"].tolist()


def hand_out_nested() -> list[Any]:
    loader = prepare_data_loader(DataLoader(Numbers(9), batch_size=2, collate_fn=collate), **CPU)
    return [plain(batch) for batch in loader]


def test_batches_of_any_shape_arrive_as_they_are(world2: World) -> None:
    assert world2.run(hand_out_nested) == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [0]]]


class Ragged(IterableDataset[Tensor]):
    """Batches padded to different lengths."""

    def __iter__(self) -> Iterator[Tensor]:
        for length in (3, 1, 4, 2):
            yield torch.full((2, length), length)


def hand_out_ragged(split: bool) -> list[Any]:
    loader = prepare_data_loader(DataLoader(Ragged(), batch_size=None), dispatch_batches=True, device="cpu")
    return [tuple(batch.shape) for batch in loader]


def test_whole_batches_may_differ_in_length(world2: World) -> None:
    assert world2.run(hand_out_ragged, False) == [[(2, 3), (2, 4)], [(2, 1), (2, 2)]]


# -- nobody waits in vain


class Breaks(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(4)
        raise OSError("the disk is gone")


def read_what_breaks() -> str:
    loader = prepare_data_loader(DataLoader(Breaks(), batch_size=2), **CPU)
    try:
        for _ in loader:
            pass
    except Exception as error:
        dist.barrier()  # both ranks are free
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_error_of_the_reader_reaches_all(world2: World) -> None:
    reader, other = world2.run(read_what_breaks)
    assert reader == "OSError: the disk is gone"
    assert other.startswith("StateError") and "rank 0" in other


def read_nothing() -> list[Any]:
    return list(prepare_data_loader(DataLoader(Numbers(0), batch_size=2), **CPU))


def test_empty_data_end_at_once(world3: World) -> None:
    assert world3.run(read_nothing) == [[], [], []]


def draw_after_an_epoch() -> list[int]:
    torch.manual_seed(5)
    for loader in (DataLoader(Numbers(3)), DataLoader(range(3), shuffle=True)):  # type: ignore[arg-type]
        list(prepare_data_loader(loader, dispatch_batches=True, **CPU))
    return torch.randint(1000, (3,)).tolist()


def test_random_generators_stay_alike(world2: World) -> None:
    reader, other = world2.run(draw_after_an_epoch)
    assert reader == other
