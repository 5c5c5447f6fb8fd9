"""A save that is killed, at any call to the system, leaves the checkpoint before it whole, or is whole itself.

A data file is written by several threads: a call of theirs is met while others are under way.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shardwise.checkpoint import direct_file, shard_file
from shardwise.checkpoint.claim import CLAIM
from shardwise.checkpoint.manifest import complete_tags
from shardwise.errors import CheckpointError
from tests.one_rank import read, write

CALLS = ("open", "write", "pwrite", "ftruncate", "fsync", "replace", "unlink", "mkdir", "rmdir", "close")


REAL_PWRITE = os.pwrite


class Calls:
    """Counts calls to the system; `at(k)` is what happens in the place of the k-th."""

    def __init__(self, at: int, happens: Callable[[str, tuple[Any, ...]], None]) -> None:
        self.count = 0
        self._at = at
        self._happens = happens
        self._lock = threading.Lock()

    def meet(self, name: str, arguments: tuple[Any, ...]) -> None:
        with self._lock:
            self.count += 1
            is_the_one = self.count == self._at
        if is_the_one:
            self._happens(name, arguments)


@contextmanager
def watched(calls: Calls) -> Iterator[None]:
    """Every one of CALLS, and the reservation of a file's room, goes by `calls` first."""

    def wrapped(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.meet(name, arguments)
            return real(*arguments, **keywords)

        monkeypatch.setattr(module, name, call)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in CALLS:
            wrapped(os, name)
        wrapped(direct_file, "reserve")
        yield


def count_calls(action: Callable[[], None]) -> int:
    calls = Calls(0, lambda *_: None)
    with watched(calls):
        action()
    return calls.count


def die(name: str, arguments: tuple[Any, ...]) -> None:
    """Half of a write gets out, of other calls nothing; then the process is killed."""
    if name == "write":
        view = memoryview(arguments[1])
        REAL_PWRITE(arguments[0], view[: len(view) // 2], os.lseek(arguments[0], 0, os.SEEK_CUR))
    elif name == "pwrite":
        view = memoryview(arguments[1])
        REAL_PWRITE(arguments[0], view[: len(view) // 8192 * 4096], arguments[2])  # whole pages: it may be direct
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(call: int, action: Callable[[], None]) -> bool:
    """Do `action` in a child that is killed at its `call`-th call; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            with watched(Calls(call, die)):
                action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many writes a file."""
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr("shardwise.checkpoint.manifest.BLOCK_BYTES", 1 << 13)


@pytest.mark.parametrize("tag", ["first", "second"])
def test_a_kill_at_every_call(tmp_path: Path, tag: str) -> None:
    """`first` replaces the checkpoint that is there, `second` comes beside it; two are kept."""
    write(tmp_path, "zeroth", 0)
    write(tmp_path, "first", 1)
    total = count_calls(lambda: write(tmp_path, "first", 1))
    assert total > 30, "the calls are not the ones that a save makes"
    last, kills, seen = 1, 0, set()
    for call in range(1, total + 40):
        new = last + 1
        if not killed_at(call, lambda new=new: write(tmp_path, tag, new, keep_last=2)):
            break
        kills += 1
        found = read(tmp_path)
        assert found in (last, new), f"killed at call {call}: {found} after {last}"
        seen.add(found == new)
        for complete in complete_tags(tmp_path):
            read(tmp_path, complete)
        last = found
    assert kills >= total - 5
    assert seen == {True, False}, "a kill came neither before nor after the commit"
    write(tmp_path, tag, 1000, keep_last=2)
    assert read(tmp_path) == 1000
    assert len(complete_tags(tmp_path)) == 2
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) == 2 * 2 + 3, f"leftovers: {left}"  # latest, the script, the claim


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_every_call(tmp_path: Path, fault: int) -> None:
    """The save says so; what was complete still is, and the next save works."""
    write(tmp_path, "first", 1)

    def fail(name: str, arguments: tuple[Any, ...]) -> None:
        raise OSError(fault, os.strerror(fault))

    total = count_calls(lambda: write(tmp_path, "first", 1))
    last = 1
    for call in range(1, total + 1):
        try:
            with watched(Calls(call, fail)):
                write(tmp_path, "second" if call % 2 else "first", call + 1)
        except CheckpointError as error:
            assert os.strerror(fault) in str(error)
        except OSError:
            pass  # it came while the save was cleaning up after itself
        found = read(tmp_path)
        assert found in (last, call + 1)
        last = found
    write(tmp_path, "second", 5000)
    assert read(tmp_path) == 5000


def test_a_directory_that_was_never_completed_is_none(tmp_path: Path) -> None:
    write(tmp_path, "whole", 1)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "rank_00000.0123abcd.safetensors").write_bytes(b"half")
    assert read(tmp_path) == 1
    with pytest.raises(CheckpointError, match=r"'half'.*never completed.*whole"):
        read(tmp_path, "half")
    (tmp_path / "latest").write_text("gone")
    with pytest.raises(CheckpointError, match=r"`latest` names.*whole"):
        read(tmp_path)


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path, f"save{number}", number, keep_last=3)
        (tmp_path / f"save{number}" / "notes.txt").write_text("the script's own")
    assert complete_tags(tmp_path) == ["save3", "save4", "save5"]
    assert [p.name for p in sorted((tmp_path / "save0").iterdir())] == ["notes.txt"], "a file of others was removed"
    assert [read(tmp_path, tag) for tag in complete_tags(tmp_path)] == [3, 4, 5]


def test_the_disk_has_everything_before_a_name_is_given(tmp_path: Path) -> None:
    """What a power cut may lose is never what a name says is there: each rename comes after all writes are synced."""
    unsynced: set[int] = set()
    renames = 0

    class Noted(Calls):
        def meet(self, name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal renames
            if name in ("write", "pwrite", "ftruncate"):
                if Path(os.readlink(f"/proc/self/fd/{arguments[0]}")).name != CLAIM:  # a lock ends with its process
                    unsynced.add(arguments[0])
            elif name == "fsync":
                unsynced.discard(arguments[0])
            elif name == "close":
                assert arguments[0] not in unsynced, "a file was closed before the disk had it"
            elif name == "replace":
                assert not unsynced, "a rename before the sync"
                renames += 1

    with watched(Noted(0, lambda *_: None)):
        write(tmp_path, "first", 1)
    assert renames == 3  # the script, the manifest, latest
