"""Two machines on this one: network namespaces with a cable between them, a name, and an sshd of their own.

All that a fixture starts it also stops: `two_machines` is a context. Nothing is reached but addresses inside of the
namespaces. Root is needed, and `ip`, `sshd` and `ssh-keygen`; `missing` says what is not there.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import namespaces
from tests.front.command import plain_environment
from tests.namespaces import ADDRESSES, INTERFACE

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")


def missing(*programs: str) -> str:
    """Why two machines, or programs on them, cannot be had here; empty if they can."""
    if why_not := namespaces.missing():
        return why_not
    absent = [name for name in ("unshare", "ssh", "ssh-keygen", *programs) if shutil.which(name) is None]
    absent += [] if SSHD else ["sshd (package openssh-server)"]
    return f"not installed: {', '.join(absent)}" if absent else ""


@dataclass(frozen=True)
class Network:
    """The two machines, from outside."""

    directory: Path
    prefix: str  # of the namespaces' names

    @property
    def ssh_config(self) -> Path:
        return self.directory / "ssh_config"

    def namespace(self, host: str) -> str:
        return namespaces.namespace_of(self.prefix, host)

    def command(self, host: str, *command: str) -> list[str]:
        """A command as it runs on one of the machines, with its name and its /etc/hosts."""
        inside = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        hosts = str(self.directory / "hosts")
        enter = ["ip", "netns", "exec", self.namespace(host), "unshare", "--uts"]
        return [*enter, "sh", "-c", inside, host, hosts, *command]

    def environment(self) -> dict[str, str]:
        """For a launcher on one of the machines."""
        return plain_environment(
            self.directory,
            PDSH_SSH_ARGS_APPEND=f"-F {self.ssh_config}",
            HYDRA_LAUNCHER_EXTRA_ARGS=f"-F {self.ssh_config}",
            OMPI_ALLOW_RUN_AS_ROOT="1",
            OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
            OMPI_MCA_plm_rsh_args=f"-F {self.ssh_config}",
            GLOO_SOCKET_IFNAME=INTERFACE,
        )

    def pids(self, host: str) -> list[int]:
        """Every process of a machine."""
        return namespaces.pids_in(self.namespace(host))

    def running(self, host: str, words: str) -> list[int]:
        """The processes of a machine whose command line has `words`."""
        found = []
        for pid in self.pids(host):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if words in line and state != "Z":
                found.append(pid)
        return found

    def cut(self, host: str) -> None:
        """Pulls the cable."""
        namespaces.ip("-n", self.namespace(host), "link", "set", INTERFACE, "down")

    def freeze(self, host: str) -> None:
        """Stops every process of a machine: nobody reads, answers or ends there."""
        for pid in self.running(host, ""):
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, host: str) -> None:
        for pid in self.pids(host):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def two_machines(directory: Path) -> Iterator[Network]:
    """The machines alpha and beta, each with an sshd that lets root in by a key made for this."""
    network = Network(directory, f"sw-{os.getpid()}-{directory.name[-8:]}")
    _write_files(network)
    with ExitStack() as stack:
        stack.enter_context(namespaces.cabled(network.prefix))
        for host in ADDRESSES:
            log = (directory / f"sshd.{host}.log").open("wb")
            assert SSHD is not None
            sshd = network.command(host, SSHD, "-D", "-e", "-f", str(directory / "sshd_config"))
            # In a session of its own: a group with stopped processes gets SIGHUP once the tests' shell has ended.
            started = subprocess.Popen(sshd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            stack.callback(_stop, started)
        for host in ADDRESSES:
            _wait_for_sshd(network, host)
        yield network


def _write_files(network: Network) -> None:
    directory, key = network.directory, network.directory / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    lines = [f"{address} {host}" for host, address in {"localhost": "127.0.0.1", **ADDRESSES}.items()]
    (directory / "hosts").write_text("\n".join(lines) + "\n")
    (directory / "sshd_config").write_text(
        f"Port 22\nListenAddress 0.0.0.0\nHostKey {key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPidFile none\nPrintMotd no\nMaxStartups 100\n"
    )
    network.ssh_config.write_text(
        f"Host *\nIdentityFile {key}\nIdentitiesOnly yes\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        "LogLevel ERROR\nBatchMode yes\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it


def _wait_for_sshd(network: Network, host: str) -> None:
    other = next(name for name in ADDRESSES if name != host)
    probe = network.command(other, "ssh", "-F", str(network.ssh_config), host, "true")
    for _ in range(100):
        if subprocess.run(probe, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError((network.directory / f"sshd.{host}.log").read_text())


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()
