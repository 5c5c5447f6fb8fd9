"""The fear: a launcher that starts something else on other machines than the same command does on this one."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.front import slurm
from tests.front.command import FIXTURES, SHARDWISE, shardwise
from tests.front.network import Network, missing, two_machines
from tests.namespaces import lose, lose_no_more, lost

SCRIPT = str(FIXTURES / "zero3.py")
ONE_THREAD = ("--cpu", "--num_cpu_threads_per_process", "1")
WHY_NOT = missing()

pytestmark = [pytest.mark.world, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with two_machines(tmp_path_factory.mktemp("net")) as made:
        yield made


@pytest.fixture(scope="module")
def losses_of_one_machine(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("one")
    out = directory / "losses"
    done = shardwise("launch", *ONE_THREAD, "-n", "4", SCRIPT, str(out), temporary=directory)
    assert done.returncode == 0, done.stderr
    return out.read_text()


def installed(*programs: str) -> pytest.MarkDecorator:
    absent = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def with_mvapichs_name(directory: Path) -> str:
    """A directory where MPICH's mpiexec has the name of MVAPICH's."""
    directory.mkdir()
    program = directory / "mpiexec.mvapich"
    program.write_text('#!/bin/sh\nexec mpiexec.hydra "$@"\n')
    program.chmod(0o755)
    return str(directory)


@pytest.mark.parametrize(
    ("launcher", "starter", "more"),
    [
        pytest.param("pdsh", "beta", [], marks=[installed("pdsh"), pytest.mark.slow]),
        pytest.param("ssh", "alpha", ["--launcher_args", "-F {ssh_config}"], marks=pytest.mark.slow),
        # Open MPI would put the machine that it runs on first.
        pytest.param("openmpi", "beta", [], marks=[installed("mpirun.openmpi"), pytest.mark.slow]),
        pytest.param("mpich", "beta", [], marks=[installed("mpiexec.mpich"), pytest.mark.slow]),
        # Both have their mpiexec from MPICH, whose own stands in for it here.
        pytest.param("impi", "alpha", [], marks=[installed("mpiexec.hydra"), pytest.mark.slow]),
        pytest.param("mvapich", "alpha", [], marks=[installed("mpiexec.hydra"), pytest.mark.slow]),
    ],
)
def test_two_machines_of_two_ranks_have_the_losses_of_one_machine(
    network: Network, losses_of_one_machine: str, tmp_path: Path, launcher: str, starter: str, more: list[str]
) -> None:
    directory = tmp_path / "it's `touch executed` %n"
    directory.mkdir()
    hostfile, out = directory / "my hosts", directory / 'losses of $(touch executed) "two"'
    hostfile.write_text("alpha slots=2\nbeta slots=2\n")
    script = directory / "zero 3 $(touch executed).py"
    shutil.copy(SCRIPT, script)
    environment = network.environment()
    if launcher == "mvapich":
        environment["PATH"] = with_mvapichs_name(tmp_path / "bin") + os.pathsep + environment["PATH"]
    done = subprocess.run(
        network.command(
            starter,
            *[*SHARDWISE, "launch", *ONE_THREAD, "--deepspeed_hostfile", hostfile.name],
            *["--deepspeed_multinode_launcher", launcher],
            *[word.format(ssh_config=network.ssh_config) for word in more],
            *[script.name, out.name, "--transport", "process_group"],
        ),
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_text() == losses_of_one_machine
    assert [json.loads(line)["world"] for line in out.read_text().splitlines()] == [4] * 4
    assert set(tmp_path.iterdir()) <= {directory, tmp_path / "bin"}
    assert set(directory.iterdir()) == {hostfile, out, script}
    assert_nothing_is_left(network)


@pytest.mark.slow
def test_packets_that_get_lost_cost_time_and_no_bits(
    network: Network, losses_of_one_machine: str, tmp_path: Path
) -> None:
    both = [network.namespace(host) for host in ("alpha", "beta")]
    with ExitStack() as stack:
        for namespace in both:
            if why_not := lose(namespace, percent=5):
                pytest.skip(why_not)
            stack.callback(lose_no_more, namespace)
        test_two_machines_of_two_ranks_have_the_losses_of_one_machine(
            network, losses_of_one_machine, tmp_path, "ssh", "alpha", ["--launcher_args", "-F {ssh_config}"]
        )
        assert min(map(lost, both)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["standard", "nossh"])
def test_the_same_command_on_each_machine_is_one_run(
    network: Network, losses_of_one_machine: str, tmp_path: Path, launcher: str
) -> None:
    hostfile, out = tmp_path / "hosts", tmp_path / "losses"
    hostfile.write_text("alpha slots=2\nbeta slots=2\n")
    options = ["--deepspeed_multinode_launcher", launcher]
    if launcher == "nossh":
        options += ["--deepspeed_hostfile", str(hostfile)]
    else:
        options += ["--num_machines", "2", "--num_processes", "4", "--main_process_ip", "alpha"]
        options += ["--main_process_port", "29500"]
    machines = [
        subprocess.Popen(
            network.command(
                host,
                *[*SHARDWISE, "launch", *ONE_THREAD, *options],
                *(["--machine_rank", rank] if launcher == "standard" else []),
                *[SCRIPT, str(out)],
            ),
            env=network.environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host, rank in (("beta", "1"), ("alpha", "0"))
    ]
    screens = [machine.communicate()[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], screens
    assert out.read_text() == losses_of_one_machine
    assert_nothing_is_left(network)


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_slurm_starts_it_in_an_allocation_and_by_the_script_for_sbatch(
    network: Network, losses_of_one_machine: str, tmp_path: Path
) -> None:
    directory = tmp_path / "slurm"
    directory.mkdir()
    with slurm.slurm_on(network, directory) as variables:
        environment = network.environment() | variables
        launch = [*SHARDWISE, "launch", *ONE_THREAD, "--num_processes", "4"]
        first, second = tmp_path / "first $(x)", tmp_path / "second $(x)"

        def on_alpha(*command: str) -> None:
            done = subprocess.run(
                network.command("alpha", *command), env=environment, cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in tmp_path.glob("*.out"))

        srun = ["--deepspeed_multinode_launcher", "slurm", SCRIPT, str(first), "--transport", "process_group"]
        on_alpha("salloc", "--nodes=2", *launch, *srun)
        script = tmp_path / "script"
        written = ["--num_machines", "2", "--slurm-script", str(script)]
        on_alpha(*launch, *written, SCRIPT, str(second), "--transport", "process_group")
        script.write_text(script.read_text().replace("#SBATCH --mem=0\n", ""))  # the nodes have said nothing of theirs
        on_alpha("sbatch", "--wait", str(script))
    assert first.read_text() == second.read_text() == losses_of_one_machine
    assert_nothing_is_left(network)


def assert_nothing_is_left(network: Network) -> None:
    left = {host: network.running(host, "shardwise") for host in ("alpha", "beta")}
    assert left == {"alpha": [], "beta": []}
    assert [name for name in os.listdir(network.directory) if name.startswith("shardwise-")] == []
