"""One run at a time writes to a directory: two that live at once would remove each other's files and mix their saves.

The claim is a lock of the system on a small file, so it ends with its process, however that ends. Where a file system
has no locks, nothing is claimed and nothing is refused.

A machine that is frozen keeps its locks while the launcher has given it up and the run goes on without it. A later
attempt of the same run therefore puts a new file in the place of the locked one; the process that holds the old one
finds that out before it completes a checkpoint, should it ever go on.
"""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from shardwise.attempt import Attempt
from shardwise.checkpoint.plain_file import open_plain
from shardwise.errors import CheckpointError

CLAIM = ".claimed"
_MAX_NAME_BYTES = 300


class Claims:
    """The directories that this process has claimed, until ``release``.

    Args:
        attempt: the start of the run that this process belongs to, if that is known.
    """

    def __init__(self, attempt: Attempt | None = None) -> None:
        self._attempt = attempt
        self._descriptors: dict[Path, int] = {}

    def take(self, directory: Path) -> bool:
        """Claim ``directory``, if this was not done before; the same process may claim it any number of times.

        Returns:
            Whether this process is known to be the only one that saves there, and has not done so before.

        Raises:
            CheckpointError: a process that still lives has claimed it.
            OSError: the directory cannot be written to.
        """
        if directory in self._descriptors:
            return False
        try:
            # Never by way of a link: what it leads to would be overwritten.
            descriptor = open_plain(directory / CLAIM, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        except PermissionError:
            return False  # another user's file: nothing to lock; whether one may write there the save will see
        holder = os.pread(descriptor, _MAX_NAME_BYTES, 0)
        words = f"process {os.getpid()} on {socket.gethostname()}"
        myself = (words if self._attempt is None else f"{words}, {self._attempt}").encode()
        try:
            is_locked = _lock(descriptor)
            if is_locked and holder != myself:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, myself)
        except BlockingIOError:
            os.close(descriptor)
            if self._attempt is not None and self._attempt.follows(Attempt.from_text(_text(holder))):
                self._descriptors[directory] = _put_in_place(directory, myself)
                return True
            raise CheckpointError(
                f"another run that still lives writes its checkpoints to {directory} ({_text(holder)}): they would be "
                "mixed. Give each run a directory of its own, or end that run."
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        self._descriptors[directory] = descriptor
        return is_locked and holder != myself

    def check(self, directory: Path) -> None:
        """Raise CheckpointError if ``directory`` was claimed by this process, and a later attempt has it now."""
        descriptor = self._descriptors.get(directory)
        if descriptor is None:
            return
        with suppress(FileNotFoundError):  # somebody has removed it, which gives it to nobody
            if not os.path.samestat(os.fstat(descriptor), os.lstat(directory / CLAIM)):
                raise CheckpointError(
                    f"this process was given up, and its run saves to {directory} without it: the checkpoint is not "
                    "completed. Look at what has stopped this machine."
                )

    def release(self) -> None:
        """Let others have them."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            with suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def _put_in_place(directory: Path, myself: bytes) -> int:
    """A new claim, locked before anybody can see it, instead of one that another process holds."""
    new = directory / f"{CLAIM}.{os.getpid()}"
    new.unlink(missing_ok=True)
    descriptor = open_plain(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
    try:
        os.write(descriptor, myself)
        _lock(descriptor)
        new.replace(directory / CLAIM)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _text(holder: bytes) -> str:
    return holder.decode(errors="replace") or "an unknown process"


def _lock(descriptor: int) -> bool:
    """Lock the file for this process; False where its file system has no locks."""
    try:
        # A record lock, which forks (the workers of loaders) do not inherit: they may live on for seconds.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the system may say either
        raise BlockingIOError from error
    except OSError:
        return False
    return True
