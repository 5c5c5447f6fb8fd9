"""From a run to the command lines that start it on its machines, one for each launcher: pure functions.

A command line is an argument vector. What a machine runs, `remote`, is one too: the interpreter, `node`, the machine's
place and the capsule. pdsh and ssh hand a line to the other machine's shell: `quoted` is the one place that quotes.
The others take a vector and hand on a vector.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shardwise.errors import ConfigError
from shardwise.launch import node
from shardwise.launch.capsule import Capsule
from shardwise.launch.hostfile import Host

MOST_BYTES = 1_500_000  # of a vector: the kernel takes 2 MiB with the environment (execve(2))
MOST_BYTES_AN_ARGUMENT = 128 * 1024 - 1  # MAX_ARG_STRLEN of Linux
SSH_OPTIONS = (
    *("-o", "BatchMode=yes"),  # a question nobody could answer is an error
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),  # a machine that is gone is noticed
)


@dataclass(frozen=True)
class Start:
    """One process on this machine that starts the run on one machine or on many."""

    vector: tuple[str, ...]
    hosts: tuple[str, ...]  # that it starts processes on
    variables: Mapping[str, str] = field(default_factory=dict)  # its own, beside those of this process


# (the launcher's program, capsule, more arguments for it, the packed capsule) -> what to run
Build = Callable[[str, Capsule, tuple[str, ...], str], tuple[Start, ...]]


@dataclass(frozen=True)
class Starter:
    """A way to start one process on each of several machines."""

    binaries: tuple[str, ...]  # names of the program that runs here, the surest first
    source: str  # where it comes from
    build: Build
    other_mpi: str = ""  # a pattern in the words of --version, where the name may be that of another MPI's program
    over_ssh: bool = False  # it calls ssh

    @property
    def binary(self) -> str:
        """The first of its names that is on PATH, or else the last."""
        return next(filter(shutil.which, self.binaries), self.binaries[-1])

    def starts(self, capsule: Capsule, more: tuple[str, ...] = ()) -> tuple[Start, ...]:
        """What to run; `more` are arguments for the launcher itself.

        Raises ConfigError where that is longer than a command line may be.
        """
        starts = self.build(self.binary, capsule, more, capsule.pack())
        longest = max(len(argument) for start in starts for argument in start.vector)
        whole = max(sum(len(argument) + 1 for argument in start.vector) for start in starts)
        if longest > MOST_BYTES_AN_ARGUMENT or whole > MOST_BYTES:
            raise ConfigError(
                f"the command line for {self.binary} would have {whole} bytes, {longest} of them in one argument: more "
                "than the system takes. Put long arguments of the script into a file, or choose another launcher "
                "than openmpi, whose line grows fastest with the machines."
            )
        return starts

    def check_installed(self) -> None:
        """Raises ConfigError, with where to get it, if the launcher's program, or what it calls, is not on PATH."""
        if shutil.which(self.binary) is None:
            raise ConfigError(f"{self.binary} is not on PATH. {self.source} Or choose another launcher.")
        if self.over_ssh and shutil.which("ssh") is None:
            raise ConfigError(f"{self.binary} works by ssh, which is not on PATH. {_debian('openssh-client')}")
        if self.other_mpi:
            self._check_mpi()

    def _check_mpi(self) -> None:
        """MPIs share the names of their programs, and not their options."""
        asked = (self.binary, "--version")
        try:
            told = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            return  # what is wrong with it, it will say itself
        found = re.search(self.other_mpi, told)
        if found is not None:
            raise ConfigError(
                f"{shutil.which(self.binary)} calls itself {found[0]}, which takes other options than this launcher's "
                f"program. {self.source} Or choose the launcher that fits."
            )


def remote(place: str, capsule: str) -> tuple[str, ...]:
    """What one machine runs."""
    return (sys.executable, node.__file__, place, capsule)


def quoted(vector: tuple[str, ...]) -> str:
    """A vector as one line for a POSIX shell, which becomes that program: the run's end is seen by its parent's end."""
    return "exec " + shlex.join(vector)


# --- the launchers ----------------------------------------------------------------------------------------------------


