"""A save beside training holds the moment of the call; saves never mix, and a failure is told by the next call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.checkpoint import shard_file
from shardwise.checkpoint.manifest import complete_tags
from shardwise.checkpoint.save import _Save
from shardwise.errors import CheckpointError
from shardwise.zero.access import safe_set_full_optimizer_state
from shardwise.zero.state_readers import StateReaders
from tests.checkpoints import begin, optimizer_parts, train_steps
from tests.world.engine_runs import STAGES, config_of, rank
from tests.world.offload_runs import host_memory_apart, zero_block
from tests.worlds import World


class Gate:
    """Holds up what is written beside training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self._write = os.pwrite
        monkeypatch.setattr(os, "pwrite", self._held_up)

    def _held_up(self, descriptor: int, data: Any, offset: int) -> int:
        assert self._open.wait(30)
        return self._write(descriptor, data, offset)

    def open(self) -> None:
        self._open.set()


class LastMoment:
    """Copies nothing beside training before somebody waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.somebody_waits = threading.Event()
        self._complete, self._wait = _Save._complete_copy, StateReaders.wait
        monkeypatch.setattr(_Save, "_complete_copy", lambda saving: self._complete_late(saving))
        monkeypatch.setattr(StateReaders, "wait", lambda readers: self._wait_for(readers))

    def _complete_late(self, saving: _Save) -> None:
        assert self.somebody_waits.wait(30), "nobody waits for the copy"
        self._complete(saving)

    def _wait_for(self, readers: StateReaders) -> None:
        if readers._ends:
            self.somebody_waits.set()
        self._wait(readers)


def saves_beside_training(stage: int, directory: str) -> None:
    with pytest.MonkeyPatch.context() as small_blocks:
        # So that not all of the small model fits into the first block, which is filled before it is written.
        small_blocks.setattr(shard_file, "BLOCK_BYTES", 1 << 12)
        small_blocks.setattr("shardwise.checkpoint.manifest.BLOCK_BYTES", 1 << 12)
        save_and_load(stage, directory)


def save_and_load(stage: int, directory: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, begin(config_of(stage)) as engine:
        gate, last_moment = Gate(monkeypatch), LastMoment(monkeypatch)
        train_steps(engine, 0, 2)
        engine.save_checkpoint(directory, "first", {"number": 1}, async_save=True)
        assert not last_moment.somebody_waits.is_set()
        losses = train_steps(engine, 2, 4)  # while nothing of the checkpoint is on the disk
        assert complete_tags(Path(directory)) == []
        gate.open()
        engine.save_checkpoint(directory, "second", {"number": 2}, async_save=True)
        assert complete_tags(Path(directory))[:1] == ["first"], "the second save did not wait"
        engine.wait_for_checkpoint()
        assert complete_tags(Path(directory)) == ["first", "second"]
        assert engine.memory_report().checkpoint_bytes == engine._background.kept_bytes > 0
    assert engine._background.kept_bytes == 0
    with begin(config_of(stage)) as engine:
        _, state = engine.load_checkpoint(directory, "first")
        assert state == {"number": 1}
        assert all(map(torch.equal, train_steps(engine, 2, 4), losses))
        assert engine.load_checkpoint(directory)[1] == {"number": 2}


@pytest.mark.parametrize("stage", STAGES)
def test_the_moment_of_the_call(world2: World, stage: int, tmp_path: Path) -> None:
    world2.run(saves_beside_training, stage, str(tmp_path))


# -- what a script does by hand between the call and the next step, on one rank


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, LastMoment]]:
    """An engine of one rank that has made a step."""
    with begin(config_of(0), device="cpu") as engine:
        train_steps(engine, 0, 1)
        yield engine, LastMoment(monkeypatch)


@pytest.mark.parametrize("settings", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_states_in_host_memory(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They need no training that stops; what a load writes there would be torn as a step's would."""
    config = config_of(2, zero=zero_block("none", "cpu", tmp_path), **settings)
    with host_memory_apart(), begin(config, device="cpu") as engine:
        train_steps(engine, 0, 1)
        before = state_of(engine)
        last_moment = LastMoment(monkeypatch)
        engine.save_checkpoint(tmp_path, "moment", async_save=True)
        assert engine.memory_report().checkpoint_bytes > 0, "it was saved at once"
        assert not last_moment.somebody_waits.is_set()
        train_steps(engine, 1, 2)
        assert last_moment.somebody_waits.is_set()
        engine.wait_for_checkpoint()
        assert_loads(engine, tmp_path, before)


