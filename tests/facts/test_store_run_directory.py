"""The fear: runs on one path that mix their files, and killed runs that fill the disk for ever."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardwise.errors import ConfigError, StateError
from shardwise.store.run_directory import HOME, RunDirectory, new_run_id

RANK = """
import sys, time
from shardwise.store.run_directory import RunDirectory
directory = RunDirectory(sys.argv[1], sys.argv[2], int(sys.argv[3]))
directory.file("optimizer").write_bytes(bytes(10_000))
print("ready", flush=True)
{then}
"""


@contextmanager
def rank_process(
    place: Path, run_id: str, rank: int, then: str = "time.sleep(600)", user: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A rank of its own process that holds a file."""
    command = [sys.executable, "-c", RANK.format(then=then), str(place), run_id, str(rank)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, user=user)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def names(place: Path) -> list[str]:
    """All files and directories under it."""
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def test_files_of_a_run_go_with_its_last_rank(tmp_path: Path) -> None:
    run_id = new_run_id()
    ranks = [RunDirectory(tmp_path, run_id, rank) for rank in range(3)]
    assert len({directory.file("optimizer") for directory in ranks}) == 3
    for directory in ranks:
        for kind in ("optimizer", "parameters"):
            directory.file(kind).write_text(kind)
    for left in range(2, -1, -1):
        ranks[left].close()
        ranks[left].close()
        assert sum(name.endswith(".optimizer") for name in names(tmp_path)) == left
    assert names(tmp_path) == []


def test_two_runs_on_one_path_do_not_see_each_other(tmp_path: Path) -> None:
    with rank_process(tmp_path, "first", 0), RunDirectory(tmp_path, "second", 0) as mine:
        mine.file("optimizer").write_text("mine")
        theirs = tmp_path / HOME / "first" / "rank_0.optimizer"
        assert theirs.stat().st_size == 10_000
        assert mine.file("optimizer") != theirs
        with RunDirectory(tmp_path, "third", 0):
            assert theirs.exists() and mine.file("optimizer").read_text() == "mine"


def test_killed_run_is_removed_by_the_next_one_before_it_asks_for_room(tmp_path: Path) -> None:
    with rank_process(tmp_path, "killed", 0) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert f"{HOME}/killed/rank_0.optimizer" in names(tmp_path)
        with RunDirectory(tmp_path, "next", 0):
            assert names(tmp_path) == [HOME, f"{HOME}/next", f"{HOME}/next.lock"]
    assert names(tmp_path) == []


def test_run_lives_while_one_of_its_ranks_lives(tmp_path: Path) -> None:
    with rank_process(tmp_path, "run", 0) as killed, rank_process(tmp_path, "run", 1):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with RunDirectory(tmp_path, "next", 0):
            assert f"{HOME}/run/rank_0.optimizer" in names(tmp_path)
    with RunDirectory(tmp_path, "next", 0):
        assert f"{HOME}/run" not in names(tmp_path)


@pytest.mark.parametrize("then", ["raise KeyError('a bug')", "sys.exit(3)", "pass"])
def test_files_go_at_the_interpreters_end_however_it_comes(tmp_path: Path, then: str) -> None:
    with rank_process(tmp_path, "run", 0, then) as process:
        process.wait(60)
        assert names(tmp_path) == []


def test_fork_of_a_rank_removes_nothing(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "run", 0) as directory:
        directory.file("optimizer").write_text("x")
        child = os.fork()
        if child == 0:
            directory.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert directory.file("optimizer").exists()
    assert names(tmp_path) == []


# -- places that cannot be used


def test_missing_path_is_made(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a" / "b", "run", 0) as directory:
        assert directory.path.is_dir()
        assert directory.path.stat().st_mode & 0o777 == 0o700
        assert directory.home.stat().st_mode & 0o7777 == 0o1777


@pytest.mark.parametrize("inside", [False, True])
def test_path_that_is_a_file(tmp_path: Path, inside: bool) -> None:
    place = tmp_path / "file"
    place.write_text("x")
    with pytest.raises(ConfigError, match="must be a directory") as caught:
        RunDirectory(place / "inside" if inside else place, "run", 0)
    assert str(place) in str(caught.value)
    assert place.read_text() == "x"


def test_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / HOME).write_text("x")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        RunDirectory(tmp_path, "run", 0)


NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@as_root
def test_path_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    os.chmod(tmp_path.parent, 0o755)
    child = os.fork()
    if child == 0:
        os.setuid(NOBODY)
        try:
            RunDirectory(tmp_path, "run", 0)
        except ConfigError as error:
            os._exit(0 if "Permission denied" in str(error) and str(tmp_path) in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@as_root
def test_other_users_share_the_path_and_what_cannot_be_removed_is_named(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Root's run is killed; nobody's run may not remove it, works all the same, and says so."""
    import tempfile

    place = Path(tempfile.mkdtemp())
    place.chmod(0o777)
    try:
        with rank_process(place, "killed", 0) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
        child = os.fork()
        if child == 0:
            os.setuid(NOBODY)
            code = 0
            with RunDirectory(place, "theirs", 0) as directory:
                directory.file("optimizer").write_text("x")
            (record,) = caplog.records
            if str(place / HOME / "killed") not in record.message or "not to be removed" not in record.message:
                code = 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert names(place) == [HOME, f"{HOME}/killed", f"{HOME}/killed.lock", f"{HOME}/killed/rank_0.optimizer"]
        with RunDirectory(place, "next", 0):
            assert f"{HOME}/killed" not in names(place)
        assert names(place) == []
    finally:
        place.rmdir()


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"no file locks.*local disk"):
        RunDirectory(tmp_path, "run", 0)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("run_id", ["", "..", "a/b", ".hidden", "a b"])
def test_run_id_is_a_plain_name(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(StateError, match="run id"):
        RunDirectory(tmp_path, run_id, 0)
    assert names(tmp_path) == []


# -- races, one step at a time


def test_lock_that_was_removed_while_we_waited_for_it_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run takes our lock for a dead run's just before we hold it."""
    flock = fcntl.flock
    lock_path = tmp_path / HOME / "run.lock"
    stolen = []

    def steal_once(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and not stolen:
            stolen.append(lock_path.unlink())
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", steal_once)
    with RunDirectory(tmp_path, "run", 0) as directory:
        assert stolen and lock_path.exists() and directory.path.is_dir()
        with RunDirectory(tmp_path, "next", 0):
            assert directory.path.is_dir()


def test_directory_without_its_lock_file_is_named_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / HOME / "strange").mkdir(parents=True)
    (tmp_path / HOME / "strange" / "precious").write_text("x")
    with RunDirectory(tmp_path, "run", 0):
        pass
    assert (tmp_path / HOME / "strange" / "precious").read_text() == "x"
    (record,) = caplog.records
    assert "strange (its lock file is gone)" in record.message


def test_many_runs_that_come_and_go_at_once(tmp_path: Path) -> None:
    code = """
import sys
from shardwise.store.run_directory import RunDirectory, new_run_id
for index in range(40):
    run_id = new_run_id()
    with RunDirectory(sys.argv[1], run_id, 0) as zero, RunDirectory(sys.argv[1], run_id, 1) as one:
        for directory in (zero, one):
            directory.file("optimizer").write_text(run_id)
        assert zero.file("optimizer").read_text() == one.file("optimizer").read_text() == run_id
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert errors == ""
    assert names(tmp_path) == []
