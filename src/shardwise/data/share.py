"""Which rank gets which samples: the arithmetic of shared batches, without torch and without any process.

A *round* is what all ranks take together in one step. It is made in one of two ways::

    dealt   batches of size B as they come, one a rank:  round = W batches of B samples
    split   one batch of size B, cut into W equal parts:  round = 1 batch of B samples, B/W a rank

The data seldom end with a round. The last, incomplete one is left out (``drop_last``), given out as it is (then ranks
get different numbers of samples, some perhaps none), or, if it shall be ``even``, filled up with samples from the
beginning, going around as often as it takes. So an even share has the same number of equally long batches on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import TypeVar

from shardwise.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """The part of one rank: ``rank`` of ``world``, and what becomes of an incomplete round."""

    rank: int
    world: int
    drop_last: bool = False
    even: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"process_index is {self.rank}, expected 0 to num_processes - 1 = {self.world - 1}.")

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's equal part of ``items``."""
        size = len(items) // self.world
        return items[size * self.rank : size * (self.rank + 1)]


def part_size(batch_size: int, world: int) -> int:
    """Samples a rank of a batch that is split between ``world`` ranks.

    Raises:
        ConfigError: it cannot be cut into equal parts.
    """
    if batch_size % world:
        raise ConfigError(
            f"split_batches cuts each batch into one part a process, but batch_size {batch_size} is not a multiple of "
            f"{world} processes. Choose a batch_size that is, or leave split_batches out."
        )
    return batch_size // world


def deal_batches(batches: Iterable[Sequence[T]], batch_size: int | None, share: Share) -> Iterator[Sequence[T]]:
    """One whole batch a rank and round.

    Batches may differ in length; the last round is complete if it has a batch for every rank, of which the last one is
    full. Without a ``batch_size`` every batch counts as full, and a round is filled up with whole batches.
    """
    first: list[Sequence[T]] = []
    current: list[Sequence[T]] = []
    for batch in batches:
        if len(current) == share.world:  # its last batch was short, but more follows: so it is not the last round
            yield current[share.rank]
            current = []
        current.append(batch)
        if len(first) < share.world:
            first.append(batch)
        if len(current) == share.world and _is_full(batch, batch_size):
            yield current[share.rank]
            current = []
    if not current or share.drop_last:
        return
    if share.even:
        yield _filled_round(current, first, batch_size, share.world)[share.rank]
    elif share.rank < len(current):
        yield current[share.rank]


def _is_full(batch: Sequence[T], batch_size: int | None) -> bool:
    return batch_size is None or len(batch) >= batch_size


def _filled_round(
    current: list[Sequence[T]], first: list[Sequence[T]], batch_size: int | None, world: int
) -> list[Sequence[T]]:
    if batch_size is None:
        return [*current, *islice(cycle(first), world - len(current))]
    spare = cycle(chain.from_iterable(first))
    missing: list[Sequence[T]] = [[]] * (world - len(current))
    return [[*batch, *islice(spare, max(0, batch_size - len(batch)))] for batch in [*current, *missing]]


def num_dealt(num_batches: int, share: Share) -> int:
    """How many batches ``deal_batches`` gives, of ``num_batches`` in all."""
    rounds, rest = divmod(num_batches, share.world)
    if share.drop_last or not rest:
        return rounds
    return rounds + 1 if share.even or share.rank < rest else rounds


def split_batches(batches: Iterable[Sequence[T]], batch_size: int, share: Share) -> Iterator[Sequence[T]]:
    """This rank's part of every batch.

    Raises:
        ConfigError: ``batch_size`` has no equal parts, or a batch is longer than it.
    """
    size = part_size(batch_size, share.world)
    first: Sequence[T] = ()
    for batch in batches:
        if len(batch) > batch_size:
            raise ConfigError(
                f"a batch of {len(batch)} samples came from a batch sampler whose batch_size says {batch_size}. "
                "split_batches needs batches of that size: correct the attribute, or leave split_batches out."
            )
        first = first or batch
        if len(batch) == batch_size:
            yield share.part(batch)
        elif share.drop_last:
            continue
        elif share.even:
            yield share.part([*batch, *islice(cycle(first), batch_size - len(batch))])
        elif len(batch) > size * share.rank:
            yield batch[size * share.rank : size * (share.rank + 1)]


def deal_samples(
    samples: Iterable[T], round_size: int, share: Share, first: Sequence[T] | None = None
) -> Iterator[tuple[Sequence[T], int]]:
    """This rank's part of every ``round_size`` samples, and how many samples the round truly had.

    All ranks read the same samples. ``first`` is the first round where the samples start in the middle.
    """
    iterator = iter(samples)
    while current := list(islice(iterator, round_size)):
        first = first or current
        size = len(current)
        if size < round_size:
            if share.drop_last:
                return
            current += islice(cycle(first), round_size - size)
        yield share.part(current), size


def mark_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, with whether it is the last one: known because the next one is fetched first."""
    iterator = iter(items)
    for current in iterator:
        for following in iterator:
            yield current, False
            current = following
        yield current, True
