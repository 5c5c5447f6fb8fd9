"""All ranks go on together where they stopped, however the data reach them; and they shuffle alike from the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from shardwise import CollectiveError
from shardwise.data_loader import prepare_data_loader, skip_first_batches
from shardwise.process import PartialState
from tests.data_cases import Case, Numbers, plain_loader
from tests.worlds import World


class Stateful(Numbers):
    """Knows where it stands."""

    at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.samples:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.at = state_dict["at"]


def dispatched(kind: str) -> Any:
    if kind == "stateful":
        return prepare_data_loader(DataLoader(Stateful(13), batch_size=2), device="cpu", put_on_device=True)
    plain = plain_loader(Case(kind, 13, 2, 2))
    return prepare_data_loader(plain, device="cpu", put_on_device=True, dispatch_batches=True)


def numbers(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


def stop_and_go_on(kind: str, num_batches: int, whose: str) -> tuple[Any, Any]:
    """What came later in an unbroken run, and after going on; `whose` state each rank goes on from."""
    loader = dispatched(kind)
    list(loader)
    iterator = iter(loader)
    for _ in range(num_batches):
        next(iterator)
    saved = [loader.state_dict(), torch.get_rng_state()]
    expected = [numbers(iterator), numbers(loader)]
    if whose == "rank 0":
        dist.broadcast_object_list(saved, src=0)
    again = dispatched(kind)
    again.load_state_dict(saved[0])
    torch.set_rng_state(saved[1])
    return expected, [numbers(again), numbers(again)]


@pytest.mark.parametrize("whose", ["its own", "rank 0"])
@pytest.mark.parametrize("kind", ["map", "random", "iterable", "stateful"])
def test_dispatched_batches_remain_the_same(world2: World, kind: str, whose: str) -> None:
    for num_batches in (1, 3, 4):  # 13 samples are 4 rounds, of which the last is filled up
        for expected, found in world2.run(stop_and_go_on, kind, num_batches, whose):
            assert found == expected
            assert len(expected[0]) == 4 - num_batches


def skip(kind: str) -> tuple[Any, Any]:
    whole = numbers(dispatched(kind))  # which seeds torch
    return whole, numbers(skip_first_batches(dispatched(kind), 2))


@pytest.mark.parametrize("kind", ["map", "random", "iterable", "stateful"])
def test_skipping_in_dispatched_batches(world3: World, kind: str) -> None:
    for whole, rest in world3.run(skip, kind):
        assert rest == whole[2:] and len(rest) == 1


def read_some(kind: str, num_batches: int) -> dict[str, Any]:
    loader = dispatched(kind)
    iterator = iter(loader)
    for _ in range(num_batches):
        next(iterator)
    state: dict[str, Any] = loader.state_dict()
    return state


def read_the_rest(kind: str, state: dict[str, Any]) -> list[Any]:
    loader = dispatched(kind)
    loader.load_state_dict(state)
    return numbers(loader)


@pytest.mark.parametrize("kind", ["map", "iterable", "stateful"])
def test_a_world_of_another_size_goes_on(world2: World, world3: World, kind: str) -> None:
    state = world2.run(read_some, kind, 3)[0]  # 12 samples: two rounds of three ranks
    assert world3.run(read_the_rest, kind, state) == [[[12]], [[0]], [[1]]]


# -- the same order on all ranks


def shuffled_with_different_seeds(seedable: bool) -> list[Any]:
    PartialState._reset_state()
    torch.manual_seed(100 + dist.get_rank())
    options: dict[str, Any] = {"use_seedable_sampler": True} if seedable else {"rng_types": ["generator"]}
    loader = prepare_data_loader(DataLoader(range(20), batch_size=2, shuffle=True), **options)  # type: ignore[arg-type]
    return [[number for batch in loader for number in batch.tolist()] for _ in range(2)]


@pytest.mark.parametrize("seedable", [True, False])
def test_ranks_that_were_seeded_differently_shuffle_alike(world2: World, seedable: bool) -> None:
    first, second = world2.run(shuffled_with_different_seeds, seedable)
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == list(range(20))
    assert first[0] != first[1]


# -- a rank that goes elsewhere


def leave_early() -> str:
    PartialState._reset_state()
    loader = prepare_data_loader(DataLoader(Numbers(40), batch_size=2), device="cpu", put_on_device=True)
    try:
        for number, _ in enumerate(loader):
            if dist.get_rank() == 1 and number == 2:
                break
        else:
            return "it went through"
        PartialState().wait_for_everyone()
    except CollectiveError as error:
        return str(error)
    return "nobody said anything"


def test_a_rank_that_leaves_the_loop_alone_is_named(world2: World) -> None:
    reader, other = world2.run(leave_early)
    assert "the next batch" in reader and "rank 1" in reader
    assert "the next batch" in other and "rank 0" in other
