"""Where states rest changes no bit: device, host memory and files give equal losses, norms and weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.references import GPT, WIDE, Recipe, assert_same
from tests.world.engine_runs import Config, config_of, train_with_engine
from tests.world.offload_runs import PAIRS, host_memory_apart, zero_block
from tests.worlds import World

STEPS = 20
ACCUMULATED = dataclasses.replace(WIDE, steps=STEPS, accumulation=2)
TIED = dataclasses.replace(GPT, steps=6)


def offload_changes_nothing(recipe: Recipe, plain: Config, offloaded: Config) -> None:
    expected = train_with_engine(recipe, plain)
    with host_memory_apart():
        found = train_with_engine(recipe, offloaded)
    assert_same(found, expected, "offloaded against not")
    assert found.norms == expected.norms


def both(directory: Path, pair: tuple[str, str], stage: int = 3, **settings: object) -> tuple[Config, Config]:
    zero = zero_block(*pair, directory)
    return config_of(stage, **settings), config_of(stage, zero=zero, **settings)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_accumulation_and_clipping_in_fp32(world: World, pair: tuple[str, str], tmp_path: Path) -> None:
    plain, offloaded = both(tmp_path, pair, accumulation=2, gradient_clipping=0.5)
    world.run(offload_changes_nothing, ACCUMULATED, plain, offloaded)
    assert not list(tmp_path.glob("*/*")), "files were left behind"


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("optimizer", ["cpu", "nvme"])
def test_whole_parameters(world: World, stage: int, optimizer: str, tmp_path: Path) -> None:
    plain, offloaded = both(tmp_path, ("none", optimizer), stage, accumulation=2, gradient_clipping=0.5)
    world.run(offload_changes_nothing, dataclasses.replace(TIED, accumulation=2), plain, offloaded)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_sixteen_bits(world: World, precision: str, pair: tuple[str, str], tmp_path: Path) -> None:
    plain, offloaded = both(tmp_path, pair, gradient_clipping=0.5, **{precision: {"enabled": True}})
    world.run(offload_changes_nothing, TIED, plain, offloaded)


def fused(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_fused_steps(world: World, tmp_path: Path) -> None:
    plain, offloaded = both(tmp_path, ("nvme", "nvme"))
    world.run(offload_changes_nothing, dataclasses.replace(WIDE, steps=6, optimizer=fused), plain, offloaded)
