"""The fear: a command that is slow to say how it is used, or that answers a mistake with a traceback."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.front.command import FIXTURES, shardwise

LIST_MODULES_AFTER = """
import atexit, sys
atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))
from shardwise.commands.main import main
sys.argv = ["shardwise", *sys.argv[1:]]
main()
"""


def test_help_shows_an_example_and_does_not_wait_for_torch() -> None:
    for command in ([], ["launch"], ["env"]):
        done = subprocess.run(
            [sys.executable, "-c", LIST_MODULES_AFTER, *command, "--help"], capture_output=True, text=True, check=True
        )
        assert "Example: shardwise" in done.stdout
        loaded = set(done.stderr.split())
        assert "shardwise.commands.main" in loaded
        assert not loaded & {"torch", "numpy", "transformers"}


def test_mistake_is_a_short_message_and_exit_code_2(tmp_path: Path) -> None:
    done = shardwise("launch", str(FIXTURES / "reprot.py"), temporary=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: No script ")
    assert "report.py" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []  # not even a run directory was made


def test_contradiction_is_a_mistake(tmp_path: Path) -> None:
    done = shardwise("launch", "--cpu", "--gpu", str(FIXTURES / "report.py"), temporary=tmp_path)
    assert done.returncode == 2
    assert "Both --cpu and --gpu" in done.stderr


def test_unknown_option_before_the_script_is_named(tmp_path: Path) -> None:
    done = shardwise("launch", "--num_procs", "2", str(FIXTURES / "report.py"), temporary=tmp_path)
    assert done.returncode == 2
    assert "--num_procs" in done.stderr


def test_dry_run_prints_the_command_and_starts_nothing(tmp_path: Path) -> None:
    script = str(FIXTURES / "report.py")
    done = shardwise("launch", "--dry-run", "--cpu", "--num-processes=3", script, "--a b", temporary=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"3 x {sys.executable} {script} '--a b'" in done.stdout
    assert re.search(r"^OMP_NUM_THREADS=\d+$", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_env_shows_the_versions(tmp_path: Path) -> None:
    done = shardwise("env", temporary=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("shardwise", "python", torch.__version__, "cores", "memory"):
        assert words in done.stdout
