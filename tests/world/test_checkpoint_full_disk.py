"""A file system that fills up in the middle of a save: all ranks are told, and what was complete still is."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardwise.checkpoint.manifest import complete_tags
from shardwise.checkpoint.save import Background, Place, save
from shardwise.errors import CheckpointError
from tests.linked_processes import Job, Star
from tests.shared_saves import KEPT, SIZE, content_of, left_in, many_calls, read

__all__ = ["many_calls"]

DISK_BYTES, SAVE_BYTES, ROUNDS = 4 << 20, 1 << 20, 24
SEED = time.time_ns() % 10**6  # printed; another one each time
pytestmark = pytest.mark.usefixtures("many_calls")


@dataclass(frozen=True)
class SmallDisk:
    """A directory with little room: on a file system of its own, or, where that cannot be, by a limit on files."""

    path: Path
    is_mounted: bool

    @property
    def _filler(self) -> Path:
        return self.path.parent / "filler" if not self.is_mounted else self.path / "filler"

    def leave(self, num_bytes: int) -> None:
        """So much room is left."""
        self._filler.unlink(missing_ok=True)
        if self.is_mounted:
            status = os.statvfs(self.path)
            size = status.f_bavail * status.f_frsize - num_bytes
            with self._filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, size))

    def limit(self, num_bytes: int) -> None:
        """In a rank: what takes the place of a full disk where none can be mounted."""
        if not self.is_mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes // 2, resource.RLIM_INFINITY))

    def free(self) -> None:
        """All of its room is left."""
        self._filler.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mounting = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)], capture_output=True, text=True
        )
        refused = mounting.stderr if mounting.returncode else ""
    except FileNotFoundError:
        refused = "no command mount"
    if refused:
        print(f"no file system of its own ({refused.strip()}): files are limited by RLIMIT_FSIZE instead")
    try:
        yield SmallDisk(path, not refused)
    finally:
        if not refused:
            subprocess.run(["umount", "-l", str(path)], check=True)


def save_once(disk: SmallDisk, number: int, room: int | None, async_save: bool) -> Callable[..., None]:
    """Every rank says what it was told."""

    def work(star: Star, say: Callable[[bytes], None]) -> None:
        if room is not None:
            disk.limit(room)
        background = Background()
        place = Place(disk.path / "saves", f"tag{number % 3}", keep_last=KEPT)
        try:
            if async_save:
                background.start(place, content_of(number, star.rank), star)
                background.finish(star)
            else:
                save(place, content_of(number, star.rank), star, background.claims)
        except CheckpointError as error:
            say(str(error).encode())

    return work


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_no_room_at_any_moment(disk: SmallDisk, async_save: bool) -> None:
    print(f"seed {SEED}")
    draw, newest, failed = random.Random(SEED), 0, 0
    directory = disk.path / "saves"
    for number in range(1, ROUNDS + 1):
        room = draw.randrange(int(1.3 * SAVE_BYTES)) if number % 8 else None
        disk.leave(room) if room is not None else disk.free()
        job = Job(SIZE, save_once(disk, number, room, async_save))
        told = []
        while (word := job.hear()) is not None:
            told.append(word.decode())
        assert job.end() == [0] * SIZE
        found = read(directory) if directory.exists() else 0
        assert len(told) in (0, SIZE), f"some ranks were told, some were not: {told}"
        if told:
            failed += 1
            assert found in (newest, number)  # a rename may have been the last that there was room for
            assert all("No space left" in word or "too large" in word or "took nothing more" in word for word in told)
        else:
            assert found == number
            if room is None:
                assert not [path for path in left_in(directory) if path.name != "filler"]
        newest = found
        for tag in complete_tags(directory):
            read(directory, tag)
    assert 3 < failed < ROUNDS - 3, f"{failed} of {ROUNDS} saves had no room"
    with suppress(FileNotFoundError):
        disk.free()
