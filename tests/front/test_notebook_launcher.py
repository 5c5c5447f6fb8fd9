"""The fear: a notebook starts ranks that do not find each other, hang, or lose the exception."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwise.accelerator import Accelerator
from shardwise.errors import ConfigError, StateError
from shardwise.launchers import debug_launcher, notebook_launcher
from tests.accelerators import fresh_state
from tests.front.command import FIXTURES, plain_environment


def run(case: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FIXTURES / "from_python.py"), case, str(directory)],
        env=plain_environment(directory),
        capture_output=True,
        text=True,
    )


def seen_by(name: str, directory: Path) -> list[Any]:
    return [json.loads(file.read_text()) for file in sorted(directory.glob(f"{name}_*.json"))]


def test_ranks_meet_and_know_what_was_asked_for(tmp_path: Path) -> None:
    done = run("all", tmp_path)
    assert done.returncode == 0, done.stderr
    parent = int(done.stdout.split()[-1])
    for name, precision in (("several", "bf16"), ("c10d", "no"), ("debug", "no")):
        seen = seen_by(name, tmp_path)
        assert [(rank["ranks"], rank["local rank"]) for rank in seen] == [([0, 1], 0), ([0, 1], 1)], name
        assert {rank["precision"] for rank in seen} == {precision}, name
        assert len({parent, *(rank["pid"] for rank in seen)}) == 3, name
    assert {rank["device"] for rank in seen_by("debug", tmp_path)} == {"cpu"}
    (alone,) = seen_by("one", tmp_path)
    assert (alone["ranks"], alone["precision"], alone["pid"]) == ([0], "bf16", parent)


def test_the_exception_of_the_first_rank_comes_back(tmp_path: Path) -> None:
    done = run("failing", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2 failed (exit code 1: ValueError: rank one has had enough)" in done.stdout
    assert 'raise ValueError("rank one has had enough")' in done.stdout, "with its traceback"


def test_ranks_are_started_again_when_one_has_failed(tmp_path: Path) -> None:
    done = run("twice", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"attempts_{rank}").read_text() for rank in (0, 1)] == ["xx", "xx"]


def nothing() -> None:
    raise AssertionError("nothing shall be started")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_processes": 0}, "num_processes=0.*at least 1"),
        ({"num_processes": 2, "num_nodes": 2, "node_rank": 2}, "node_rank=2.*num_nodes=2"),
        ({"num_processes": 2, "mixed_precision": "half"}, "mixed_precision"),
        ({"num_processes": 2, "use_port": "http"}, "use_port='http'"),
        ({"num_processes": 2, "use_port": 0, "num_nodes": 2}, "use_port=0"),
        ({"num_processes": 2, "use_port": 70000}, "use_port=70000"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with fresh_state(), pytest.raises(ConfigError, match=words):
        notebook_launcher(nothing, **arguments)


def test_a_port_in_use_is_named() -> None:
    with fresh_state(), socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be used.*0 for a free one"):
            notebook_launcher(nothing, num_processes=2, use_port=port)


def test_a_process_that_cannot_be_forked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_state():
        Accelerator(cpu=True)
        with pytest.raises(StateError, match="inside the function"):
            notebook_launcher(nothing, num_processes=2)
    for launcher in (notebook_launcher, debug_launcher):
        with fresh_state(), monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            with pytest.raises(StateError, match="CUDA has been initialised"):
                launcher(nothing, num_processes=2)
        with fresh_state(), monkeypatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: True)
            with pytest.raises(StateError, match="is a rank itself"):
                launcher(nothing, num_processes=2)
