"""Running the `shardwise` command as a user does, its output kept: in a process of its own, or quickly in this one."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from shardwise.commands.main import main

SHARDWISE = (sys.executable, "-m", "shardwise.commands.main")
FIXTURES = Path(__file__).parent / "fixtures"

# What the launcher decides by, and what an earlier launcher may have left around this test run.
_OWN_VARIABLES = (
    "OMP_NUM_THREADS",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "GLIBC_TUNABLES",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONSAFEPATH",
    "SHARDWISE_RUN",
    # Where default config files are looked for.
    "XDG_CONFIG_HOME",
    "XDG_CACHE_HOME",
    "HF_HOME",
)


def plain_environment(temporary: Path, **extra: str) -> dict[str, str]:
    """This process's environment less what the launcher decides by, with temporary files under `temporary`.

    The home directory is one that does not exist, so no default config of the tester's own has a say.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES}
    return kept | {"TMPDIR": str(temporary), "HOME": str(temporary / "no-home"), **extra}


def shardwise(
    *arguments: str, temporary: Path, cwd: Path | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs `shardwise ARGUMENTS` to its end; `extra` are environment variables."""
    return subprocess.run(
        [*SHARDWISE, *arguments],
        env=plain_environment(temporary, **extra),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def shardwise_here(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same within this process, without the seconds of torch's import; its environment is this process's."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(output),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["shardwise", *arguments])
        patch.chdir(cwd)
        main()
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess(arguments, ended.value.code, output.getvalue(), errors.getvalue())
