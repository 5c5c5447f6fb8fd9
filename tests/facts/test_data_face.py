"""What scripts do with a prepared loader beside iterating it; and the loader that they made stays as it was."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from shardwise.data_loader import (
    BatchSamplerShard,
    DataLoaderShard,
    SeedableRandomSampler,
    SkipBatchSampler,
    SkipDataLoader,
    prepare_data_loader,
    skip_first_batches,
)
from shardwise.errors import ConfigError
from tests.data_cases import Numbers

DATA: Any = list(range(13))


def test_it_is_a_dataloader_with_its_options() -> None:
    plain = DataLoader(DATA, batch_size=3, shuffle=True, num_workers=1, prefetch_factor=5, collate_fn=tuple)
    loader = prepare_data_loader(plain, num_processes=2, process_index=1, device="cpu", put_on_device=True)
    assert isinstance(loader, DataLoader) and isinstance(loader, DataLoaderShard)
    assert loader.dataset is DATA and loader.collate_fn is tuple
    assert (loader.num_workers, loader.prefetch_factor) == (1, 5)
    assert isinstance(loader.batch_sampler, BatchSamplerShard) and loader.batch_sampler.batch_size == 3
    assert loader.device == torch.device("cpu")
    assert (loader.total_batch_size, loader.total_dataset_length, len(loader)) == (6, 13, 3)
    assert prepare_data_loader(loader) is loader


@pytest.mark.parametrize("split", [False, True])
def test_the_total_batch_size_is_that_of_all_ranks(split: bool) -> None:
    for data in (DATA, Numbers(13)):
        plain = DataLoader(data, batch_size=4)
        loader = prepare_data_loader(plain, num_processes=2, process_index=0, split_batches=split)
        assert loader.total_batch_size == (4 if split else 8)


@pytest.mark.parametrize("seedable", [False, True])
def test_the_users_loader_stays_as_it_is(seedable: bool) -> None:
    plain = DataLoader(DATA, batch_size=3, shuffle=True)
    sampler = plain.sampler
    loader = prepare_data_loader(plain, num_processes=2, process_index=0, use_seedable_sampler=seedable)
    list(loader)
    assert isinstance(sampler, RandomSampler) and sampler.generator is None
    assert isinstance(plain.batch_sampler, BatchSampler) and plain.batch_sampler.sampler is sampler


def test_samplers_can_be_found_and_replaced() -> None:
    loader = prepare_data_loader(
        DataLoader(DATA, shuffle=True), num_processes=2, process_index=0, use_seedable_sampler=True, data_seed=9
    )
    sampler = loader.get_sampler()
    assert isinstance(sampler, SeedableRandomSampler) and sampler.initial_seed == 9
    loader.set_sampler(range(4))  # type: ignore[arg-type]
    assert [int(batch) for batch in loader] == [0, 2]


def test_the_epoch_reaches_whoever_wants_it() -> None:
    class Data(Dataset[int]):
        epoch = -1

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            return index

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data = Data()
    plain = DataLoader(data, shuffle=True)
    loader = prepare_data_loader(plain, num_processes=2, process_index=0, use_seedable_sampler=True)
    list(loader)
    assert (loader.iteration, data.epoch) == (1, 0)
    loader.set_epoch(5)
    assert (loader.iteration, data.epoch, loader.get_sampler().epoch) == (5, 5, 5)
    list(loader)
    assert loader.iteration == 6


def test_even_batches_can_be_changed_between_epochs() -> None:
    loader = prepare_data_loader(DataLoader(DATA, batch_size=4), num_processes=2, process_index=1)
    assert [len(batch) for batch in loader] == [4, 4]
    loader.batch_sampler.even_batches = False  # type: ignore[union-attr]
    assert [len(batch) for batch in loader] == [4, 1] and len(loader) == 2


def test_generators_are_synchronised_when_an_epoch_begins() -> None:
    heard: list[Any] = []

    def synchronize(names: Any, generator: Any) -> None:
        heard.append((names, generator))

    def prepared(**options: Any) -> DataLoaderShard:
        plain = DataLoader(DATA, shuffle=True)
        common = {"rng_types": ["torch", "generator"], "synchronize_random": synchronize, "process_index": 0}
        return prepare_data_loader(plain, **common, **options)  # type: ignore[arg-type]

    loader = prepared(num_processes=2)
    for _ in range(2):
        list(loader)
    sampler = loader.get_sampler()
    assert heard == [(["torch", "generator"], sampler.generator)] * 2 and sampler.generator is not None
    heard.clear()
    list(prepared(num_processes=2, use_seedable_sampler=True))
    assert heard == [(["torch"], None)]


def test_a_resumed_epoch_is_not_synchronised_again() -> None:
    heard: list[Any] = []
    common: dict[str, Any] = {"num_processes": 2, "process_index": 0, "rng_types": ["generator"]}
    common["synchronize_random"] = lambda names, generator: heard.append(names)
    loader, again = (prepare_data_loader(DataLoader(DATA, shuffle=True), **common) for _ in range(2))
    next(iter(loader))
    again.load_state_dict(loader.state_dict())
    list(again)
    assert heard == [["generator"]]


@dataclass
class Pair:
    x: Tensor
    y: str


class Point(NamedTuple):
    x: Tensor


class Encoding(dict[str, Any]):
    def to(self, device: torch.device) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.items()})


def test_batches_of_any_shape_go_to_the_device() -> None:
    def collate(numbers: list[int]) -> Any:
        x = torch.tensor(numbers)
        return {"a": [x, (x,)], "pair": Pair(x, "y"), "point": Point(x), "encoding": Encoding(x=x), "text": ["t"]}

    plain = DataLoader(DATA, batch_size=4, collate_fn=collate)
    for non_blocking in (False, True):
        loader = prepare_data_loader(plain, device="meta", put_on_device=True, non_blocking=non_blocking)
        batch = next(iter(loader))
        moved = [batch["a"][0], batch["a"][1][0], batch["pair"].x, batch["point"].x, batch["encoding"]["x"]]
        assert all(tensor.is_meta for tensor in moved)
        assert isinstance(batch["pair"], Pair) and isinstance(batch["point"], Point) and batch["text"] == ["t"]


def test_a_loader_can_be_pickled() -> None:
    loader = prepare_data_loader(DataLoader(DATA, batch_size=3, shuffle=True), num_processes=2, process_index=0)
    next(iter(loader))
    assert len(list(pickle.loads(pickle.dumps(loader)))) == 3


def test_loaders_can_be_built_by_hand() -> None:
    assert [batch.tolist() for batch in DataLoaderShard(DATA, device="cpu", batch_size=8)] == [
        list(range(8)),
        list(range(8, 13)),
    ]
    assert len(list(SkipDataLoader(Numbers(6), skip_batches=2, batch_size=2))) == 1
    sampler = SkipBatchSampler(BatchSampler(range(7), 2, False), 2)
    assert list(sampler) == [[4, 5], [6]] and len(sampler) == 2 and sampler.total_length == 4
    assert [batch.tolist() for batch in skip_first_batches(DataLoader(DATA, batch_sampler=sampler), 1)] == [[6]]


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ConfigError, match="batch_size 3 is not a multiple of 2 processes"):
        prepare_data_loader(DataLoader(DATA, batch_size=3), num_processes=2, process_index=0, split_batches=True)
    with pytest.raises(ConfigError, match="neither the loader nor its batch sampler has a batch_size"):
        plain = DataLoader(DATA, batch_sampler=[[0, 1], [2]])  # type: ignore[arg-type]
        prepare_data_loader(plain, num_processes=2, process_index=0, split_batches=True)
    with pytest.raises(ConfigError, match="there is no process group"):
        prepare_data_loader(DataLoader(DATA), num_processes=2, process_index=0, dispatch_batches=True)
