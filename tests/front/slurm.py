"""Slurm on two machines made of namespaces: a munged, a slurmctld on the first, a slurmd on each."""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.front.network import ADDRESSES, Network

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "salloc", "sbatch", "sinfo")


def missing() -> str:
    """Which of Slurm's programs are not here; empty if all are."""
    absent = [name for name in PROGRAMS if _found(name) is None]
    return f"not installed: {', '.join(absent)} (packages slurm-wlm and munge)" if absent else ""


@contextmanager
def slurm_on(network: Network, directory: Path) -> Iterator[dict[str, str]]:
    """Runs it; yields the variables by which its commands find it."""
    _write_files(directory)
    with ExitStack() as stack:

        def run(host: str, *command: str) -> None:
            program = str(_found(command[0]))
            log = (directory / f"{command[0]}.{host}.out").open("wb")
            line = network.command(host, program, *command[1:])
            environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
            process = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        files = [f"--{name}={directory / name}" for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")]
        run("alpha", "munged", "--force", "--foreground", *files)
        run("alpha", "slurmctld", "-D")
        for host in ADDRESSES:
            run(host, "slurmd", "-D", "-N", host)
        variables = {"SLURM_CONF": str(directory / "slurm.conf")}
        probe = network.command("alpha", "sinfo", "--noheader", "--format=%T %D")
        for _ in range(300):
            done = subprocess.run(probe, env={**os.environ, **variables}, capture_output=True, text=True)
            if done.stdout.strip() == "idle 2":
                break
            time.sleep(0.2)
        else:
            raise RuntimeError("\n".join(path.read_text() for path in directory.glob("*.out")))
        yield variables


def _write_files(directory: Path) -> None:
    key = directory / "key-file"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    for name in ("state", "spool.alpha", "spool.beta"):
        (directory / name).mkdir()
    # The plugin for the first version asks for no cgroup that nobody uses.
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=yes\n")
    nodes = "".join(f"NodeName={host} NodeAddr={address} CPUs=2\n" for host, address in ADDRESSES.items())
    (directory / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost=alpha
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={directory}/socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
{nodes}PartitionName=all Nodes=alpha,beta Default=YES State=UP
"""
    )


def _found(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