def state_of(engine: Any) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Weights and buffers, and the optimizer's state."""
    return engine.state_dict(), [value for _, _, _, value in optimizer_parts(engine)]


def assert_loads(engine: Any, directory: Path, wanted: tuple[dict[str, torch.Tensor], list[torch.Tensor]]) -> None:
    assert engine.load_checkpoint(directory)[0] is not None
    weights, states = state_of(engine)
    assert weights.keys() == wanted[0].keys() and len(states) == len(wanted[1])
    assert all(torch.equal(weights[name], wanted[0][name]) for name in weights)
    assert all(map(torch.equal, states, wanted[1]))


def set_weights(engine: Any) -> None:
    with torch.no_grad():
        for tensor in [*engine.module.parameters(), *engine.module.buffers()]:
            tensor.data.zero_()


def set_state(engine: Any) -> None:
    weight = engine.module.stem.weight
    safe_set_full_optimizer_state(weight, torch.zeros_like(weight), "exp_avg")


def step_unasked(engine: Any) -> None:
    """Not by way of the engine."""
    for parameter in engine.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine._optimizer.step()


def forget_state(engine: Any) -> None:
    engine._optimizer.state.clear()


@pytest.mark.parametrize(
    ("edit", "waits"), [(set_weights, False), (set_state, True), (step_unasked, True), (forget_state, False)]
)
def test_edits_after_the_call(
    alone: tuple[Any, LastMoment], edit: Callable[[Any], None], waits: bool, tmp_path: Path
) -> None:
    engine, last_moment = alone
    before = state_of(engine)
    engine.save_checkpoint(tmp_path, async_save=True)
    edit(engine)
    assert last_moment.somebody_waits.is_set() == waits
    last_moment.somebody_waits.set()
    engine.wait_for_checkpoint()
    assert_loads(engine, tmp_path, before)


def test_a_state_that_is_changed_by_hand_is_told(alone: tuple[Any, LastMoment], tmp_path: Path) -> None:
    """Nobody can wait who does not ask: the save fails, and what is complete stays."""
    engine, last_moment = alone
    before = state_of(engine)
    engine.save_checkpoint(tmp_path, "before")
    engine.save_checkpoint(tmp_path, "torn", async_save=True)
    for state in engine._optimizer.state.values():
        state["exp_avg"].mul_(0.5)
    last_moment.somebody_waits.set()
    with pytest.raises(CheckpointError, match=r"exp_avg.* changed by hand .* wait_for_checkpoint\(\) before"):
        engine.wait_for_checkpoint()
    assert complete_tags(tmp_path) == ["before"]
    assert_loads(engine, tmp_path, before)


def test_an_optimizer_is_left_as_it_was(tmp_path: Path) -> None:
    with begin(config_of(0), device="cpu") as engine:
        inner = engine._optimizer
        engine.save_checkpoint(tmp_path, async_save=True)
        assert len(inner._optimizer_step_pre_hooks) == 1
        engine.save_checkpoint(tmp_path, async_save=True)
        assert len(inner._optimizer_step_pre_hooks) == 1
    assert not inner._optimizer_step_pre_hooks


def closes_at_once(directory: str) -> None:
    with begin(config_of(2)) as engine:
        train_steps(engine, 0, 1)
        engine.save_checkpoint(directory, async_save=True)
    with begin(config_of(2)) as engine:  # rank 0 has committed when its engine was closed, and building meets
        assert engine.load_checkpoint(directory)[0] is not None


