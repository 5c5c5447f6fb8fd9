"""Where states rest changes no bit: device, host memory and files give equal losses, norms and weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardwise.optim.json_optimizers import build_optimizer
from tests import models
from tests.grids import grid
from tests.references import GPT, MLP, WIDE, Recipe, assert_same
from tests.world.engine_runs import Config, config_of, train_with_engine
from tests.world.offload_runs import PAIRS, host_memory_apart, zero_block
from tests.world.test_unused_parameters import parts_unused_on_some_ranks, with_choice
from tests.worlds import World

TIED = dataclasses.replace(GPT, steps=6)


def offload_changes_nothing(recipe: Recipe, plain: Config, offloaded: dict[str, Config]) -> None:
    expected = train_with_engine(recipe, plain)
    for name, config in offloaded.items():
        with host_memory_apart():
            found = train_with_engine(recipe, config)
        assert_same(found, expected, f"{name} against nothing offloaded")
        assert found.norms == expected.norms, name


def compare(
    world: World, recipe: Recipe, directory: Path, pairs: list[tuple[str, str]], stage: int = 3, **settings: object
) -> None:
    configs = {"-".join(pair): config_of(stage, zero=zero_block(*pair, directory), **settings) for pair in pairs}
    world.run(offload_changes_nothing, recipe, config_of(stage, **settings), configs)
    assert not list(directory.glob("*/*")), "files were left behind"


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_accumulation_and_clipping_in_fp32(world: World, steps: int, tmp_path: Path) -> None:
    recipe = dataclasses.replace(WIDE, steps=steps, accumulation=2)
    compare(world, recipe, tmp_path, PAIRS, accumulation=2, gradient_clipping=0.5)


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", [1, 2])
def test_whole_parameters(world: World, stage: int, tmp_path: Path) -> None:
    recipe, pairs = dataclasses.replace(TIED, accumulation=2), [("none", "cpu"), ("none", "nvme")]
    compare(world, recipe, tmp_path, pairs, stage, accumulation=2, gradient_clipping=0.5)


@pytest.mark.parametrize(
    ("world", "precision"), grid([1, 2], ["bf16", "fp16"], quick=[(1, "fp16"), (2, "bf16")]), indirect=["world"]
)
def test_sixteen_bits(world: World, precision: str, tmp_path: Path) -> None:
    compare(world, TIED, tmp_path, PAIRS, gradient_clipping=0.5, **{precision: {"enabled": True}})


Optimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]


def fused(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)


def with_momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


def adagrad(model: torch.nn.Module) -> torch.optim.Optimizer:
    """It has state before its first step."""
    return torch.optim.Adagrad(model.parameters(), lr=1e-2, initial_accumulator_value=0.1)


def muon_and_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """It needs whole matrices."""
    return build_optimizer("Muon", {"lr": 1e-2}, list(model.parameters()), model)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("optimizer", [fused, with_momentum, adagrad], ids=["fused", "sgd", "adagrad"])
def test_other_steps(
    world: World, optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer], tmp_path: Path
) -> None:
    compare(world, dataclasses.replace(WIDE, steps=6, optimizer=optimizer), tmp_path, [("nvme", "nvme")])


def test_whole_matrices(world2: World, tmp_path: Path) -> None:
    recipe = dataclasses.replace(GPT, steps=4, optimizer=muon_and_adamw)
    compare(world2, recipe, tmp_path, [("none", "cpu"), ("none", "nvme")], stage=2)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_part_of_the_states(world: World, tmp_path: Path) -> None:
    """`ratio` and `max_in_cpu` leave whole units where they were."""
    zero = zero_block("nvme", "nvme", tmp_path, ratio=0.5)
    zero["offload_param"]["max_in_cpu"] = 200_000
    plain, offloaded = config_of(3), config_of(3, zero=zero)
    world.run(offload_changes_nothing, dataclasses.replace(WIDE, steps=4), plain, {"part": offloaded})


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_parameters_without_a_gradient(world: World, tmp_path: Path) -> None:
    """Runs are split where used and unused parameters meet, also those whose state is in a file."""
    recipe = dataclasses.replace(
        MLP, model=models.build_optional, batch=parts_unused_on_some_ranks, loss=with_choice, steps=4
    )
    # Where parameters are in files ranks gather by messages, for which all must run the same units.
    compare(world, recipe, tmp_path, [("none", "nvme"), ("nvme", "nvme")] if world.size == 1 else [("none", "nvme")])


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_frozen_parameters_and_recomputation(world: World, tmp_path: Path) -> None:
    compare(world, dataclasses.replace(MLP, model=models.build_lora), tmp_path, [("nvme", "nvme")])
    recomputed = functools.partial(models.build_gpt, checkpointing="non_reentrant")
    compare(world, dataclasses.replace(GPT, model=recomputed), tmp_path, [("nvme", "nvme")])
