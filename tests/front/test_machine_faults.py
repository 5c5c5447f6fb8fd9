"""The fear: a machine or a rank goes, and the rest waits, blames another, or leaves processes behind."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.front.command import FIXTURES, SHARDWISE
from tests.front.network import Network, missing, two_machines

SCRIPT = str(FIXTURES / "zero3.py")
WHY_NOT = missing()
NET_SECONDS = 240  # under a hang, not a measure of speed
TIMEOUT_SECONDS = 6  # --health_timeout

pytestmark = [pytest.mark.world, pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    directory = tmp_path / "network"
    directory.mkdir()
    with two_machines(directory) as made:
        yield made


class Run:
    """A run on alpha and beta, two ranks each, that `starter` starts by ssh."""

    def __init__(self, network: Network, tmp_path: Path, starter: str, *options: str) -> None:
        self.network, self.out = network, tmp_path / "losses"
        self.harmed = tmp_path / "harmed"
        hostfile = tmp_path / "hosts"
        hostfile.write_text("alpha slots=2\nbeta slots=2\n")
        launch = [option for option in options if not option.startswith("script:")]
        script = [word for option in options if option.startswith("script:") for word in option[7:].split()]
        command = network.command(
            starter,
            *[*SHARDWISE, "launch", "--cpu", "--num_cpu_threads_per_process", "1"],
            *["--deepspeed_hostfile", str(hostfile), "--deepspeed_multinode_launcher", "ssh"],
            *["--launcher_args", f"-F {network.ssh_config}", "--health_timeout", str(TIMEOUT_SECONDS), *launch],
            *[SCRIPT, str(self.out), "--transport", "process_group", "--steps", "6", *script],
        )
        self.process = subprocess.Popen(
            command, env=network.environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + NET_SECONDS
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()
            time.sleep(0.1)

    def end(self) -> str:
        """What was on the screen in the end."""
        return self.process.communicate(timeout=NET_SECONDS)[1]

    @property
    def steps(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]


def assert_nothing_is_left(network: Network) -> None:
    deadline = time.monotonic() + NET_SECONDS / 4
    while left := [*network.running("alpha", "shardwise"), *network.running("beta", "shardwise")]:
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes()[:200] for pid in left]
        time.sleep(0.2)
    assert [name for name in os.listdir(network.directory) if name.startswith("shardwise-")] == []


def steps_of_a_whole_run(network: Network, tmp_path: Path) -> list[dict[str, object]]:
    whole = Run(network, tmp_path, "alpha")
    screen = whole.end()
    assert whole.process.returncode == 0, screen
    steps = whole.steps
    whole.out.unlink()
    return steps


def launcher_of(network: Network, host: str) -> int:
    (pid,) = network.running(host, "shardwise.launch.member")
    return pid


def kill_everything(network: Network, host: str) -> None:
    """Everything of the run but the guards, so that they are seen to tidy up."""
    guards = network.running(host, "launch/guard.py")
    for pid in network.running(host, "shardwise"):
        if pid not in guards:
            os.kill(pid, signal.SIGKILL)


def test_an_error_of_a_rank_ends_all_machines_with_its_words(network: Network, tmp_path: Path) -> None:
    run = Run(network, tmp_path, "alpha", "script:--harm raise:3:2")
    screen = run.end()
    assert run.process.returncode == 1
    assert "rank 3 of 4 on beta failed (exit code 1)" in screen
    assert screen.count("RuntimeError: rank 3 has had enough") == 1
    assert_nothing_is_left(network)


def test_a_killed_rank_is_named_before_the_errors_that_it_causes(network: Network, tmp_path: Path) -> None:
    run = Run(network, tmp_path, "beta", "script:--harm kill:1:2")
    screen = run.end()
    assert run.process.returncode == 128 + signal.SIGKILL
    assert "rank 1 of 4 on alpha failed (killed by SIGKILL)" in screen
    assert_nothing_is_left(network)


@pytest.mark.parametrize("fault", ["cut", "freeze"])
def test_a_machine_that_falls_silent_is_named_within_the_timeout(network: Network, tmp_path: Path, fault: str) -> None:
    run = Run(network, tmp_path, "alpha", "script:--harm wait:2:2")
    run.wait_until(run.harmed.exists)
    getattr(network, fault)("beta")
    screen = run.end()
    assert run.process.returncode == 1
    assert "machine 1 (beta) is lost" in screen
    assert f"Nothing was heard of it for {TIMEOUT_SECONDS} s" in screen
    assert network.running("alpha", "shardwise") == []
    if fault == "freeze":
        network.thaw("beta")
    assert_nothing_is_left(network)


def test_a_stopped_rank_is_named(network: Network, tmp_path: Path) -> None:
    run = Run(network, tmp_path, "alpha", "script:--harm wait:2:2")
    run.wait_until(run.harmed.exists)
    os.kill(network.running("beta", "launch/bootstrap.py")[0], signal.SIGSTOP)
    screen = run.end()
    assert "of 4 on beta failed (killed by SIGKILL)" in screen
    assert f"It was stopped (SIGSTOP) for {TIMEOUT_SECONDS} s" in screen
    assert_nothing_is_left(network)


def test_the_end_of_machine_0_is_named_by_the_other_and_the_same_command_goes_on_bit_for_bit(
    network: Network, tmp_path: Path
) -> None:
    expected = steps_of_a_whole_run(network, tmp_path)
    checkpoints = f"--checkpoints {tmp_path / 'checkpoints'}"
    run = Run(network, tmp_path, "beta", f"script:--harm wait:0:2 {checkpoints}")
    run.wait_until(run.harmed.exists)
    os.kill(launcher_of(network, "alpha"), signal.SIGKILL)
    screen = run.end()
    assert run.process.returncode != 0
    assert "machine 0 (alpha) is lost" in screen
    assert "The connection to it broke" in screen
    assert_nothing_is_left(network)
    again = Run(network, tmp_path, "beta", f"script:{checkpoints}")
    screen = again.end()
    assert again.process.returncode == 0, screen
    assert again.steps == expected


@pytest.mark.parametrize("fault", ["cut", "freeze"])
def test_machine_0_that_falls_silent_is_named_by_the_other(network: Network, tmp_path: Path, fault: str) -> None:
    run = Run(network, tmp_path, "beta", "script:--harm wait:0:2")
    run.wait_until(run.harmed.exists)
    getattr(network, fault)("alpha")
    screen = run.end()
    assert run.process.returncode == 1
    assert "machine 0 (alpha) is lost" in screen
    assert f"It was not reached for {TIMEOUT_SECONDS} s" in screen
    assert network.running("beta", "shardwise") == []
    if fault == "freeze":
        network.thaw("alpha")
    assert_nothing_is_left(network)


def test_a_rank_that_hangs_is_named_by_those_that_wait_for_it(network: Network, tmp_path: Path) -> None:
    run = Run(network, tmp_path, "alpha", "script:--harm wait:2:2 --timeout 8")
    screen = run.end()
    assert run.process.returncode == 1
    assert re.search(r"rank [013] of 4 on (alpha|beta) failed \(exit code 1\)", screen), screen
    assert "rank 2" in screen.partition("Error: ")[2]
    assert_nothing_is_left(network)


def test_ctrl_c_ends_every_machine(network: Network, tmp_path: Path) -> None:
    run = Run(network, tmp_path, "alpha", "script:--harm wait:0:2")
    run.wait_until(run.harmed.exists)
    (command,) = (pid for pid in network.running("alpha", "commands.main launch"))
    os.kill(command, signal.SIGINT)
    screen = run.end()
    assert run.process.returncode == 128 + signal.SIGINT
    assert "Ended by SIGINT; every machine ends its ranks" in screen
    assert_nothing_is_left(network)


def test_nothing_outlives_the_command_that_started_it(network: Network, tmp_path: Path) -> None:
    run = Run(network, tmp_path, "alpha", "script:--harm wait:0:2")
    run.wait_until(run.harmed.exists)
    (command,) = (pid for pid in network.running("alpha", "commands.main launch"))
    os.kill(command, signal.SIGKILL)
    run.end()
    assert_nothing_is_left(network)


def test_a_killed_rank_is_restarted_from_the_checkpoint_bit_for_bit(network: Network, tmp_path: Path) -> None:
    expected = steps_of_a_whole_run(network, tmp_path)
    checkpoints = tmp_path / "checkpoints"
    run = Run(network, tmp_path, "alpha", "--max_restarts=1", f"script:--harm kill:3:2 --checkpoints {checkpoints}")
    screen = run.end()
    assert run.process.returncode == 0, screen
    assert re.search(r"rank 3 of 4 on (alpha|beta) failed \(killed by SIGKILL\)", screen)  # torch orders machines
    assert "Every rank starts anew (1 of 1)" in screen
    assert run.steps == expected
    assert_nothing_is_left(network)


@pytest.mark.parametrize("fault", ["killed", "cut", "freeze"])
def test_a_run_goes_on_with_fewer_machines(network: Network, tmp_path: Path, fault: str) -> None:
    checkpoints = tmp_path / "checkpoints"
    options = ["--max_restarts=3", "--nnodes=1:2", f"script:--harm wait:2:3 --checkpoints {checkpoints}"]
    run = Run(network, tmp_path, "alpha", *options)
    run.wait_until(run.harmed.exists)
    if fault == "killed":
        kill_everything(network, "beta")
    else:
        getattr(network, fault)("beta")
    screen = run.end()
    if fault == "freeze":
        network.thaw("beta")
    assert "machine 1 (beta) is lost" in screen
    assert "1 of 2 machines go on" in screen
    assert [(step["step"], step["world"]) for step in run.steps] == [(i, 4 if i < 3 else 2) for i in range(6)], screen
    assert_nothing_is_left(network)


def test_started_by_hand_a_run_goes_on_with_fewer_machines_too(network: Network, tmp_path: Path) -> None:
    out, checkpoints = tmp_path / "losses", tmp_path / "checkpoints"
    options = ["--cpu", "--num_cpu_threads_per_process", "1", "--health_timeout", str(TIMEOUT_SECONDS)]
    options += ["--nnodes", "1:2", "--num_processes", "4", "--max_restarts", "3"]
    options += ["--main_process_ip", "alpha", "--main_process_port", "29500", "--machine_rank"]
    script = [SCRIPT, str(out), "--transport", "process_group", "--steps", "6"]
    script += ["--checkpoints", str(checkpoints), "--harm", "wait:2:3"]
    alpha, beta = (
        subprocess.Popen(
            network.command(host, *SHARDWISE, "launch", *options, rank, *script),
            env=network.environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, rank in (("alpha", "0"), ("beta", "1"))
    )
    deadline = time.monotonic() + NET_SECONDS
    while not (tmp_path / "harmed").exists():
        assert time.monotonic() < deadline and alpha.poll() is None, alpha.communicate()
        time.sleep(0.1)
    kill_everything(network, "beta")
    beta.communicate()
    screen = alpha.communicate(timeout=NET_SECONDS)[1]
    assert alpha.returncode == 0, screen
    assert "machine 1 (beta) is lost" in screen and "1 of 2 machines go on" in screen
    worlds = [json.loads(line)["world"] for line in out.read_text().splitlines()]
    assert worlds == [4, 4, 4, 2, 2, 2]
    assert_nothing_is_left(network)
