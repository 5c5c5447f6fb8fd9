"""A loader that is stopped anywhere goes on with exactly the batches that were left, now and in later epochs."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from shardwise.data.position import RandomStates
from shardwise.data_loader import prepare_data_loader, skip_first_batches
from shardwise.errors import ConfigError
from tests.data_cases import Case, arguments, plain_loader

Make = Callable[[], DataLoader[Any]]


class Stateful(IterableDataset[int]):
    """A stream that depends on the epoch, knows where it stands, and counts what is read of it."""

    def __init__(self, samples: int = 21) -> None:
        self.samples, self.epoch, self.at, self.reads = samples, 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        while self.at < self.samples:
            self.at += 1
            self.reads += 1
            yield 100 * self.epoch + self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.at = state_dict["at"]


class ShuffledByTheWorld(IterableDataset[int]):
    """An order that is drawn from the global random generators at the beginning."""

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(21).tolist()
        random.shuffle(order)
        return iter(order)


class Buckets:
    """A batch sampler that shuffles by Python's generator."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [list(range(start, start + 3)) for start in range(0, 21, 3)]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return 7


def made(dataset: Callable[[], Any], world: int, **options: Any) -> Make:
    return lambda: prepare_data_loader(DataLoader(dataset(), **options), num_processes=world, process_index=world - 1)


def of_case(kind: str, world: int, **options: Any) -> Make:
    case = Case(kind, 21, 2, world)
    rank = {"process_index": world - 1}
    return lambda: prepare_data_loader(plain_loader(case, **options), **rank, **arguments(case))


LOADERS: dict[str, Make] = {
    f"{kind} of {world}": of_case(kind, world)
    for kind in ("map", "random", "own generator", "seedable", "replacement", "batches as samples", "iterable")
    for world in (1, 2)
} | {
    "lists": of_case("lists", 2),
    "generator of the dataset": of_case("iterable with generator", 2),
    "buckets": made(lambda: list(range(21)), 2, batch_sampler=Buckets()),
    "stateful": made(Stateful, 1, batch_size=2),
    "stateful of 2": made(Stateful, 2, batch_size=2),
    "stateful, with a full end": made(lambda: Stateful(24), 2, batch_size=2),
    "stateful, without the end": made(Stateful, 2, batch_size=2, drop_last=True),
    "shuffled by the world": made(ShuffledByTheWorld, 1, batch_size=2),
    "shuffled by the world of 2": made(ShuffledByTheWorld, 2, batch_size=2),
    "read by workers": of_case("random", 1, num_workers=2),
    "read by workers, seedable": of_case("seedable", 2, num_workers=2, persistent_workers=True),
    "iterable in a worker": of_case("iterable", 2, num_workers=1),
    "stateful in a worker": made(Stateful, 2, batch_size=2, num_workers=1),
    "shuffled in a worker": made(ShuffledByTheWorld, 1, batch_size=2, num_workers=1),
}


def numbers(loader: Any) -> list[Any]:
    return [batch.tolist() for batch in loader]


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, without unpickling anything but tensors and plain things."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stop_after(loader: Any, num_batches: int) -> tuple[dict[str, Any], RandomStates, list[Any]]:
    """One whole epoch, some batches of the next one, then what is saved; and all that comes later."""
    list(loader)
    iterator = iter(loader)
    for _ in range(num_batches):
        next(iterator)
        torch.rand(1)  # a model draws too
    saved, states = stored(loader.state_dict()), RandomStates.take()
    return saved, states, [numbers(iterator), numbers(loader), numbers(loader), torch.rand(2).tolist()]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_same_batches_remain(name: str, num_batches: int) -> None:
    saved, states, expected = stop_after(LOADERS[name](), num_batches)
    torch.manual_seed(99)
    random.seed(99)
    loader = LOADERS[name]()
    loader.load_state_dict(saved)
    states.set()  # as a checkpoint restores them
    assert [numbers(loader), numbers(loader), numbers(loader), torch.rand(2).tolist()] == expected


@pytest.mark.parametrize(
    "name", ["random of 1", "seedable of 2", "stateful of 2", "stateful, with a full end", "read by workers"]
)
def test_nothing_remains_behind_the_last_batch(name: str) -> None:
    probe = LOADERS[name]()
    saved, states, expected = stop_after(LOADERS[name](), len(numbers(probe)))
    loader = LOADERS[name]()
    loader.load_state_dict(saved)
    states.set()
    assert [numbers(loader), numbers(loader)] == [[], expected[1]]


@pytest.mark.parametrize("name", ["random of 1", "random of 2", "seedable of 2", "stateful of 2"])
def test_between_two_epochs_the_next_one_comes(name: str) -> None:
    loader = LOADERS[name]()
    list(loader)
    saved, states = stored(loader.state_dict()), RandomStates.take()
    expected = [numbers(loader), numbers(loader)]
    again = LOADERS[name]()
    again.load_state_dict(saved)
    states.set()
    assert [numbers(again), numbers(again)] == expected


def test_going_on_and_stopping_again() -> None:
    saved, _, expected = stop_after(LOADERS["stateful of 2"](), 2)
    loader = LOADERS["stateful of 2"]()
    loader.load_state_dict(saved)
    next(iter(loader))
    again = LOADERS["stateful of 2"]()
    again.load_state_dict(stored(loader.state_dict()))
    assert numbers(again) == expected[0][1:]


def test_going_back_where_workers_stay() -> None:
    loader: Any = made(Stateful, 1, batch_size=2, num_workers=1, persistent_workers=True)()
    iterator = iter(loader)
    first = [next(iterator).tolist() for _ in range(2)]
    saved = stored(loader.state_dict())
    del iterator
    loader.load_state_dict(saved)
    assert first + numbers(loader) == numbers(made(Stateful, 1, batch_size=2)())


