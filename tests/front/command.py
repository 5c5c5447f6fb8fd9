"""Running the `shardwise` command as a user does: a process of its own, its output kept."""

import os
import subprocess
import sys
from pathlib import Path

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
)


def plain_environment(temporary: Path, **extra: str) -> dict[str, str]:
    """This process's environment less what the launcher decides by, with temporary files under `temporary`."""
    kept = {name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES}
    return kept | {"TMPDIR": str(temporary), **extra}


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
