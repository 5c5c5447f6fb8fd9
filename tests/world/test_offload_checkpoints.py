"""A checkpoint knows nothing of where states rested: any place, world and stage reads what any other wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import Whole, begin, differences, join, optimizer_parts, train_steps
from tests.grids import grid
from tests.world.engine_runs import config_of
from tests.world.offload_runs import host_memory_apart, zero_block
from tests.worlds import World, WorldPool

NARROW = {"bf16": {"enabled": True}}
ROWS = [
    (3, "none", "none"),
    (3, "nvme", "nvme"),
    (3, "cpu", "nvme"),
    (3, "nvme", "none"),
    (2, "none", "nvme"),
    (1, "none", "cpu"),
]
Parts = list[tuple[str, str, int, torch.Tensor]]


def configs(files: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{stage}-{parameter}-{optimizer}": config_of(
            stage, zero=zero_block(parameter, optimizer, Path(files)), **settings
        )
        for stage, parameter, optimizer in ROWS
    }


def save(directory: str, settings: dict[str, Any]) -> dict[str, tuple[Whole, Parts]]:
    saved = {}
    with host_memory_apart():
        for row, config in configs(f"{directory}/files", settings).items():
            with begin(config) as engine:
                train_steps(engine, 0, 3)  # the third micro-batch of two is the middle of a step
                engine.save_checkpoint(f"{directory}/{row}")
                saved[row] = engine.state_dict(), optimizer_parts(engine)
    return saved


def load(directories: list[str], files: str, settings: dict[str, Any]) -> list[tuple[Whole, Parts]]:
    found = []
    with host_memory_apart():
        for config in configs(files, settings).values():
            with begin(config) as engine:
                train_steps(engine, 0, 1)
                for directory in directories:
                    engine.load_checkpoint(directory)
                    found.append((engine.state_dict(), optimizer_parts(engine)))
    return found


@pytest.mark.parametrize(("size", "settings"), grid([1, 3], [{}, NARROW], quick=[(1, {}), (3, NARROW)]))
def test_every_place_reads_every_other(worlds: WorldPool, size: int, settings: dict[str, Any], tmp_path: Path) -> None:
    of_ranks = worlds[2].run(save, str(tmp_path), settings)
    directories = [f"{tmp_path}/{row}" for row in of_ranks[0]]
    wanted = [(of_ranks[0][row][0], join([of_rank[row][1] for of_rank in of_ranks])) for row in of_ranks[0]]
    loaded = worlds[size].run(load, directories, f"{tmp_path}/files", settings)
    for number, found in enumerate(loaded[0]):
        weights, moments = wanted[number % len(directories)]
        assert not differences(found[0], weights), number
        assert not differences(join([of_rank[number][1] for of_rank in loaded]), moments), number


def goes_on_alike(directory: str, config: dict[str, Any]) -> None:
    with host_memory_apart():
        with begin(config) as engine:
            train_steps(engine, 0, 3)
            engine.save_checkpoint(directory)
            wanted = train_steps(engine, 3, 8), engine.state_dict()
        with begin(config) as engine:
            train_steps(engine, 0, 1)
            engine.load_checkpoint(directory)
            found = train_steps(engine, 3, 8), engine.state_dict()
    assert all(torch.equal(one, other) for one, other in zip(wanted[0], found[0], strict=True))
    assert not differences(wanted[1], found[1])


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("settings", [{}, NARROW], ids=["fp32", "bf16"])
def test_training_goes_on_in_the_middle_of_a_step(world: World, settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(3, zero=zero_block("nvme", "nvme", tmp_path), accumulation=2, gradient_clipping=0.5, **settings)
    world.run(goes_on_alike, str(tmp_path / "saved"), config)


def saves_beside_training(directory: str, config: dict[str, Any]) -> None:
    with begin(config) as engine:
        train_steps(engine, 0, 2)
        wanted = engine.state_dict()
        engine.save_checkpoint(directory, async_save=True)
        train_steps(engine, 2, 4)
        engine.wait_for_checkpoint()
        engine.load_checkpoint(directory)
        assert not differences(engine.state_dict(), wanted)


def test_a_save_beside_training_keeps_what_was(world2: World, tmp_path: Path) -> None:
    config = config_of(3, zero=zero_block("nvme", "nvme", tmp_path / "files"))
    world2.run(saves_beside_training, str(tmp_path / "saved"), config)
