"""The fear: a run that is started again hides why, leaves processes of the attempt before, or never ends."""

from __future__ import annotations

import json
from pathlib import Path

import psutil

from tests.front.command import FIXTURES, shardwise

SCRIPT = str(FIXTURES / "fail_again.py")


def test_each_failure_is_shown_and_nothing_is_left(tmp_path: Path) -> None:
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    out.mkdir()
    temporary.mkdir()
    done = shardwise("launch", "--cpu", "-n", "2", "--max_restarts", "2", SCRIPT, str(out), temporary=temporary)

    assert done.returncode == 1, done.stderr
    told = [line for line in done.stderr.splitlines() if "failed (" in line or "anew" in line or "had enough" in line]
    assert [line.strip("─ ") for line in told if "raise" not in line] == [
        "rank 1 of 2 failed (killed by SIGKILL)",
        "Every rank starts anew (1 of 2).",
        "rank 1 of 2 failed (exit code 1)",
        "RuntimeError: attempt 1 has had enough",
        "Every rank starts anew (2 of 2).",
        "rank 1 of 2 failed (exit code 1)",
        "RuntimeError: attempt 2 has had enough",
        "Every rank was started anew 2 time(s): --max_restarts allows no more.",
    ], done.stderr
    left = {path.name: json.loads(path.read_text()) for path in out.glob("*.left")}
    assert left == {f"{attempt}.{rank}.left": [] for attempt in (1, 2) for rank in (0, 1)}
    pids = [pid for path in out.glob("*.json") for pid in json.loads(path.read_text())]
    assert len(pids) == 2 * 2 + 4
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert list(temporary.iterdir()) == []
