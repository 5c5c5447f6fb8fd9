"""No sample is lost or given twice but to fill up the end, and ranks that shall be even are."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.data.share import Share, deal_batches, deal_samples, mark_last, num_dealt, split_batches
from shardwise.errors import ConfigError

sizes = st.integers(1, 7)
worlds = st.integers(1, 5)
amounts = st.integers(0, 60)


def batches_of(samples: int, batch_size: int, drop_last: bool) -> list[list[int]]:
    """As torch's BatchSampler makes them."""
    batches = [list(range(samples))[at : at + batch_size] for at in range(0, samples, batch_size)]
    return [batch for batch in batches if len(batch) == batch_size or not drop_last]


def shares(world: int, drop_last: bool, even: bool) -> list[Share]:
    return [Share(rank, world, drop_last, even) for rank in range(world)]


def dealt(samples: int, batch_size: int, world: int, drop_last: bool, even: bool, split: bool) -> list[list[list[int]]]:
    """What each rank gets. Split batches are ``world`` times as large, so that a rank's share is the same."""
    whole = batches_of(samples, batch_size * world if split else batch_size, drop_last)
    if split:
        parts = [split_batches(whole, batch_size * world, share) for share in shares(world, drop_last, even)]
    else:
        parts = [deal_batches(whole, batch_size, share) for share in shares(world, drop_last, even)]
    return [[list(batch) for batch in part] for part in parts]


@given(amounts, sizes, worlds, st.booleans())
def test_even_shares_are_equal_and_cover_all(samples: int, batch_size: int, world: int, split: bool) -> None:
    ranks = dealt(samples, batch_size, world, False, True, split)
    assert {len(batch) for rank in ranks for batch in rank} <= {batch_size}
    assert len({len(rank) for rank in ranks}) == 1
    rounds = [list(chain.from_iterable(batches)) for batches in zip(*ranks, strict=True)]
    in_order = list(chain.from_iterable(rounds))
    assert in_order[:samples] == list(range(samples))
    filling = in_order[samples:]
    assert len(filling) < batch_size * world
    assert filling == [i % min(samples, batch_size * world) for i in range(len(filling))], "from the beginning"


@given(amounts, sizes, worlds, st.booleans())
def test_uneven_shares_are_exactly_the_samples(samples: int, batch_size: int, world: int, split: bool) -> None:
    ranks = dealt(samples, batch_size, world, False, False, split)
    assert sorted(chain.from_iterable(chain.from_iterable(ranks))) == list(range(samples))
    lengths = [len(rank) for rank in ranks]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


@given(amounts, sizes, worlds, st.booleans())
def test_dropping_the_end_drops_less_than_a_round(samples: int, batch_size: int, world: int, split: bool) -> None:
    ranks = dealt(samples, batch_size, world, True, True, split)
    kept = samples - samples % (batch_size * world)
    assert sorted(chain.from_iterable(chain.from_iterable(ranks))) == list(range(kept))
    assert {len(rank) for rank in ranks} == {kept // (batch_size * world)}


@given(amounts, sizes, worlds, st.booleans(), st.booleans())
def test_the_length_that_is_told_is_the_length(
    samples: int, batch_size: int, world: int, drop_last: bool, even: bool
) -> None:
    whole = batches_of(samples, batch_size, drop_last)
    for share in shares(world, drop_last, even):
        assert num_dealt(len(whole), share) == len(list(deal_batches(whole, batch_size, share)))


@given(st.lists(st.integers(1, 4), max_size=12), worlds)
def test_batches_of_any_length_are_all_given(lengths: list[int], world: int) -> None:
    batches = [[f"{number}.{i}" for i in range(length)] for number, length in enumerate(lengths)]
    for batch_size in (None, 4):
        ranks = [list(deal_batches(batches, batch_size, share)) for share in shares(world, False, True)]
        assert len({len(rank) for rank in ranks}) == 1
        in_order = [batch for batches in zip(*ranks, strict=True) for batch in batches]
        complete = len(batches) // world * world
        untouched = len(batches) if batch_size is None else max(0, complete - world)
        assert in_order[:untouched] == batches[:untouched]
        assert set(chain.from_iterable(batches)) == set(chain.from_iterable(in_order))


@given(amounts, sizes, worlds, st.booleans())
def test_samples_are_dealt_like_split_batches(samples: int, batch_size: int, world: int, drop_last: bool) -> None:
    whole = batches_of(samples, batch_size * world, drop_last)
    for share in shares(world, drop_last, True):
        rounds = list(deal_samples(range(samples), batch_size * world, share))
        assert [list(part) for part, _ in rounds] == list(split_batches(whole, batch_size * world, share))
        assert [size for _, size in rounds] == [len(batch) for batch in whole]


@given(st.integers(1, 60), sizes, worlds, st.integers(1, 5))
def test_samples_from_the_middle_end_alike(samples: int, batch_size: int, world: int, rounds_done: int) -> None:
    size = batch_size * world
    for share in shares(world, False, True):
        whole = list(deal_samples(range(samples), size, share))
        first = list(range(samples))[:size]
        rest = deal_samples(range(rounds_done * size, samples), size, share, first)
        assert list(rest) == whole[rounds_done:]


@given(st.lists(st.integers()))
def test_the_last_one_is_marked(items: list[int]) -> None:
    marked = list(mark_last(iter(items)))
    assert [item for item, _ in marked] == items
    assert [is_last for _, is_last in marked] == [False] * (len(items) - 1) + [True] * bool(items)


def test_a_complete_round_does_not_wait_for_the_next_batch() -> None:
    asked = []
    source = (asked.append(number) or [number] for number in range(9))
    next(deal_batches(source, 1, Share(0, 3)))
    assert asked == [0, 1, 2]


def test_what_cannot_be_shared_is_said() -> None:
    with pytest.raises(ConfigError, match="batch_size 6 is not a multiple of 4 processes"):
        list(split_batches([[0]], 6, Share(0, 4)))
    with pytest.raises(ConfigError, match="a batch of 5 samples came from a batch sampler whose batch_size says 4"):
        list(split_batches([[0, 1, 2, 3, 4]], 4, Share(0, 2)))
    with pytest.raises(ConfigError, match="process_index is 2, expected 0 to num_processes - 1 = 1"):
        Share(2, 2)
