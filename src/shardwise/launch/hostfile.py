"""The list of machines that a launcher starts processes on: a hostfile, and the filters that choose from it.

The formats are those of DeepSpeed (deepspeed.ai/getting-started, "Resource Configuration"):

    hostfile    one machine a line, `worker-1 slots=4`; what follows a # is a comment
    filter      machines joined by @, each alone or with some of its slots: `worker-1@worker-2:0,2`

A slot is a process, and on a machine with GPUs also the number of the GPU that it gets. All here is pure: text in,
hosts out, and `ConfigError` for everything else.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from shardwise.errors import ConfigError

# Names reach command lines of ssh, pdsh and mpirun, whose lists of hosts give a meaning to @ : , [ ] and a leading -.
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_SLOTS = re.compile(r"slots=([0-9]{1,6})", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,6}", re.ASCII)
_FORM = "expected a machine and its slots, such as: worker-1 slots=4"
MOST_SLOTS = 1024  # of one machine: a slip of the finger asks for no million processes


@dataclass(frozen=True)
class Host:
    """A machine, as the machine that starts the run calls it, and the slots of it that are used."""

    name: str
    slots: tuple[int, ...]  # ascending

    @property
    def num_slots(self) -> int:
        """How many processes run there."""
        return len(self.slots)


def parse_hostfile(text: str, name: str) -> tuple[Host, ...]:
    """The machines of a hostfile in its order, each with all of its slots; `name` is the file's, for messages.

    Raises ConfigError that names every line that is wrong.
    """
    hosts: dict[str, Host] = {}
    first_lines: dict[str, int] = {}
    faults: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        fault = _line_fault(words)
        if fault is None and words[0] in hosts:
            fault = f"{words[0]} stands in line {first_lines[words[0]]} already. Give each machine one line"
        if fault is not None:
            faults.append(f"{name}, line {number}: {fault}.")
            continue
        first_lines[words[0]] = number
        hosts[words[0]] = Host(words[0], tuple(range(int(words[1].removeprefix("slots=")))))
    if faults:
        raise ConfigError("\n".join(faults))
    if not hosts:
        raise ConfigError(f"{name} names no machine; {_FORM}.")
    return tuple(hosts.values())


def _line_fault(words: list[str]) -> str | None:
    name = words[0]
    if not _HOST_NAME.fullmatch(name):
        return (
            f"{_quoted(name)} is no machine's name, which has letters, digits, dots, hyphens and underscores. "
            "Give an address with other signs, a user or a port a name in ~/.ssh/config"
        )
    if len(words) == 1:
        return f"{name} has no slots; {_FORM}"
    found = _SLOTS.fullmatch(words[1])
    if found is None:
        return f"found {_quoted(words[1])} after {name}; {_FORM}"
    if not 1 <= int(found[1]) <= MOST_SLOTS:
        return f"{name} has slots={found[1]}, expected from 1 to {MOST_SLOTS}"
    if len(words) > 2:
        return f"found {_quoted(' '.join(words[2:]))} after the slots of {name}; a comment begins with #"
    return None


# --- filters ----------------------------------------------------------------------------------------------------------


def included(hosts: Iterable[Host], text: str, name: str) -> tuple[Host, ...]:
    """Only the machines and slots that the filter names, in the hostfile's order; `name` is the setting's."""
    by_name = {host.name: host for host in hosts}
    chosen = {host: slots or by_name[host].slots for host, slots in _parts(by_name, text, name)}
    return tuple(replace(host, slots=chosen[host.name]) for host in by_name.values() if host.name in chosen)


def excluded(hosts: Iterable[Host], text: str, name: str) -> tuple[Host, ...]:
    """All but the machines and slots that the filter names; a machine without a slot left is out, too.

    Raises ConfigError also where nothing is left.
    """
    by_name = {host.name: host for host in hosts}
    out = {host: frozenset(slots or by_name[host].slots) for host, slots in _parts(by_name, text, name)}
    kept = (
        replace(host, slots=tuple(slot for slot in host.slots if slot not in out.get(host.name, ())))
        for host in by_name.values()
    )
    left = tuple(host for host in kept if host.slots)
    if not left:
        raise ConfigError(f"{name} is {_quoted(text)}, which leaves no machine to run on. Leave some out of it.")
    return left


def _parts(hosts: dict[str, Host], text: str, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each machine that a filter names, with its slots in ascending order; no slots are all of them."""
    seen: set[str] = set()
    for part in text.split("@"):
        host, colon, listed = (piece.strip() for piece in part.strip().partition(":"))
        where = f"{name} is {_quoted(text)}: "
        if not host:
            raise ConfigError(f"{where}found no machine in {_quoted(part)}, expected such as worker-1@worker-2:0,2.")
        if host not in hosts:
            near = difflib.get_close_matches(host, hosts, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" It has {_some(hosts)}."
            raise ConfigError(f"{where}the hostfile has no machine {_quoted(host)}.{hint}")
        if host in seen:
            raise ConfigError(f"{where}{host} is named twice. Name it once, with all its slots: {host}:0,1.")
        seen.add(host)
        yield host, _slots(hosts[host], listed, where) if colon else ()


def _slots(host: Host, listed: str, where: str) -> tuple[int, ...]:
    slots = []
    for word in (word.strip() for word in listed.split(",")):
        if not _NUMBER.fullmatch(word):
            raise ConfigError(f"{where}found {_quoted(word)} for a slot of {host.name}, expected a number.")
        if int(word) not in host.slots:
            raise ConfigError(f"{where}{host.name} has no slot {int(word)}; it has slots={host.num_slots}, from 0.")
        if int(word) in slots:
            raise ConfigError(f"{where}slot {int(word)} of {host.name} is named twice.")
        slots.append(int(word))
    return tuple(sorted(slots))


def _some(hosts: Iterable[str], limit: int = 8) -> str:
    names = list(hosts)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _quoted(text: str) -> str:
    shown = text if len(text) <= 60 else f"{text[:60]}…"
    return '"' + "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in shown) + '"'
