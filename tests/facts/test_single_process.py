"""A process of its own has all of the front end's facts, and every operation between processes is nothing to do."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardwise import helpers, operations
from shardwise.config.run.file import flag_mentions
from shardwise.config.run.handover import pack
from shardwise.config.run.said import Asked
from shardwise.errors import ConfigError, StateError
from shardwise.launch.environment import RUN_VARIABLE
from shardwise.logging import get_logger
from shardwise.process import DistributedType, PartialState
from shardwise.random import set_seed, synchronize_rng_states


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_DEBUG_MODE"):
        monkeypatch.delenv(name, raising=False)
    root_level = logging.root.level
    PartialState._reset_state()
    yield
    PartialState._reset_state()
    logging.root.setLevel(root_level)


def test_the_facts_in_five_lines() -> None:
    state = PartialState(cpu=True)
    assert repr(state) == (
        "Distributed environment: NO\nNum processes: 1\nProcess index: 0\nLocal process index: 0\nDevice: cpu\n"
    )
    state.distributed_type = DistributedType.DEEPSPEED
    state.backend = "nccl"
    assert repr(PartialState()).startswith("Distributed environment: DEEPSPEED  Backend: nccl\n")
    assert f"{DistributedType.DEEPSPEED}" == "DEEPSPEED"


def test_every_state_is_the_same_one() -> None:
    first, second = PartialState(cpu=True), PartialState()
    first.debug = True
    assert second.debug is True
    PartialState._reset_state()
    with pytest.raises(StateError, match="PartialState was reset"):
        _ = first.device
    assert getattr(first, "device", None) is None
    assert not hasattr(PartialState(cpu=True), "no_such_thing")


def test_another_device_is_refused_later() -> None:
    state = PartialState(cpu=True)
    state.device = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="cuda:0 already"):
        PartialState(cpu=True)


def test_debug_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "asked.json").write_text(pack(Asked().stronger(flag_mentions({"debug": True}))))
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path / "asked.json"))
    assert PartialState(cpu=True).debug is True


def test_nothing_waits_and_everything_runs_here() -> None:
    state = PartialState(cpu=True)
    state.wait_for_everyone()
    with state.main_process_first(), state.local_main_process_first():
        pass
    assert state.is_main_process and state.is_local_main_process and state.is_last_process
    assert not state.use_distributed
    assert state.on_main_process(lambda x: x + 1)(1) == 2
    assert state.on_process(process_index=0)(lambda: "ran")() == "ran"
    with pytest.raises(ConfigError, match=r"process_index=1.*1 processes"):
        state.on_process(process_index=1)
    with state.split_between_processes([1, 2]) as mine:
        assert mine == [1, 2]
    state.destroy_process_group()


def test_operations_give_back_what_they_got() -> None:
    PartialState(cpu=True)
    data: dict[str, Any] = {"x": torch.ones(2), "n": 1}
    assert operations.gather(data) is data
    assert operations.broadcast(data) is data
    assert operations.pad_across_processes(data) is data
    assert operations.gather_object([1]) == [1]
    assert operations.broadcast_object_list([1]) == [1]
    assert operations.copy_tensor_to_devices(data["x"]).tolist() == [1, 1]
    mean = operations.reduce(torch.tensor([2, 4]), scale=0.5)
    assert mean.tolist() == [1, 2] and mean.dtype == torch.float32


def test_one_seed_gives_the_same_numbers_everywhere() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    set_seed(2**40 + 3)  # larger than NumPy takes
    first = draw()
    set_seed(2**40 + 3)
    assert draw() == first
    generator = torch.Generator()
    synchronize_rng_states(["torch", "generator"], generator)
    with pytest.raises(ConfigError, match="torch, cuda, generator"):
        synchronize_rng_states(["xla"])
    with pytest.raises(ConfigError, match=r"torch\.Generator"):
        synchronize_rng_states(["generator"])


def test_the_logger_speaks_once_and_names_the_line_of_the_script(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("shardwise.test", log_level="info")
    with pytest.raises(StateError, match="in_order"):
        logger.info("too early", in_order=True)
    logger.info("before the state: %d", 1)
    PartialState(cpu=True)
    logger.info("in order", in_order=True)
    for _ in range(2):
        logger.warning_once("once %s", "only")
    logger.debug("not at this level")
    assert [record.getMessage() for record in caplog.records] == ["before the state: 1", "in order", "once only"]
    assert {record.filename for record in caplog.records} == {"test_single_process.py"}


def test_another_rank_is_silent_before_the_state_is_made(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    logger = get_logger("shardwise.test")
    logger.warning("the first process says this")
    logger.warning("every process says this", main_process_only=False)
    assert [record.getMessage() for record in caplog.records] == ["every process says this"]


def test_a_progress_bar_is_shown_on_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not helpers.tqdm(range(1)).disable
    monkeypatch.setenv("RANK", "1")
    assert helpers.tqdm(range(1)).disable
    assert not helpers.tqdm(range(1), main_process_only=False).disable
