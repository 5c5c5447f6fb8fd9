"""The table of stages, and the bytes that each row leaves on a rank: exact integers, not about so many."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from shardwise.errors import ConfigError
from shardwise.layout import Layout, Slot, even_layout, whole_parameter_layout
from shardwise.zero.sharding import STAGES, Sharding, StateBytes, state_bytes, sum_bytes

WORLDS = range(1, 9)
NUMEL = 32 * 840  # a multiple of the alignment times every world of WORLDS: no padding anywhere
FP32, BF16 = 4, 2
ADAM_BYTES = 2 * FP32  # exp_avg and exp_avg_sq, each in the master's dtype

# Bytes a parameter with W ranks: (whole on every rank, divided by W), in the rows' order.
FP32_BYTES = ((16, 0), (8, 8), (4, 12), (0, 16))
NARROW_BYTES = ((18, 0), (6, 12), (2, 16), (0, 16))


def divisible(world: int) -> Layout:
    return even_layout([Slot("weight", (NUMEL // 7, 7), 0)], world)


def with_adam(layout: Layout, rank: int, stage: int, itemsize: int) -> int:
    """Bytes of all model states, the moments included: they are as long as the master."""
    sharding = STAGES[stage]
    stepped = layout.shard(rank).numel if sharding.optimizer else layout.numel
    held = state_bytes(layout, rank, sharding, itemsize, FP32, trainable=True, has_gradients=True)
    return held.total + ADAM_BYTES * stepped


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("itemsize", "table"), [(FP32, FP32_BYTES), (BF16, NARROW_BYTES)], ids=["fp32", "bf16"])
def test_adam_costs_what_the_formula_says(stage: int, itemsize: int, table: tuple[tuple[int, int], ...]) -> None:
    whole, divided = table[stage]
    for world in WORLDS:
        layout = divisible(world)
        assert layout.numel == NUMEL
        expected = (whole + Fraction(divided, world)) * NUMEL
        assert expected.denominator == 1
        for rank in range(world):
            assert with_adam(layout, rank, stage, itemsize) == expected


def test_each_state_has_its_own_bytes() -> None:
    layout = divisible(4)
    shard = NUMEL // 4
    rows = [
        [state_bytes(layout, 1, row, itemsize, FP32, trainable=True, has_gradients=True) for row in STAGES]
        for itemsize in (FP32, BF16)
    ]
    assert rows[0] == [
        StateBytes(4 * NUMEL, 4 * NUMEL, 0),
        StateBytes(4 * NUMEL, 4 * NUMEL, 0),
        StateBytes(4 * NUMEL, 4 * shard, 0),
        StateBytes(4 * shard, 4 * shard, 0),
    ]
    assert rows[1] == [
        StateBytes(2 * NUMEL, 4 * NUMEL, 4 * NUMEL),
        StateBytes(2 * NUMEL, 4 * NUMEL, 4 * shard),
        StateBytes(2 * NUMEL, 4 * shard, 4 * shard),
        StateBytes(0, 4 * shard, 4 * shard),  # the master alone rests
    ]


@pytest.mark.parametrize("stage", range(4))
def test_frozen_parameters_have_neither_gradient_nor_master(stage: int) -> None:
    layout = divisible(4)
    held = state_bytes(layout, 0, STAGES[stage], BF16, FP32, trainable=False, has_gradients=False)
    assert held == StateBytes(BF16 * (NUMEL // 4 if stage == 3 else NUMEL), 0, 0)


@pytest.mark.parametrize("stage", range(4))
def test_without_an_optimizer_there_are_no_gradients(stage: int) -> None:
    with_gradients, without = (
        state_bytes(divisible(2), 0, STAGES[stage], FP32, FP32, trainable=True, has_gradients=has)
        for has in (True, False)
    )
    assert without == StateBytes(with_gradients.parameters, 0, with_gradients.optimizer)


def test_uneven_shards_are_counted_rank_by_rank() -> None:
    slots = [Slot("large", (1021, 3), 0), Slot("small", (17,), 0)]
    layout = whole_parameter_layout(slots, [0, 0, 0])
    held = [state_bytes(layout, rank, STAGES[3], FP32, FP32, trainable=True, has_gradients=True) for rank in range(3)]
    assert [bytes_of.parameters for bytes_of in held] == [4 * 3072, 4 * 32, 0]
    assert sum_bytes(held) == StateBytes(4 * layout.numel, 4 * layout.numel, 0)


def test_the_sum_of_nothing_is_nothing() -> None:
    assert sum_bytes([]) == StateBytes(0, 0, 0)
    assert StateBytes(1, 2, 3).total == 6


# -- the rules of sense


@pytest.mark.parametrize(("optimizer", "gradient", "parameter"), [*itertools.product([False, True], repeat=3)])
def test_only_rows_that_make_sense_can_be_built(optimizer: bool, gradient: bool, parameter: bool) -> None:
    if optimizer >= gradient >= parameter:
        assert Sharding(optimizer, gradient, parameter) in STAGES
    else:
        with pytest.raises(ConfigError, match="makes no sense"):
            Sharding(optimizer, gradient, parameter)


def test_stages_shard_one_state_more_each() -> None:
    assert [row.optimizer + row.gradient + row.parameter for row in STAGES] == [0, 1, 2, 3]
    assert [row.reduces_every_backward for row in STAGES] == [False, False, True, True]
