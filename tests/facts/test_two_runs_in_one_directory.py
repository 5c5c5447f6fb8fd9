"""A second run that saves where another one lives would mix both: it is refused until the first has ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from shardwise.attempt import Attempt, attempt_of
from shardwise.checkpoint import claim
from shardwise.checkpoint.claim import Claims
from shardwise.checkpoint.manifest import complete_tags
from shardwise.checkpoint.save import Content, Place, _Save, save
from shardwise.errors import CheckpointError
from tests.one_rank import Alone, read, value_of


def save_number(directory: Path, tag: str, number: int, claims: Claims) -> None:
    save(Place(directory, tag), Content([], value_of(number), {"mine": torch.tensor([number])}), Alone(), claims)


@contextmanager
def another_run(directory: Path) -> Iterator[int]:
    """A process that has saved in `directory` and lives on; also with a fork of its own, as a loader has."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        claims = Claims()
        save_number(directory, "theirs", 1, claims)
        worker = os.fork()
        if worker:
            os.write(done, b"%d" % worker)
        signal.pause()
        os._exit(0)
    worker = int(os.read(ready, 20))
    try:
        yield child
    finally:
        for pid in (child, worker):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(done)


def test_a_run_that_lives_is_named(tmp_path: Path) -> None:
    claims = Claims()
    with another_run(tmp_path) as other:
        with pytest.raises(CheckpointError, match=rf"another run that still lives.*process {other} on"):
            save_number(tmp_path, "mine", 2, claims)
        with pytest.raises(CheckpointError, match="another run"):
            save_number(tmp_path, "theirs", 2, claims)
        assert complete_tags(tmp_path) == ["theirs"]
        save_number(tmp_path / "elsewhere", "mine", 3, claims)
        os.kill(other, signal.SIGKILL)
        os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)
        save_number(tmp_path, "mine", 2, claims)  # though a fork of that run lives
    assert complete_tags(tmp_path) == ["theirs", "mine"]


def in_a_fork(work: Callable[[], None]) -> bool:
    """Whether `work` was refused there."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except CheckpointError:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_claim_lasts_until_it_is_released(tmp_path: Path) -> None:
    claims = Claims()
    save_number(tmp_path, "mine", 1, claims)
    save_number(tmp_path, "mine", 2, claims)
    assert in_a_fork(lambda: save_number(tmp_path, "theirs", 3, Claims()))
    claims.release()
    assert not in_a_fork(lambda: save_number(tmp_path, "theirs", 3, Claims()))
    assert read(tmp_path) == 3


RUN = "0123456789abcdef" * 2


def test_a_later_attempt_takes_over_from_a_process_that_its_launcher_has_given_up(tmp_path: Path) -> None:
    first, second = Claims(Attempt(RUN, 0)), Claims(Attempt(RUN, 1))
    saving = _Save(Place(tmp_path, "old"), Content([], value_of(1), {"mine": torch.tensor([1])}), Alone(), first, None)
    assert in_a_fork(lambda: save_number(tmp_path, "new", 2, Claims()))
    assert in_a_fork(lambda: save_number(tmp_path, "new", 2, Claims(Attempt(RUN, 0))))
    assert in_a_fork(lambda: save_number(tmp_path, "new", 2, Claims(Attempt(RUN[::-1], 1))))
    assert complete_tags(tmp_path) == []
    files = [saving._write()]  # here it was stopped, and later goes on
    assert not in_a_fork(lambda: save_number(tmp_path, "new", 2, second))
    with pytest.raises(CheckpointError, match="this process was given up, and its run saves to"):
        saving._commit(files)
    assert complete_tags(tmp_path) == ["new"]
    assert read(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".claimed")) == [".claimed"]


def test_an_attempt_is_known_from_our_launchers_variables_alone() -> None:
    ours = {"TORCHELASTIC_RUN_ID": RUN, "TORCHELASTIC_RESTART_COUNT": "2"}
    found = attempt_of(ours)
    assert found == Attempt(RUN, 2) == Attempt.from_text(f"process 7 on alpha, {found}")
    assert attempt_of(ours | {"TORCHELASTIC_RUN_ID": "none"}) is None
    assert attempt_of({}) is None
    assert Attempt.from_text("process 7 on alpha") is None
    assert (
        not Attempt(RUN, 2).follows(found) and not Attempt(RUN, 1).follows(found) and not Attempt(RUN, 3).follows(None)
    )


def test_a_file_system_without_locks_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claim.fcntl, "lockf", no_locks)
    save_number(tmp_path, "mine", 1, Claims())
    assert not in_a_fork(lambda: save_number(tmp_path, "theirs", 2, Claims()))