def test_the_end_of_the_engine_waits(world2: World, tmp_path: Path) -> None:
    world2.run(closes_at_once, str(tmp_path))


SCRIPT = """
import sys, torch, shardwise
engine, *_ = shardwise.initialize(model=torch.nn.Linear(999, 1001), config={"train_micro_batch_size_per_gpu": 1},
                                  device="cpu")
engine.save_checkpoint(sys.argv[1], "last", async_save=True)
"""


def test_a_script_that_ends_waits_for_its_last_checkpoint(tmp_path: Path) -> None:
    """Nothing is closed, and the interpreter takes no work for its own pools any more."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert complete_tags(tmp_path) == ["last"]


def disk_is_full(directory: str, async_save: bool) -> tuple[str, list[str]]:
    with begin(config_of(3)) as engine:
        engine.save_checkpoint(directory, "before")
        train_steps(engine, 0, 1)
        told = ""
        with pytest.MonkeyPatch.context() as monkeypatch:
            if rank() == 1:

                def full(*_: Any) -> int:
                    raise OSError(28, "No space left on device")

                monkeypatch.setattr(os, "pwrite", full)
                monkeypatch.setattr(os, "write", full)
            try:
                engine.save_checkpoint(directory, "after", async_save=async_save)
                monkeypatch_ends_after_the_thread(engine)
                engine.wait_for_checkpoint()
            except CheckpointError as error:
                told = str(error)
        train_steps(engine, 1, 2)
        path, _ = engine.load_checkpoint(directory)
        assert Path(path).name == "before"
        engine.save_checkpoint(directory, "after")
        return told, complete_tags(Path(directory))


def monkeypatch_ends_after_the_thread(engine: Any) -> None:
    thread = engine._background._thread
    if thread is not None:
        thread.join()


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_of_one_rank_is_told_on_all(world2: World, async_save: bool, tmp_path: Path) -> None:
    for told, complete in world2.run(disk_is_full, str(tmp_path), async_save):
        assert "rank 1" in told
        # A disk that takes nothing does not take the reason either: rank 0 learns beside training that there is one.
        assert ("took nothing more" if async_save else "No space left on device") in told
        assert complete == ["before", "after"]


# -- one rank is killed in the middle of a save


def dies(directory: str, at_write: int, async_save: bool) -> None:
    with begin(config_of(2)) as engine:
        engine.save_checkpoint(directory, "before")
        train_steps(engine, 0, 1)
        if rank() == 1:
            count = 0
            write = os.pwrite

            def killed(descriptor: int, data: Any, offset: int) -> int:
                nonlocal count
                count += 1
                if count == at_write:
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(descriptor, memoryview(data)[:1000], offset)

            os.pwrite = killed  # type: ignore[assignment]
        engine.save_checkpoint(directory, "after", async_save=async_save)
        train_steps(engine, 1, 3)


def load_latest(directory: str) -> str:
    with begin(config_of(3)) as engine:
        path, _ = engine.load_checkpoint(directory)
        engine.save_checkpoint(directory, "after")
        return Path(path).name


def test_one_rank_is_killed(own_world: Any, world2: World, tmp_path: Path) -> None:
    world = own_world(2, timeout_seconds=10.0)
    failures = world.run_expecting_errors(dies, str(tmp_path), 40, False)
    assert failures[0] is not None and failures[1] is not None
    assert failures[1].type_name == "ProcessDied"
    assert complete_tags(tmp_path) == ["before"]
    assert world2.run(load_latest, str(tmp_path)) == ["before", "before"]
    assert complete_tags(tmp_path) == ["before", "after"]
    files = {path.name.split(".")[1] for path in (tmp_path / "after").glob("rank_*")}
    assert len(files) == 1, "leftovers of the save that was killed"
