"""A run whose ranks are killed and started again has the losses and the weights of one that never was, bit for bit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.front.command import SHARDWISE, plain_environment
from tests.restarted import EPOCHS, NUM_SAMPLES, Kill, Settings, run
from tests.world.engine_runs import rank, world_size
from tests.worlds import WorldPool

ROOT = Path(__file__).parents[2]


def never_killed(settings: Settings) -> None:
    run(settings, rank(), world_size(), 0)


def said(directory: Path, of_rank: int, attempt: int) -> dict[str, str]:
    lines = (directory / f"said.{of_rank}.{attempt}").read_text().splitlines()
    return dict(line.split() for line in lines)


def launched(settings: Settings, size: int, temporary: Path, restarts: int) -> subprocess.CompletedProcess[str]:
    options = ["--cpu", "-n", str(size), "--num_cpu_threads_per_process", "1", "--max_restarts", str(restarts)]
    program = ["-m", "tests.restarted", str(settings.write(temporary / "settings.json"))]
    return subprocess.run(
        [*SHARDWISE, "launch", *options, *program],
        env=plain_environment(temporary, PYTHONPATH=os.environ.get("PYTHONPATH", "")),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def kills_of(size: int) -> list[Kill]:
    """One rank dies between two saves, another one in the middle of a save, the first again before anything new."""
    return [Kill(0, size - 1, 8), Kill(1, 0, 10, at_write=3), Kill(2, size - 1, 6)]


def assert_goes_on(worlds: WorldPool, tmp_path: Path, kills: list[Kill], size: int, told: dict[str, Any]) -> None:
    alone, killed, temporary = tmp_path / "alone", tmp_path / "killed", tmp_path / "temporary"
    for directory in (alone, killed, temporary):
        directory.mkdir()
    worlds[size].run(never_killed, Settings(str(alone), **told))
    done = launched(Settings(str(killed), **told, kills=kills), size, temporary, len(kills))

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("killed by SIGKILL") == len(kills), done.stderr
    for number in range(size):
        wanted = said(alone, number, 0)
        assert len(wanted) == EPOCHS * (NUM_SAMPLES // 3 // size + (told["front"] == "accelerator" and size == 3)) + 1
        attempts = [said(killed, number, attempt) for attempt in range(len(kills) + 1)]
        for attempt, found in enumerate(attempts):
            assert found.items() <= wanted.items(), f"rank {number}, attempt {attempt}"
        assert set().union(*attempts) == set(wanted)
        assert "1" in attempts[0] and not any("5" in found for found in attempts[1:]), "it began anew"


@pytest.mark.slow
def test_kills_under_the_launcher(worlds: WorldPool, tmp_path: Path) -> None:
    assert_goes_on(worlds, tmp_path, kills_of(2)[:2], 2, {"front": "accelerator", "stage": 3, "async_save": True})


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("front", ["accelerator", "engine"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("size", [2, 3])
def test_every_way_to_save(
    worlds: WorldPool, tmp_path: Path, size: int, stage: int, front: str, async_save: bool
) -> None:
    told = {"front": front, "stage": stage, "async_save": async_save}
    assert_goes_on(worlds, tmp_path, kills_of(size), size, told)
