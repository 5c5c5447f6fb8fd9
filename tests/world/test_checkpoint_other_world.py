"""Any world and stage reads what any other wrote: equal weights and moments, and training that goes on alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import CheckpointError
from tests.checkpoints import Whole, begin, differences, join, optimizer_parts, train_steps
from tests.grids import grid
from tests.models import build_mlp
from tests.optimizers import maker
from tests.references import adamw_in_two_groups
from tests.world.engine_runs import STAGES, config_of, open_engine
from tests.worlds import World, WorldPool

WORLDS = (1, 2, 3, 4)
NARROW = {"bf16": {"enabled": True}}
Parts = list[tuple[str, str, int, torch.Tensor]]


def save(directory: str, stages: tuple[int, ...], settings: dict[str, Any]) -> dict[int, tuple[Whole, Parts]]:
    """Train and save at each stage; whole weights and this rank's part of the optimizer's state."""
    saved = {}
    for stage in stages:
        with begin(config_of(stage, **settings)) as engine:
            train_steps(engine, 0, 3)
            engine.save_checkpoint(f"{directory}/{stage}")
            saved[stage] = engine.state_dict(), optimizer_parts(engine)
    return saved


def load(directories: list[str], stage: int, settings: dict[str, Any]) -> list[tuple[Whole, Parts]]:
    """Load one after the other into one engine."""
    found = []
    with begin(config_of(stage, **settings)) as engine:
        train_steps(engine, 0, 1)  # the first load has something to overwrite, as the later ones have
        for directory in directories:
            engine.load_checkpoint(directory)
            found.append((engine.state_dict(), optimizer_parts(engine)))
    return found


@pytest.fixture(scope="module")
def written(worlds: WorldPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Whole, Whole]]:
    """Checkpoints of every world and stage: directories, whole weights, whole state of the optimizer."""
    base, wanted = tmp_path_factory.mktemp("written"), {}
    for size in WORLDS:
        of_ranks = worlds[size].run(save, f"{base}/{size}", STAGES, {})
        for stage in STAGES:
            moments = join([of_rank[stage][1] for of_rank in of_ranks])
            wanted[f"{base}/{size}/{stage}"] = of_ranks[0][stage][0], moments
    return wanted


@pytest.mark.parametrize(
    ("world", "stage"), grid(WORLDS, STAGES, quick=[(1, 0), (2, 3), (3, 1), (3, 2), (4, 3)]), indirect=["world"]
)
def test_every_world_and_stage_reads_every_other(
    world: World, stage: int, written: dict[str, tuple[Whole, Whole]]
) -> None:
    found = world.run(load, list(written), stage, {})
    for number, (directory, (weights, moments)) in enumerate(written.items()):
        assert not differences(found[0][number][0], weights), directory
        assert not differences(join([of_rank[number][1] for of_rank in found]), moments), directory


def test_masters_of_narrow_parameters(worlds: WorldPool, tmp_path: Path) -> None:
    of_ranks = worlds[3].run(save, str(tmp_path), (2,), NARROW)
    moments = join([of_rank[2][1] for of_rank in of_ranks])
    for size, stage in [(1, 0), (2, 3), (4, 1)]:
        found = worlds[size].run(load, [f"{tmp_path}/2"], stage, NARROW)
        assert not differences(found[0][0][0], of_ranks[0][2][0])
        assert not differences(join([of_rank[0][1] for of_rank in found]), moments)


def save_and_go_on(directory: str, stage: int) -> tuple[list[torch.Tensor], Whole]:
    model = build_mlp()
    with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
        train_steps(engine, 0, 4)
        engine.save_checkpoint(directory)
        return train_steps(engine, 4, 8), engine.state_dict()


def load_and_go_on(directory: str, stage: int) -> tuple[list[torch.Tensor], Whole]:
    model = build_mlp()
    with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
        engine.load_checkpoint(directory)
        return train_steps(engine, 4, 8), engine.state_dict()


@pytest.mark.parametrize("before", STAGES)
def test_another_stage_goes_on_bit_for_bit(world3: World, before: int, tmp_path: Path) -> None:
    wanted = world3.run(save_and_go_on, str(tmp_path), before)
    for after in STAGES:
        for (losses, weights), (their_losses, their_weights) in zip(
            world3.run(load_and_go_on, str(tmp_path), after), wanted, strict=True
        ):
            assert all(map(torch.equal, losses, their_losses)), f"stage {before} to {after}"
            assert not differences(weights, their_weights), f"stage {before} to {after}"


def save_unused(directory: str) -> None:
    """Blocks beyond the first got no gradient in the first step: their step counts differ from now on."""
    model: Any = build_mlp()
    with open_engine(model, adamw_in_two_groups(model), config_of(2)) as engine:
        blocks = model.blocks
        model.blocks = blocks[:1]
        train_steps(engine, 0, 1)
        model.blocks = blocks
        train_steps(engine, 1, 3)
        engine.save_checkpoint(directory)


def step_counts(directory: str, stage: int) -> dict[str, float]:
    model = build_mlp()
    with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
        engine.load_checkpoint(directory)
        train_steps(engine, 3, 4)
        return {name: float(value) for kind, name, _, value in optimizer_parts(engine) if kind == "step of all"}


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_that_were_stepped_differently_often(worlds: WorldPool, stage: int, tmp_path: Path) -> None:
    worlds[2].run(save_unused, str(tmp_path))
    counts: dict[str, float] = {}
    for of_rank in worlds[3].run(step_counts, str(tmp_path), stage):
        counts |= of_rank
    assert counts["blocks.0.up.weight"] == 4
    assert counts["blocks.1.up.weight"] == 3
    assert counts["blocks.2.norm.weight"] == 3
    assert counts["head.bias"] == 4


def whole_matrices(directory: str, stage: int, writes: bool) -> Parts:
    model = build_mlp()
    with open_engine(model, maker("Adafactor", lr=1e-2)(model), config_of(stage)) as engine:
        if writes:
            train_steps(engine, 0, 3)
            engine.save_checkpoint(directory)
        else:
            engine.load_checkpoint(directory)
        return [part for part in optimizer_parts(engine) if "step" not in part[0]]


def test_optimizers_of_whole_matrices(worlds: WorldPool, tmp_path: Path) -> None:
    wanted = join(worlds[2].run(whole_matrices, str(tmp_path), 1, True))
    assert wanted
    for size, stage in [(1, 0), (3, 2), (4, 0)]:
        assert not differences(join(worlds[size].run(whole_matrices, str(tmp_path), stage, False)), wanted)


def refusals(directory: str) -> list[str]:
    """What a load of something else says; nothing is changed by it."""
    said = []
    model = build_mlp()
    with open_engine(model, adamw_in_two_groups(model), config_of(3)) as engine:
        before = engine.state_dict()
        try:
            engine.load_checkpoint(directory)
        except CheckpointError as error:
            said.append(str(error))
        assert not differences(engine.state_dict(), before)
    model = build_mlp()
    with open_engine(model, maker("Adagrad")(model), config_of(3)) as engine:
        try:
            engine.load_checkpoint(f"{directory}/mlp")
        except CheckpointError as error:
            said.append(str(error))
        engine.load_checkpoint(f"{directory}/mlp", load_optimizer_states=False)
    return said


def save_mlp(directory: str) -> None:
    model = build_mlp()
    with open_engine(model, adamw_in_two_groups(model), config_of(1)) as engine:
        train_steps(engine, 0, 1)
        engine.save_checkpoint(directory)
    with begin(config_of(1)) as other:
        other.save_checkpoint(directory.removesuffix("/mlp"))


def test_another_model_or_optimizer_is_refused(world2: World, tmp_path: Path) -> None:
    world2.run(save_mlp, f"{tmp_path}/mlp")
    for of_model, of_optimizer in world2.run(refusals, str(tmp_path)):
        assert "unexpected" in of_model and "'left.weight'" in of_model and "load_module_strict" in of_model
        assert "AdamW" in of_optimizer and "Adagrad" in of_optimizer and "load_optimizer_states" in of_optimizer
