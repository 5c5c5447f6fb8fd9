"""The references agree with each other, so that a difference from one of them is the engine's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.references import (
    GPT,
    MLP,
    WIDE,
    Recipe,
    Record,
    assert_near,
    assert_same,
    train_alone,
    train_with_ddp,
    train_with_fsdp2,
)
from tests.worlds import World


def compare_with_one_process(recipe: Recipe) -> None:
    record = train_with_ddp(recipe)
    assert_same(record, train_alone(recipe, dist.get_world_size())[dist.get_rank()], "ordered DDP")


def compare_fsdp2(recipe: Recipe, exact: bool) -> None:
    record = train_with_fsdp2(recipe)
    reference = train_alone(recipe, dist.get_world_size())[dist.get_rank()]
    if exact:
        assert_same(record, reference, "FSDP2")
    else:
        assert_near(record, reference, "FSDP2", rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize(
    "recipe",
    [dataclasses.replace(WIDE, steps=4), dataclasses.replace(MLP, accumulation=2), GPT],
    ids=["wide", "accumulation", "gpt"],
)
def test_ordered_ddp_equals_one_process(world: World, recipe: Recipe) -> None:
    world.run(compare_with_one_process, recipe)


def test_fsdp2_equals_one_process_where_a_sum_has_two_terms(world2: World) -> None:
    world2.run(compare_fsdp2, MLP, exact=True)


def test_fsdp2_is_near_one_process(world3: World) -> None:
    world3.run(compare_fsdp2, MLP, exact=False)


def test_the_cadences_differ_only_by_rounding() -> None:
    recipe = dataclasses.replace(MLP, accumulation=3)
    once, every = train_alone(recipe, 2, "once")[0], train_alone(recipe, 2, "every")[0]
    assert_near(once, every, "reducing once", rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError, match="differs"):
        assert_same(once, every, "reducing once")


def test_a_single_changed_bit_is_seen() -> None:
    weights = {"w": torch.ones(5)}
    changed = {"w": torch.nextafter(torch.ones(5), torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0]))}
    with pytest.raises(AssertionError, match="w: 1 of 5 elements"):
        assert_same(Record(weights=changed), Record(weights=weights), "this")
