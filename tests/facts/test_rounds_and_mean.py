"""Buckets lose nothing, and the mean adds in rank order and divides once: bit for bit the naive loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.comm.base import mean_into, rounds

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""No clock decides: the machine may be busy with other things."""

NUMEL = 1021

# -- rounds


@untimed
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 60))
def test_rounds_cover_every_slice_once_in_order(lengths: list[int], limit: int) -> None:
    cuts = [0, *itertools.accumulate(lengths)]
    cut = rounds(cuts, limit)
    for rank, (begin, end) in enumerate(itertools.pairwise(cuts)):
        spans = [of_ranks[rank] for of_ranks in cut]
        assert all(begin <= span.begin <= span.end <= end for span in spans)
        assert [at for span in spans for at in range(span.begin, span.end)] == list(range(begin, end))
    for of_ranks in cut:
        assert len(of_ranks) == len(lengths)
        # A bucket smaller than the world still takes one element a rank, or nothing would ever travel.
        assert 0 < sum(span.numel for span in of_ranks) <= max(limit, len(lengths))


def test_a_buffer_that_fits_travels_at_once() -> None:
    (of_ranks,) = rounds([0, 10, 20], 20)
    assert [(span.begin, span.end) for span in of_ranks] == [(0, 10), (10, 20)]
    assert len(rounds([0, 10, 20], 19)) == 2


def test_nothing_travels_in_no_round() -> None:
    assert rounds([0, 0, 0], 100) == []


# -- mean


def naive_mean(shard: torch.Tensor, addends: list[torch.Tensor], accumulate: bool) -> torch.Tensor:
    """The specification: widen, add one after the other, multiply by 1/W once, then add to what is there."""
    total = addends[0].to(shard.dtype)
    for addend in addends[1:]:
        total = total + addend.to(shard.dtype)
    mean = total * (1.0 / len(addends)) if len(addends) > 1 else total
    return shard + mean if accumulate else mean


def random(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Magnitudes over many binary orders, so that another order of adding, or another rounding, shows."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(NUMEL, generator=generator) * torch.logspace(-3, 3, NUMEL)).to(dtype)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("dtype", "addend_dtype"), DTYPES, ids=str)
def test_the_mean_is_the_naive_loop(dtype: torch.dtype, addend_dtype: torch.dtype, size: int, accumulate: bool) -> None:
    shard = random(99, dtype)
    addends = [random(rank, addend_dtype) for rank in range(size)]
    copies = [addend.clone() for addend in addends]
    expected = naive_mean(shard, addends, accumulate)
    mean_into(shard, addends, accumulate)
    assert torch.equal(shard, expected)
    assert all(torch.equal(addend, copy) for addend, copy in zip(addends, copies, strict=True)), "an addend was changed"


@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize(("size", "position"), [(w, r) for w in (1, 2, 3, 4) for r in range(w)])
def test_an_addend_may_be_the_shard_itself(size: int, position: int, accumulate: bool) -> None:
    """A rank's own slice of the gradient buffer becomes the reduced gradient in place."""
    addends = [random(rank, torch.float32) for rank in range(size)]
    shard = addends[position]
    expected = naive_mean(shard.clone(), [addend.clone() for addend in addends], accumulate)
    mean_into(shard, addends, accumulate)
    assert torch.equal(shard, expected)


def test_the_order_is_that_of_the_ranks() -> None:
    """1e8 + 1 loses the 1 in fp32: only the sum from the front gives 0 here."""
    shard = torch.empty(1)
    mean_into(shard, [torch.tensor([value]) for value in (1.0, 1e8, -1e8, 0.0)], accumulate=False)
    assert shard.item() == 0.0
    mean_into(shard, [torch.tensor([value]) for value in (1e8, -1e8, 1.0, 0.0)], accumulate=False)
    assert shard.item() == 0.25


def test_an_empty_slice_has_a_mean() -> None:
    shard = torch.empty(0)
    mean_into(shard, [torch.empty(0), torch.empty(0), torch.empty(0)], accumulate=True)
    assert shard.numel() == 0
