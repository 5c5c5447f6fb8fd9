"""Ranks that read files of their own end together, though their files do not: no collective waits in vain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from shardwise.data_loader import prepare_data_loader, skip_first_batches
from tests.worlds import World


class Files(IterableDataset[int]):
    """A stream in files, as Hugging Face's library makes them: it can be cut into its files, and knows its place."""

    def __init__(self, files: list[list[int]]) -> None:
        self.files = files
        self.epoch = 0
        self.place = {"epoch": 0, "at": 0}
        self.goes_on_at = self.place

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def shard(self, num_shards: int, index: int) -> Files:
        return Files(self.files[index::num_shards])

    def __iter__(self) -> Iterator[int]:
        samples = [number for file in self.files for number in file]
        start = self.goes_on_at["at"] if self.goes_on_at["epoch"] == self.epoch else 0
        self.place = {"epoch": self.epoch, "at": start}
        for number in samples[start:]:
            self.place["at"] += 1
            yield number

    def state_dict(self) -> dict[str, int]:
        return dict(self.place)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.goes_on_at = state_dict


Files.__module__ = "datasets.iterable_dataset"  # by which it is known
THREE = [[0, 1, 2, 3, 4, 5, 6], [10, 11, 12], [20]]


def prepared(files: list[list[int]], **options: Any) -> Any:
    even = options.pop("even_batches", True)
    plain = DataLoader(Files(files), **{"batch_size": 2, **options})
    return prepare_data_loader(plain, even_batches=even)


def read_and_reduce(files: list[list[int]], **options: Any) -> list[Any]:
    loader = prepared(files, **options)
    given = []
    for batch in loader:
        dist.all_reduce(torch.ones(1))  # a training step
        given.append(batch.tolist())
    assert loader.end_of_dataloader or not given
    return given


def test_who_runs_out_gives_its_first_batch_again(world3: World) -> None:
    assert world3.run(read_and_reduce, THREE) == [
        [[0, 1], [2, 3], [4, 5], [6]],
        [[10, 11], [12], [10, 11], [10, 11]],
        [[20], [20], [20], [20]],
    ]


def skip() -> list[Any]:
    return [batch.tolist() for batch in skip_first_batches(prepared(THREE), 2)]


def test_skipping_leaves_the_first_batch_for_the_end(world3: World) -> None:
    assert world3.run(skip) == [[[4, 5], [6]], [[10, 11], [10, 11]], [[20], [20]]]


def test_dropping_the_end_stops_with_the_first(world2: World) -> None:
    assert world2.run(read_and_reduce, THREE[:2], drop_last=True) == [[[0, 1]], [[10, 11]]]


def test_a_rank_without_any_sample_is_said(world2: World) -> None:
    for failure in world2.run_expecting_errors(read_and_reduce, [[1, 2], []], reusable=True):
        assert failure is not None and "1 of 2 processes found no sample at all" in failure.message


def read(files: list[list[int]]) -> list[Any]:
    return [batch.tolist() for batch in prepared(files, even_batches=False)]


def test_uneven_ends_may_be_asked_for(world2: World) -> None:
    assert [len(given) for given in world2.run(read, THREE[:2])] == [4, 2]


def stop_and_go_on(num_batches: int) -> tuple[Any, Any]:
    loader = prepared(THREE)
    iterator = iter(loader)
    for _ in range(num_batches):
        next(iterator)
    saved = loader.state_dict()
    expected = [[batch.tolist() for batch in epoch] for epoch in (iterator, loader)]
    again = prepared(THREE)
    again.load_state_dict(saved)
    return expected, [[batch.tolist() for batch in again] for _ in range(2)]


@pytest.mark.parametrize("num_batches", [1, 2, 3, 4])
def test_the_same_batches_remain(world3: World, num_batches: int) -> None:
    for expected, found in world3.run(stop_and_go_on, num_batches):
        assert found == expected and [len(epoch) for epoch in found] == [4 - num_batches, 4]
