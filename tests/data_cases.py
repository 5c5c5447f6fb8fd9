"""Loaders of every kind that shards differ by; bench/record_batches.py has the peer give out the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler


class Case(NamedTuple):
    """One loader, shared between ``world`` ranks."""

    kind: str
    samples: int
    batch_size: int
    world: int
    split: bool = False
    even: bool = True
    drop_last: bool = False
    epochs: int = 1

    @property
    def name(self) -> str:
        """Its key in the recorded file."""
        flags = "".join(letter for letter, on in zip("sed", (self.split, self.even, self.drop_last), strict=True) if on)
        return f"{self.kind} n{self.samples} b{self.batch_size} w{self.world} {flags}"


SHUFFLED = ("random", "own generator", "seedable", "replacement")


def _in_order() -> Iterator[Case]:
    for samples, batch_size, world in product((1, 3, 8, 11, 13), (1, 2, 4), (1, 2, 3)):
        for even, drop_last in ((True, False), (False, False), (True, True)):
            yield Case("map", samples, batch_size, world, False, even, drop_last)
            if batch_size % world == 0:
                yield Case("map", samples, batch_size, world, True, even, drop_last)


def _iterable() -> Iterator[Case]:
    for samples, batch_size, world, drop_last in product((1, 3, 8, 13), (1, 2, 4), (2, 3), (False, True)):
        yield Case("iterable", samples, batch_size, world, drop_last=drop_last)
        if batch_size % world == 0:
            yield Case("iterable", samples, batch_size, world, True, drop_last=drop_last)


def _special() -> Iterator[Case]:
    for kind, world in product(SHUFFLED, (1, 2)):
        yield Case(kind, 11, 2, world, epochs=3)
    for kind, world, even in product(("lists", "batches as samples"), (2, 3), (True, False)):
        yield Case(kind, 11, 2, world, False, even)
    yield Case("iterable with generator", 9, 2, 2, epochs=2)


CASES = [*_in_order(), *_iterable(), *_special()]

DISPATCHED = [
    Case(kind, samples, batch_size, world, split, True, drop_last)
    for world, kind, samples, batch_size, split, drop_last in product(
        (2, 3), ("map", "iterable"), (3, 8, 13), (2, 6), (False, True), (False, True)
    )
    if not (split and batch_size % world) and not (drop_last and samples < batch_size * (1 if split else world))
] + [Case("seedable", 11, 2, 2, epochs=3), Case("random", 11, 2, 2, epochs=2)]


class Numbers(IterableDataset[int]):
    """0 to n - 1."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.samples))


class ShuffledNumbers(Numbers):
    """0 to n - 1 in an order of its own generator."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.samples, generator=self.generator).tolist())


class Lists:
    """Batches of different lengths, and no word about them."""

    def __init__(self, samples: int) -> None:
        cuts = [0, 1, 3, 6, 7, samples]
        self.batches = [list(range(a, b)) for a, b in pairwise(cuts)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def plain_loader(case: Case, **options: Any) -> DataLoader[Any]:
    """The loader of a single process, with torch seeded."""
    torch.manual_seed(7)
    data: Any = list(range(case.samples))
    sized: dict[str, Any] = {"batch_size": case.batch_size, "drop_last": case.drop_last, **options}
    match case.kind:
        case "map":
            return DataLoader(data, **sized)
        case "random" | "seedable":
            return DataLoader(data, shuffle=True, **sized)
        case "own generator":
            return DataLoader(data, shuffle=True, generator=torch.Generator().manual_seed(3), **sized)
        case "replacement":
            return DataLoader(data, sampler=RandomSampler(data, replacement=True, num_samples=9), **sized)
        case "lists":
            return DataLoader(data, batch_sampler=Lists(case.samples), **options)  # type: ignore[arg-type]
        case "batches as samples":
            batches = BatchSampler(SequentialSampler(data), case.batch_size, case.drop_last)
            return DataLoader(torch.arange(case.samples), sampler=batches, batch_size=None, **options)  # type: ignore[arg-type]
        case "iterable":
            return DataLoader(Numbers(case.samples), **sized)
        case "iterable with generator":
            return DataLoader(ShuffledNumbers(case.samples), **sized)
    raise AssertionError(case.kind)


def arguments(case: Case) -> dict[str, Any]:
    """What `prepare_data_loader` is told, beside the rank and the device."""
    return {
        "num_processes": case.world,
        "split_batches": case.split,
        "even_batches": case.even,
        "use_seedable_sampler": case.kind == "seedable",
    }