def _pdsh(binary: str, capsule: Capsule, more: tuple[str, ...], packed: str) -> tuple[Start, ...]:
    """One pdsh, which replaces %n in the line by the machine's number in its list and %% by %."""
    interpreter, script, _, told = remote("%n", packed)
    line = quoted((interpreter.replace("%", "%%"), script.replace("%", "%%"), "%n", told))
    names = _names(capsule.hosts)
    options = ("-S", "-R", "ssh", "-f", str(len(names)), *more, "-w", ",".join(names))
    return (Start((binary, *options, line), names, {"PDSH_RCMD_TYPE": "ssh"}),)


def _ssh(binary: str, capsule: Capsule, more: tuple[str, ...], packed: str) -> tuple[Start, ...]:
    """One ssh a machine."""
    return tuple(
        Start((binary, *SSH_OPTIONS, *more, "--", name, quoted(remote(str(rank), packed))), (name,))
        for rank, name in enumerate(_names(capsule.hosts))
    )


def _openmpi(binary: str, capsule: Capsule, more: tuple[str, ...], packed: str) -> tuple[Start, ...]:
    """One mpirun of one process a machine.

    Open MPI puts the machine that it runs on first whatever the list says, so each machine is a program of its own.
    """
    vector = [binary, "--bind-to", "none", "--tag-output", *more]
    names = _names(capsule.hosts)
    for rank, name in enumerate(names):
        vector += [":"] * (rank > 0) + ["-np", "1", "--host", f"{name}:1", *remote(str(rank), packed)]
    return (Start(tuple(vector), names),)


def _hydra(*own: str) -> Build:
    """One mpiexec of the process manager that MPICH, MVAPICH and Intel MPI share, one process a machine."""

    def build(binary: str, capsule: Capsule, more: tuple[str, ...], packed: str) -> tuple[Start, ...]:
        names = _names(capsule.hosts)
        options = (*own, *more, "-hosts", ",".join(names), "-ppn", "1", "-n", str(len(names)))
        return (Start((binary, *options, *remote("PMI_RANK", packed)), names),)

    return build


def _slurm(binary: str, capsule: Capsule, more: tuple[str, ...], packed: str) -> tuple[Start, ...]:
    """One srun of one task a machine, in the allocation that this process is in.

    Slurm orders machines as it likes, so each finds its place by the name that Slurm calls it.
    """
    names = _names(capsule.hosts)
    count = str(len(names))
    options = (
        *("--nodes", count, "--ntasks", count, "--ntasks-per-node", "1", "--nodelist", ",".join(names)),
        "--kill-on-bad-exit=0",  # the others end by themselves, once they have heard the cause
        "--cpu-bind=none",  # the one task starts all ranks of its machine
        "--unbuffered",
    )
    return (Start((binary, *options, *more, *remote("SLURMD_NODENAME", packed)), names),)


def _names(hosts: tuple[Host, ...]) -> tuple[str, ...]:
    return tuple(host.name for host in hosts)


def _debian(package: str) -> str:
    return f"Debian and Ubuntu have it in the package {package}: apt-get install {package}."


_OF_OPEN_MPI, _OF_HYDRA = r"Open MPI|OpenRTE|PRRTE", r"HYDRA|Intel\(R\) MPI"

STARTERS: Mapping[str, Starter] = {
    "pdsh": Starter(("pdsh",), _debian("pdsh"), _pdsh, over_ssh=True),
    "ssh": Starter(("ssh",), _debian("openssh-client"), _ssh),
    "openmpi": Starter(("mpirun.openmpi", "mpirun"), _debian("openmpi-bin"), _openmpi, _OF_HYDRA),
    "mpich": Starter(
        ("mpiexec.mpich", "mpiexec.hydra", "mpiexec"), _debian("mpich"), _hydra("-bind-to", "none"), _OF_OPEN_MPI
    ),
    "mvapich": Starter(
        ("mpiexec.mvapich", "mpiexec"),
        "MVAPICH is in no Debian package; its makers have it at mvapich.cse.ohio-state.edu.",
        _hydra("-bind-to", "none"),
        _OF_OPEN_MPI,
    ),
    "impi": Starter(
        ("mpiexec.hydra",),
        "Intel MPI is the package intel-oneapi-mpi of Intel's own repository for Debian and Ubuntu.",
        _hydra("-genv", "I_MPI_PIN", "0"),
    ),
    "slurm": Starter(("srun",), _debian("slurm-client"), _slurm),
}
