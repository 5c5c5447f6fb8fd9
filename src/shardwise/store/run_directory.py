"""The directory of one run on NVMe, locked while any of its ranks lives.

::

    <nvme_path>/shardwise-swap/
        <run id>.lock             held (flock, shared) by every rank of the run on this host
        <run id>/rank_0.optimizer
                 rank_0.parameters

A run that finds a directory whose lock nobody holds removes it: its run was killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import time
import weakref
from pathlib import Path

from shardwise.errors import ConfigError

_logger = logging.getLogger(__name__)

HOME = "shardwise-swap"


def new_run_id() -> str:
    """A name that no other run has; one rank makes it up, and tells the others."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(6)}"


class RunDirectory:
    """Where one rank's files lie. Removed by ``close``, at the interpreter's end, or by the next run."""

    def __init__(self, nvme_path: str | Path, run_id: str, rank: int) -> None:
        """Create or join the run's directory, after removing what killed runs left.

        Raises:
            ConfigError: The path cannot hold a run: a file, not writable, or on a filesystem without locks.
        """
        self.rank = rank
        self.home = Path(nvme_path) / HOME
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"nvme_path {str(nvme_path)!r} cannot hold offloaded state: {error.strerror}. It must be a directory "
                "that this user may write to, on a local disk."
            ) from error
        self.path = self.home / run_id
        self._lock = self._join(run_id)
        self._close = weakref.finalize(self, _leave, self.path, self._lock, rank, os.getpid())
        self._remove_left_behind()

    def file(self, kind: str) -> Path:
        """Path of this rank's file for one kind of state; it does not exist yet."""
        return self.path / f"rank_{self.rank}.{kind}"

    def _join(self, run_id: str) -> int:
        lock_path = self.home / f"{run_id}.lock"
        while True:
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_SH)
            try:
                if os.stat(lock_path).st_ino == os.fstat(lock).st_ino:
                    self.path.mkdir(mode=0o700, exist_ok=True)
                    return lock
            except FileNotFoundError:
                pass
            os.close(lock)  # it was removed as stale before we locked it

    def _remove_left_behind(self) -> None:
        for lock_path in self.home.glob("*.lock"):
            if lock_path.stem != self.path.name:
                _remove_if_stale(lock_path)

    def close(self) -> None:
        """Remove this rank's files, and the directory with the last rank. Twice is fine."""
        self._close()


def _remove_if_stale(lock_path: Path) -> None:
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
        lock_path.unlink(missing_ok=True)
    except OSError:
        pass
    finally:
        os.close(lock)


def _leave(path: Path, lock: int, rank: int, pid: int) -> None:
    if os.getpid() != pid:
        return
    for file in path.glob(f"rank_{rank}.*"):
        file.unlink(missing_ok=True)
    os.close(lock)
    _remove_if_stale(path.with_name(f"{path.name}.lock"))
