"""The directory of one run on NVMe, locked while any of its ranks lives.

::

    <nvme_path>/shardwise-swap/
        <run id>.lock               held (flock, shared) by every rank of the run
        <run id>/rank_0.optimizer
                 rank_0.parameters
                 rank_1.optimizer …

A lock dies with its process, however that ends. So a directory whose lock nobody holds is of a run that was killed, and
the next run under this path removes it, before it asks how much room there is. Nothing else is ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from shardwise.errors import ConfigError, StateError

_logger = logging.getLogger(__name__)

HOME = "shardwise-swap"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def new_run_id() -> str:
    """A name that no other run has: one rank makes it up and tells the others."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(6)}"


class RunDirectory:
    """Where one rank's files lie. Its files go with ``close``, at the interpreter's end, or at the next run's begin."""

    def __init__(self, nvme_path: str | Path, run_id: str, rank: int) -> None:
        """Create or join the run's directory, after removing what killed runs left there.

        Args:
            nvme_path: A directory, created if missing, that all ranks of a host may share with other runs and users.
            run_id: From `new_run_id`, the same on all ranks.
            rank: Global rank.

        Raises:
            ConfigError: The path cannot hold a run: it is a file, not writable, or on a filesystem without locks.
        """
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", run_id):
            raise StateError(f"The run id {run_id!r} is not a plain file name; take one from new_run_id().")
        self.rank = rank
        self.home = Path(nvme_path) / HOME
        self.path = self.home / run_id
        try:
            lock = self._join()
        except OSError as error:
            raise _unusable(nvme_path, error) from error
        self._leave = weakref.finalize(self, _leave, self.path, lock, rank, os.getpid())
        _remove_left_behind(self.home)

    def _join(self) -> int:
        """Take a share of the run's lock, making everything that is missing; its descriptor."""
        lock_path = _lock_path(self.path)
        while True:
            _make_home(self.home)
            try:
                lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # another run's end removed the home: make it anew
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if _is_still_at(lock_path, lock):
                    self.path.mkdir(mode=0o700, exist_ok=True)
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # somebody took it for a dead run's before we had locked it: once more

    def file(self, kind: str) -> Path:
        """Path of this rank's file for one kind of state; the file itself is the caller's to create."""
        return self.path / f"rank_{self.rank}.{kind}"

    def close(self) -> None:
        """Remove this rank's files, and the directory with the last rank of the run. Twice is fine."""
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _unusable(nvme_path: str | Path, error: OSError) -> ConfigError:
    path = str(nvme_path)
    if error.errno in _NO_LOCKS:
        return ConfigError(
            f"The filesystem of nvme_path {path!r} has no file locks ({error.strerror}), which keep runs apart. Choose "
            "a path on a local disk."
        )
    reason = "it is a file" if os.path.isfile(path) else error.strerror
    return ConfigError(
        f"nvme_path {path!r} cannot hold offloaded state: {reason}. It must be a directory, or be creatable as one, "
        "that this user may write to."
    )


def _make_home(home: Path) -> None:
    """Like /tmp: every user may add, nobody may remove what is another's."""
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        home.mkdir()
    except FileExistsError:
        if not home.is_dir():
            raise
    else:
        home.chmod(0o1777)


def _lock_path(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


def _is_still_at(path: Path, descriptor: int) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


@contextlib.contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Ranks that start together wait for the one that removes, and then see the room that it made."""
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # networks lock no directories; two removers do no harm
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_left_behind(home: Path) -> None:
    with _one_at_a_time(home):
        stuck = []
        for lock_path in sorted(home.glob("*.lock")):
            directory = lock_path.with_suffix("")
            try:
                _remove_if_dead(directory)
            except FileNotFoundError:
                continue  # its last rank has just removed it
            except OSError as error:
                stuck.append(f"{directory} ({error.strerror})")
        stuck += [
            f"{directory} (its lock file is gone)"
            for directory in sorted(home.iterdir())
            # In this order: a run that ends removes its directory first, so a lock that goes last tells nothing.
            if not _lock_path(directory).exists() and directory.is_dir()
        ]
    if stuck:
        _logger.warning("left by runs that have ended, and not to be removed from here: %s", ", ".join(stuck))


def _remove_if_dead(directory: Path) -> None:
    """Remove a run's directory and its lock if no process holds the lock; OSError where it is dead and stays."""
    lock_path = _lock_path(directory)
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except PermissionError:  # another user's; a local filesystem lets us ask all the same
        lock = os.open(lock_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # it lives
        if not _is_still_at(lock_path, lock):
            return  # the name is another run's by now
        if directory.exists():
            shutil.rmtree(directory)
        lock_path.unlink()
    finally:
        os.close(lock)


def _leave(path: Path, lock: int, rank: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # a fork of the rank, which has not ended
    with contextlib.suppress(OSError):  # what stays now is the next run's to remove
        for file in path.glob(f"rank_{rank}.*"):
            file.unlink(missing_ok=True)
    os.close(lock)
    with contextlib.suppress(OSError):
        _remove_if_dead(path)
    with contextlib.suppress(OSError):
        path.parent.rmdir()