def test_a_stateful_dataset_is_not_read_again() -> None:
    saved, _, expected = stop_after(LOADERS["stateful of 2"](), 4)
    dataset = Stateful()
    loader: Any = made(lambda: dataset, 2, batch_size=2)()
    loader.load_state_dict(saved)
    assert numbers(loader) == expected[0]
    assert dataset.reads == 21 - 4 * 4 + 4, "what remains, and the first round, which may fill up the last one"


def test_a_state_that_forgets_samples_is_not_trusted() -> None:
    """A stream of Hugging Face's library leaves the samples of its shuffle buffer out of its state."""

    class Buffered(Stateful):
        _ex_iterable = SimpleNamespace(ex_iterables=[SimpleNamespace(ex_iterable=SimpleNamespace(buffer_size=4))])

        def __iter__(self) -> Iterator[int]:
            samples = super().__iter__()
            while buffer := list(itertools.islice(samples, 4)):
                yield from reversed(buffer)

    make = made(Buffered, 2, batch_size=1)
    saved, states, expected = stop_after(make(), 3)
    loader: Any = make()
    loader.load_state_dict(saved)
    states.set()
    assert [numbers(loader), numbers(loader), numbers(loader)] == expected[:3]


def test_samples_that_were_given_out_are_not_read_again() -> None:
    read: list[int] = []

    class Watched(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> int:
            read.append(index)
            return index

    loader: Any = made(Watched, 1, batch_size=5)()
    next(iter(loader))
    again: Any = made(Watched, 1, batch_size=5)()
    again.load_state_dict(loader.state_dict())
    read.clear()
    assert numbers(again) == [list(range(start, start + 5)) for start in (5, 10, 15)]
    assert read == list(range(5, 20))


def test_another_epoch_by_hand_begins_at_its_beginning() -> None:
    loader = LOADERS["seedable of 2"]()
    next(iter(loader))
    again: Any = LOADERS["seedable of 2"]()
    again.load_state_dict(loader.state_dict())  # type: ignore[attr-defined]
    again.set_epoch(1)
    assert len(numbers(again)) == len(again)


# -- worlds of another size


def remaining(kind: str, world: int, batch_size: int, state: dict[str, Any] | None, stop: int | None) -> Any:
    """The state after some batches, or the samples that remain, of all ranks together."""
    case = Case(kind, 48, batch_size, world)
    samples: list[int] = []
    for rank in range(world):
        loader: Any = prepare_data_loader(plain_loader(case), process_index=rank, **arguments(case))
        if state is not None:
            loader.load_state_dict(state)
        for number, batch in enumerate(loader, 1):
            samples += batch.tolist()
            if number == stop:
                return loader.state_dict()
    return sorted(samples)


@pytest.mark.parametrize("kind", ["map", "seedable", "iterable", "own generator"])
def test_another_world_gets_the_same_remaining_samples(kind: str) -> None:
    saved = remaining(kind, 2, 4, None, stop=3)
    expected = remaining(kind, 2, 4, saved, stop=None)
    assert len(expected) == 48 - 3 * 8
    for world, batch_size in ((4, 2), (1, 8), (3, 4), (4, 6)):
        assert remaining(kind, world, batch_size, saved, stop=None) == expected


def test_another_world_that_does_not_reach_the_place_is_refused() -> None:
    saved = remaining("map", 2, 4, None, stop=3)
    with pytest.raises(ConfigError, match=r"after 3 batches of 8 samples from 2 processes; batches of 20 samples"):
        remaining("map", 4, 5, saved, stop=None)


# -- skip_first_batches


@pytest.mark.parametrize("name", LOADERS)
def test_skipping_leaves_out_the_first_batches(name: str) -> None:
    plain, skipping = LOADERS[name](), skip_first_batches(LOADERS[name](), 3)
    torch.manual_seed(4)
    random.seed(4)
    expected = numbers(plain)
    torch.manual_seed(4)
    random.seed(4)
    assert numbers(skipping) == expected[3:]


def test_a_skipping_loader_is_one_with_its_original() -> None:
    """So a run that skips what it did before goes on as if it had never stopped, and can be saved again."""
    reference = LOADERS["seedable of 2"]()
    epochs = [numbers(reference), numbers(reference)]
    loader: Any = LOADERS["seedable of 2"]()
    skipping = skip_first_batches(loader, 2)
    assert len(skipping) == len(loader) - 2
    iterator = iter(skipping)
    assert next(iterator).tolist() == epochs[0][2]
    again: Any = LOADERS["seedable of 2"]()
    again.load_state_dict(loader.state_dict())
    assert numbers(again) == epochs[0][3:]
    assert numbers(iterator) == epochs[0][3:]
    assert numbers(loader) == epochs[1]


def test_skipping_counts_from_the_beginning_of_the_epoch() -> None:
    """A script that skips by hand what the checkpoint says as well does not skip it twice."""
    saved, states, expected = stop_after(LOADERS["random of 2"](), 3)
    loader: Any = LOADERS["random of 2"]()
    loader.load_state_dict(saved)
    states.set()
    assert [numbers(skip_first_batches(loader, 3)), numbers(loader)] == expected[:2]


def test_skipping_in_a_plain_loader() -> None:
    loader = skip_first_batches(DataLoader(range(7), batch_size=2), 2)  # type: ignore[arg-type]
    assert numbers(loader) == [[4, 5], [6]] and len(loader) == 2
    with pytest.raises(ConfigError, match="0 or more"):
        skip_first_batches(loader, -1)
