"""Buckets, prefetch, persistence, overlap: settings of speed and memory, never of the result."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.references import GPT, MLP
from tests.world.engine_runs import STAGES, config_of, equals_reference
from tests.worlds import World

HUGE = 10**9

ZERO_SETTINGS: list[dict[str, Any]] = [
    {"stage3_prefetch_bucket_size": 0},
    {"stage3_prefetch_bucket_size": 1},
    {"stage3_prefetch_bucket_size": 30_000},
    {"stage3_prefetch_bucket_size": HUGE},
    {"stage3_max_live_parameters": 0},
    {"stage3_max_live_parameters": 15_000, "stage3_prefetch_bucket_size": HUGE},
    {"stage3_max_reuse_distance": 0},
    {"stage3_max_reuse_distance": 20_000},
    {"stage3_max_reuse_distance": HUGE},
    {"stage3_param_persistence_threshold": 100},
    {"stage3_param_persistence_threshold": 2_000},
    {"stage3_param_persistence_threshold": HUGE},
    {"stage3_param_persistence_threshold": 100, "stage3_max_reuse_distance": HUGE, "stage3_prefetch_bucket_size": HUGE},
    {"reduce_bucket_size": 1},
    {"reduce_bucket_size": 5_000},
    {"allgather_bucket_size": 1},
    {"allgather_bucket_size": 5_000},
    {"contiguous_gradients": False},
    {"reduce_scatter": False},
    {"allgather_partitions": False},
    {"sub_group_size": 777},
    {"sub_group_size": 20_000},
    {"overlap_comm": True},
    {"overlap_comm": False},
    {"zero_leaf_modules": ["GptBlock"]},
    {"leaf_module": {"classes": ["Attention"]}},
    {"leaf_module": {"names": ["blocks.1"]}},
]
OWN_SETTINGS: list[dict[str, Any]] = [
    {"unit_classes": ["Attention"]},
    {"unit_classes": ["Linear"]},
    {"unit_classes": ["GptBlock", "LayerNorm"]},
    {"check_collectives": True},
]


def name_of(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


@pytest.mark.parametrize("zero", ZERO_SETTINGS, ids=name_of)
def test_zero_settings(world2: World, zero: dict[str, Any]) -> None:
    # A bucket for every element takes as long as ten of the others.
    recipe = dataclasses.replace(GPT, accumulation=2, steps=1 if zero.get("reduce_bucket_size") == 1 else 2)
    for stage in STAGES[3:] if any(key.startswith("stage3") for key in zero) else STAGES:
        world2.run(equals_reference, recipe, config_of(stage, accumulation=2, zero=zero))


@pytest.mark.parametrize("own", OWN_SETTINGS, ids=name_of)
def test_own_settings(world2: World, own: dict[str, Any]) -> None:
    for stage in STAGES:
        world2.run(equals_reference, GPT, config_of(stage, shardwise=own))


@pytest.mark.parametrize(
    "zero", [ZERO_SETTINGS[3], ZERO_SETTINGS[8], ZERO_SETTINGS[10], ZERO_SETTINGS[14], ZERO_SETTINGS[20]], ids=name_of
)
def test_over_messages(world3: World, zero: dict[str, Any]) -> None:
    for stage in STAGES:
        world3.run(equals_reference, MLP, config_of(stage, zero=zero, shardwise={"transport": "process_group"}))
