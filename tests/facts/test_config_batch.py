"""The batch triple: any sufficient part of it gives the whole, anything else names the nearest values that fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config import BatchSizes, load_config
from shardwise.config.batch import resolve_batch
from shardwise.errors import ConfigError

sizes = st.integers(1, 60)


@pytest.mark.parametrize(
    ("given_sizes", "expected"),
    [
        ((24, 2, 3), (24, 2, 3)),
        ((24, 2, None), (24, 2, 3)),
        ((24, None, 3), (24, 2, 3)),
        ((None, 2, 3), (24, 2, 3)),
        ((24, None, None), (24, 6, 1)),
        ((None, 6, None), (24, 6, 1)),
    ],
    ids=str,
)
def test_each_row_of_the_table_at_four_ranks(given_sizes, expected):
    assert resolve_batch(*given_sizes, 4) == BatchSizes(*expected)


def test_the_config_resolves_its_own_sizes():
    config = load_config({"train_batch_size": 8, "gradient_accumulation_steps": 2})
    assert config.resolve_batch(2) == BatchSizes(8, 2, 2)


@pytest.mark.parametrize("accumulation", [None, 4])
def test_neither_batch_nor_micro_batch_is_refused(accumulation):
    with pytest.raises(ConfigError, match="neither train_batch_size nor train_micro_batch_size_per_gpu"):
        resolve_batch(None, None, accumulation, 2)


@pytest.mark.parametrize(
    ("given_sizes", "world", "words"),
    [
        ((10, None, None), 4, "must be a multiple of gradient_accumulation_steps (1) x ranks (4) = 4"),
        ((10, None, None), 4, "Nearest values that work: 8 or 12."),
        ((3, None, None), 4, "Nearest values that work: 4."),
        ((10, 3, None), 2, "must be a multiple of train_micro_batch_size_per_gpu (3) x ranks (2) = 6"),
        ((10, 3, None), 2, "Nearest values that work: 6 or 12."),
        ((24, 2, 4), 4, "Set train_batch_size to 32, or gradient_accumulation_steps to 3; or leave"),
        ((24, 3, 2), 2, "or gradient_accumulation_steps to 4, or train_micro_batch_size_per_gpu to 6; or leave"),
    ],
    ids=str,
)
def test_a_rest_of_the_division_names_what_would_fit(given_sizes, world, words):
    with pytest.raises(ConfigError) as caught:
        resolve_batch(*given_sizes, world)
    assert words in str(caught.value)


@given(sizes, sizes, sizes)
def test_every_sufficient_part_of_a_triple_gives_the_triple(micro, steps, world):
    whole = BatchSizes(micro * steps * world, micro, steps)
    assert resolve_batch(whole.train_batch_size, micro, steps, world) == whole
    assert resolve_batch(whole.train_batch_size, micro, None, world) == whole
    assert resolve_batch(whole.train_batch_size, None, steps, world) == whole
    assert resolve_batch(None, micro, steps, world) == whole


@given(st.none() | sizes, st.none() | sizes, st.none() | sizes, sizes)
def test_a_result_is_consistent_and_keeps_what_was_given(batch, micro, steps, world):
    try:
        result = resolve_batch(batch, micro, steps, world)
    except ConfigError:
        return
    assert result.train_batch_size == (
        result.train_micro_batch_size_per_gpu * result.gradient_accumulation_steps * world
    )
    assert batch in (None, result.train_batch_size)
    assert micro in (None, result.train_micro_batch_size_per_gpu)
    assert steps in (None, result.gradient_accumulation_steps)
