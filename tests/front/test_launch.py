"""The fear: a run that ends badly says nothing of use, or leaves processes behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from shardwise.errors import ConfigError
from shardwise.launch.environment import HEAP_SETTINGS, exported, rank_environment
from shardwise.launch.failure import print_failures, read_failures
from shardwise.launch.job import Device, LaunchRequest, Meeting, ProgramKind, resolve_job
from shardwise.launch.machine import Machine
from tests.front.command import FIXTURES, SHARDWISE, plain_environment, shardwise

SCRIPT = str(FIXTURES / "report.py")
LAPTOP = Machine(num_cores=8, num_gpus=0)
SERVER = Machine(num_cores=32, num_gpus=4)
ASKED = Path("run", "asked.json")
CHILD_SECONDS = 600  # how long the fixtures' children would live on by themselves


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Any, what: str) -> None:
    """The deadline is a net well below the children's own end, not a measure of speed."""
    deadline = time.monotonic() + CHILD_SECONDS / 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def assert_all_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_running, pids)), f"of the processes {pids} some still run")


def reports_in(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where the launcher puts its run directory."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    return directory


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the ranks of the fixtures write."""
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


# --- a run that ends well -----------------------------------


def test_script_gets_its_arguments_untouched_and_the_rank_environment(out: Path, temporary: Path) -> None:
    arguments = [str(out), "--num_processes", "9", "-m", "--help", "--", "a b", "$$ ${local_rank}", ""]
    options = ["--cpu", "--num-processes", "2", "--num_cpu_threads_per_process", "3"]
    done = shardwise("launch", *options, SCRIPT, *arguments, temporary=temporary)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    reports = reports_in(out)
    assert [report["environment"]["RANK"] for report in reports] == ["0", "1"]
    for rank, report in enumerate(reports):
        assert report["arguments"] == [SCRIPT, *arguments]
        assert report["first_path"] == str(FIXTURES)
        assert not report["torch_is_loaded"]
        environment = report["environment"]
        assert environment["WORLD_SIZE"] == "2"
        assert environment["LOCAL_RANK"] == str(rank)
        assert environment["MASTER_ADDR"] and int(environment["MASTER_PORT"]) > 0
        assert environment["OMP_NUM_THREADS"] == "3"
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        assert HEAP_SETTINGS.items() <= environment.items()
    # What a rank that ended well has left running in its own group ends with the run, and the run directory too.
    assert_all_gone([pid for report in reports for pid in report["pids"]])
    assert list(temporary.iterdir()) == []


def test_module_is_found_in_the_working_directory_and_the_users_variables_stay(out: Path, temporary: Path) -> None:
    done = shardwise(
        *["launch", "--use_cpu", "-n", "1", "--module", "fixtures.report", str(out), "-x"],
        temporary=temporary,
        cwd=FIXTURES.parent,
        OMP_NUM_THREADS="5",
        MALLOC_TRIM_THRESHOLD_="4096",
    )

    assert done.returncode == 0, done.stderr
    (report,) = reports_in(out)
    assert report["arguments"] == [SCRIPT, str(out), "-x"]
    assert report["first_path"] == str(FIXTURES.parent)
    assert report["environment"]["OMP_NUM_THREADS"] == "5"
    assert report["environment"]["MALLOC_TRIM_THRESHOLD_"] == "4096"
    assert "MALLOC_MMAP_THRESHOLD_" not in report["environment"]
    assert_all_gone(report["pids"])


# --- a run that ends badly -----------------------------------


def test_failing_rank_ends_the_run_with_its_own_traceback_once(temporary: Path) -> None:
    done = shardwise("launch", "--cpu", "--num_processes", "2", str(FIXTURES / "fail_one.py"), temporary=temporary)

    assert done.returncode == 1, done.stderr
    assert "rank 1 of 2 failed (exit code 1)" in done.stderr
    assert done.stderr.count("RuntimeError: rank one has had enough") == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "in train" in done.stderr
    assert "bootstrap.py" not in done.stderr and "runpy" not in done.stderr
    assert list(temporary.iterdir()) == []


def test_exit_code_of_an_executable_is_the_commands_and_its_peer_is_ended(out: Path, temporary: Path) -> None:
    shell = (
        'echo "[$$]" > "$0/$RANK.json"; [ "$RANK" = 0 ] && exec sleep 600; until [ -s "$0/0.json" ]; do :; done; exit 7'
    )
    done = shardwise(
        *["launch", "--cpu", "-n", "2", "--no_python", "sh", "-c", shell, str(out)],
        temporary=temporary,
    )

    assert done.returncode == 7, done.stderr
    assert "rank 1 of 2 failed (exit code 7)" in done.stderr
    assert "rank 0" not in done.stderr
    assert_all_gone([pid for pids in reports_in(out) for pid in pids])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_signal_to_the_launcher_ends_every_rank_and_its_children(
    number: signal.Signals, out: Path, temporary: Path
) -> None:
    launcher = subprocess.Popen(
        [*SHARDWISE, "launch", "--cpu", "-n", "2", str(FIXTURES / "wait.py"), str(out)],
        env=plain_environment(temporary),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(reports_in(out)) == 2 or launcher.poll() is not None, "the ranks did not start")
    pids = [pid for report in reports_in(out) for pid in report["pids"]]
    assert len(pids) == 4 and all(map(is_running, pids))

    launcher.send_signal(number)
    _, errors = launcher.communicate()

    assert_all_gone(pids)
    wait_until(lambda: list(temporary.iterdir()) == [], "the run directory is left")
    if number is signal.SIGKILL:
        assert launcher.returncode == -number
    else:
        assert launcher.returncode == 128 + number
        assert f"Ended by {number.name}" in errors
        assert "Traceback" not in errors
    if number is signal.SIGINT:  # Python turns this one into KeyboardInterrupt: a script may tidy up
        assert len(list(out.glob("*.cleaned-up"))) == 2


def failure(exit_code: int, time_seconds: float, message: object = "<NONE>") -> Any:
    return SimpleNamespace(exitcode=exit_code, timestamp=int(time_seconds), error_file_data={"message": message})


def error(summary: str, time_seconds: float) -> dict[str, Any]:
    details = {"py_callstack": f"Traceback\n{summary}\n", "timestamp": str(int(time_seconds)), "time": time_seconds}
    return {"message": summary, "extraInfo": details}


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        pytest.param({0: failure(1, 9, error("B", 9.8)), 1: failure(1, 9, error("A", 9.3))}, 1, id="earliest-error"),
        pytest.param({0: failure(1, 9, error("B", 9.3)), 1: failure(-9, 12)}, 1, id="crash-before-its-echo"),
        pytest.param({0: failure(-15, 1), 1: failure(3, 9)}, 1, id="ended-by-the-agent-last"),
        pytest.param(
            {0: failure(1, 9, error("B", 9.8)), 1: failure(-6, 9, error("A", 9.9))}, 0, id="abort-after-error"
        ),
    ],
)
def test_first_failure_is_the_one_that_brought_the_others(failures: dict[int, Any], first: int) -> None:
    assert read_failures(failures)[0].rank == first


def test_crash_is_shown_with_the_traceback_that_it_brought(capsys: pytest.CaptureFixture[str]) -> None:
    failures = read_failures(
        {0: failure(1, 9, error("ConnectionError: peer", 9.3)), 1: failure(-9, 12), 2: failure(-15, 12)}
    )
    print_failures(failures, 3, Console(width=100))
    shown = capsys.readouterr().out
    assert "rank 1 of 3 failed (killed by SIGKILL)" in shown
    assert "memory runs out" in shown
    assert shown.count("ConnectionError: peer") == 1
    assert "rank 2" not in shown
    assert failures[0].status == 137


# --- what the user asked for, against the machine -----------------------------------


@pytest.mark.parametrize(
    ("machine", "wishes", "expected"),
    [
        (LAPTOP, {}, (Device.CPU, 2, 4)),
        (Machine(num_cores=1, num_gpus=0), {}, (Device.CPU, 1, 1)),
        (LAPTOP, {"num_processes": 16}, (Device.CPU, 16, 1)),
        (SERVER, {}, (Device.GPU, 4, 8)),
        (SERVER, {"num_processes": 2}, (Device.GPU, 2, 16)),
        (SERVER, {"device": Device.CPU}, (Device.CPU, 2, 16)),
        (SERVER, {"device": Device.CPU, "num_processes": 8, "num_threads_per_process": 1}, (Device.CPU, 8, 1)),
    ],
)
def test_what_is_left_open_is_chosen_from_the_machine(
    machine: Machine, wishes: dict[str, Any], expected: tuple[Device, int, int]
) -> None:
    job = resolve_job(LaunchRequest(SCRIPT, **wishes), machine)
    assert (job.device, job.num_processes, job.num_threads_per_process) == expected


@pytest.mark.parametrize(
    ("machine", "wishes", "words"),
    [
        (LAPTOP, {"device": Device.GPU}, "torch sees no CUDA device"),
        (SERVER, {"num_processes": 5}, "--num_processes is 5, but torch sees 4 CUDA device"),
        (LAPTOP, {"num_processes": 0}, "--num_processes is 0"),
        (LAPTOP, {"num_threads_per_process": 0}, "--num_cpu_threads_per_process is 0"),
        (LAPTOP, {"meeting": Meeting(port=70000)}, "--main_process_port is 70000"),
        (LAPTOP, {"program": str(FIXTURES / "reprot.py")}, "Did you mean '.*report.py'"),
        (LAPTOP, {"program": str(FIXTURES)}, "a directory without a __main__.py"),
        (LAPTOP, {"program": "no_such_package.train", "kind": ProgramKind.MODULE}, "No module 'no_such_package'"),
        (LAPTOP, {"program": "no-such-executable", "kind": ProgramKind.COMMAND}, "No executable 'no-such-executable'"),
    ],
)
def test_what_cannot_run_is_refused_before_any_process_starts(
    machine: Machine, wishes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_job(LaunchRequest(**{"program": SCRIPT, **wishes}), machine)


def test_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--main_process_port: port {port} cannot be used"):
            resolve_job(LaunchRequest(SCRIPT, meeting=Meeting(port=port)), LAPTOP)


def test_command_of_a_rank_is_what_a_user_would_type() -> None:
    def command(kind: ProgramKind, program: str) -> list[str]:
        return resolve_job(LaunchRequest(program, ("--x",), kind), LAPTOP).command

    assert command(ProgramKind.SCRIPT, SCRIPT) == [sys.executable, SCRIPT, "--x"]
    assert command(ProgramKind.MODULE, "json.tool") == [sys.executable, "-m", "json.tool", "--x"]
    assert command(ProgramKind.COMMAND, "sh") == ["sh", "--x"]


def test_gpu_ranks_keep_the_heap_and_the_devices_as_they_are() -> None:
    job = resolve_job(LaunchRequest(SCRIPT), SERVER)
    assert rank_environment(job, {}, ASKED) == {"SHARDWISE_RUN": str(ASKED), "OMP_NUM_THREADS": "8"}


@pytest.mark.parametrize("users", [{"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, {"MALLOC_MMAP_THRESHOLD_": "1"}])
def test_heap_that_the_user_has_tuned_is_left_alone(users: dict[str, str]) -> None:
    job = resolve_job(LaunchRequest(SCRIPT), LAPTOP)
    assert not HEAP_SETTINGS.keys() & rank_environment(job, users, ASKED).keys()


def test_exported_variables_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    before = dict(os.environ)
    with exported({"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "2"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["MALLOC_TRIM_THRESHOLD_"]) == ("1", "2")
    assert dict(os.environ) == before
