"""Whoever accumulates or gathers knows in time that the end has come, and how many of its samples are true."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset, SubsetRandomSampler

from shardwise.data_loader import ActiveLoaders, prepare_data_loader
from tests.data_cases import Numbers


def loader(samples: Any, active: ActiveLoaders | None = None, world: int = 1, rank: int = 0, **options: Any) -> Any:
    data = list(range(samples)) if isinstance(samples, int) else samples
    plain: Any = DataLoader(data, **{"batch_size": 2, **options})  # type: ignore[arg-type]
    return prepare_data_loader(plain, num_processes=world, process_index=rank, active=active)


def true_rows(prepared: list[Any]) -> list[int]:
    """What a gather makes of all ranks' batches: in the last round, the first `remainder` rows alone."""
    found: list[int] = []
    for batches in zip(*prepared, strict=True):
        rows = torch.cat(list(batches)).tolist()
        ends, remainder = prepared[0].end_of_dataloader, prepared[0].remainder
        found += rows[:remainder] if ends and remainder > 0 else rows
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 4, 5, 12, 13])
@pytest.mark.parametrize("iterable", [False, True])
def test_the_remainder_leaves_each_sample_once(world: int, samples: int, iterable: bool) -> None:
    data: Any = Numbers(samples) if iterable else samples
    assert true_rows([loader(data, world=world, rank=rank) for rank in range(world)]) == list(range(samples))


def test_the_remainder_counts_what_the_sampler_gives() -> None:
    """Not the dataset: a sampler may leave samples out, or draw more of them."""
    data = list(range(20))
    for sampler, count in (
        (SubsetRandomSampler(range(5)), 5),
        (RandomSampler(data, replacement=True, num_samples=7), 7),  # type: ignore[arg-type]
    ):
        ranks = [loader(20, world=2, rank=rank, sampler=sampler) for rank in range(2)]
        assert len(true_rows(ranks)) == count
    assert len(true_rows([loader(Subset(data, [3, 4, 5]), world=2, rank=rank) for rank in range(2)])) == 3  # type: ignore[arg-type]


class Odd:
    """Batches of its own making, of some samples alone."""

    batch_size = 2

    def __init__(self, *batches: list[int]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def test_a_batch_sampler_is_believed_where_its_length_fits() -> None:
    for sampler, remainder in ((Odd([0, 1], [2, 3], [4]), 1), (Odd([0, 1], [4, 2]), -1)):
        prepared = loader(5, world=2, batch_size=1, batch_sampler=sampler)
        list(prepared)
        assert prepared.remainder == remainder


def test_nothing_is_known_where_nothing_was_filled_up() -> None:
    ranks = [loader(13, world=2, rank=rank, drop_last=True) for rank in range(2)]
    assert true_rows(ranks) == list(range(12))
    assert ranks[0].remainder == -1


def test_the_end_is_known_with_the_last_batch() -> None:
    active = ActiveLoaders()
    prepared = loader(5, active)
    assert not active.in_dataloader and active.remainder == -1
    for _ in range(2):
        ends = [(active.end_of_dataloader, active.active_dataloader is prepared) for _ in prepared]
        assert ends == [(False, True), (False, True), (True, True)]
        assert not active.in_dataloader and not active.end_of_dataloader


def test_an_inner_loop_hides_the_outer_one_while_it_runs() -> None:
    active = ActiveLoaders()
    outer, inner = loader(4, active), loader(2, active)
    seen = []
    for _ in outer:
        seen.append(active.active_dataloader)
        for _ in inner:
            seen.append(active.active_dataloader)
        seen.append(active.active_dataloader)
    assert seen == [outer, inner, outer] * 2
    assert active.dataloader_references == []


def test_a_loop_that_was_left_is_forgotten() -> None:
    """An evaluation cut short must not hide the end of the training loop around it."""
    active = ActiveLoaders()
    outer, inner = loader(4, active), loader(8, active)
    ends = []
    for _ in outer:
        ends.append(active.end_of_dataloader)
        for _ in inner:
            break
    assert ends == [False, True]
    assert not active.in_dataloader


def test_two_loaders_side_by_side() -> None:
    active = ActiveLoaders()
    first, second = loader(4, active), loader(6, active)
    assert [active.active_dataloader for _ in zip(first, second, strict=False)] == [second, second]


def test_one_batch_without_a_loop_knows_its_end() -> None:
    active = ActiveLoaders()
    prepared = loader(2, active)
    next(iter(prepared))
    assert active.end_of_dataloader


def test_the_registry_keeps_no_loader_alive() -> None:
    active = ActiveLoaders()
    prepared = loader(4, active)
    next(iter(prepared))
    del prepared
    gc.collect()
    assert not active.in_dataloader
