"""How bytes travel changes no bit: messages of the process group and shared memory give the same run."""

from __future__ import annotations

import dataclasses

import pytest

from tests.grids import grid
from tests.references import GPT
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World


@pytest.mark.parametrize(
    ("world", "transport", "stage"),
    grid(
        [2, 3, 4],
        ["process_group", "shared_memory"],
        STAGES,
        quick=[
            *((3, "process_group", stage) for stage in STAGES),
            *((2, "shared_memory", stage) for stage in STAGES),
            (4, "process_group", 3),
            (4, "shared_memory", 2),
            (4, "shared_memory", 3),
        ],
    ),
    indirect=["world"],
)
def test_a_transport_changes_no_bit(world: World, transport: str, stage: int) -> None:
    recipe = dataclasses.replace(GPT, accumulation=2, steps=2)
    settings = {"shardwise": {"transport": transport, "reduction": "ordered"}}
    world.run(equals_reference, recipe, config_of(stage, accumulation=2, **settings))


@pytest.mark.parametrize("stage", STAGES)
def test_every_collective_checked_changes_no_bit(world2: World, stage: int) -> None:
    for transport in ("process_group", "shared_memory"):
        settings = {"shardwise": {"transport": transport, "check_collectives": True}}
        world2.run(equals_reference, GPT, config_of(stage, **settings))


@pytest.mark.parametrize("stage", STAGES)
def test_the_backends_own_reduction_is_exact_for_two_ranks(world2: World, stage: int) -> None:
    """A sum of two terms has one order only."""
    settings = {"shardwise": {"transport": "process_group", "reduction": "native"}}
    world2.run(equals_reference, GPT, config_of(stage, **settings))
