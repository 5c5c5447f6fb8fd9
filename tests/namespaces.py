"""Two machines' networks on this one: network namespaces with a cable between them, which can be slowed.

Tests of launchers start an sshd in each, `bench.zeropp` trains over the cable. Nothing is reached but addresses inside
of the namespaces. Root is needed, and `ip`; a slow cable needs `tc` and the kernel's token bucket filter.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

ADDRESSES = {"alpha": "10.231.7.1", "beta": "10.231.7.2"}
INTERFACE = "eth0"


def missing() -> str:
    """Why namespaces cannot be had here; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "not installed: ip (package iproute2)"
    name = f"sw-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


def namespace_of(prefix: str, host: str) -> str:
    """The namespace's name."""
    return f"{prefix}-{host}"


def pids_in(namespace: str) -> list[int]:
    """Every process of a machine."""
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@contextmanager
def cabled(prefix: str) -> Iterator[None]:
    """The namespaces of alpha and beta, and a cable between them; at the end all that runs there is killed."""
    with ExitStack() as stack:
        for host in ADDRESSES:
            ip("netns", "add", namespace_of(prefix, host))
            stack.callback(_remove, namespace_of(prefix, host))
        ends = [part for host in ADDRESSES for part in ("name", INTERFACE, "netns", namespace_of(prefix, host))]
        ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for host, address in ADDRESSES.items():
            inside = ("-n", namespace_of(prefix, host))
            ip(*inside, "address", "add", f"{address}/24", "dev", INTERFACE)
            ip(*inside, "link", "set", INTERFACE, "up")
            ip(*inside, "link", "set", "lo", "up")
        yield


def slow_down(rate: str) -> str:
    """Let no more leave the namespace of this process than ``rate``, such as ``100mbit``; why not, where it cannot be.

    A whole segment that the kernel hands over at once fits the bucket, and the queue is longer than what senders keep
    under way, so that the rate decides and not losses.
    """
    if shutil.which("tc") is None:
        return "not installed: tc (package iproute2)"
    filter = ("tbf", "rate", rate, "burst", "256kb", "latency", "400ms")
    tried = subprocess.run(
        ["tc", "qdisc", "replace", "dev", INTERFACE, "root", *filter], capture_output=True, text=True
    )
    return f"the kernel slows no cable: {tried.stderr.strip()}" if tried.returncode else ""


LOSS = """
table netdev loss {{
    chain arriving {{
        type filter hook ingress device {interface} priority 0;
        numgen random mod 100 < {percent} counter drop
    }}
}}
"""


def lose(namespace: str, percent: int) -> str:
    """Lose so many of a hundred packets that reach a namespace; why not, where that cannot be."""
    if shutil.which("nft") is None:
        return "not installed: nft (package nftables)"
    rules = LOSS.format(interface=INTERFACE, percent=percent)
    enter = ["ip", "netns", "exec", namespace]
    tried = subprocess.run([*enter, "nft", "-f", "-"], input=rules, capture_output=True, text=True)
    return f"the kernel loses no packets on purpose: {tried.stderr.strip()}" if tried.returncode else ""


def lost(namespace: str) -> int:
    """How many packets `lose` has lost so far."""
    told = subprocess.run(
        ["ip", "netns", "exec", namespace, "nft", "list", "table", "netdev", "loss"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(told.stdout.partition("counter packets ")[2].split()[0])


def lose_no_more(namespace: str) -> None:
    """Take back `lose`."""
    subprocess.run(["ip", "netns", "exec", namespace, "nft", "delete", "table", "netdev", "loss"], check=True)


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _remove(namespace: str) -> None:
    for pid in pids_in(namespace):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    ip("netns", "delete", namespace)
