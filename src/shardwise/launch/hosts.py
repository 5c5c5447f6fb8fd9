"""Which machines a run uses, and what starts it there: from the settings, the hostfile and Slurm's allocation."""

import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shardwise.config.run.said import Origin, Said
from shardwise.errors import ConfigError
from shardwise.launch.hostfile import Host, excluded, included, parse_hostfile

BY_HAND, ON_EACH = "standard", "nossh"  # the launchers that start nothing on another machine
FIRST_CHOICE = "pdsh"  # where a hostfile is given and no launcher
# The others end all machines when one is lost, or tell no more than the worst of their ends.
GO_ON_WITH_FEWER = (BY_HAND, ON_EACH, "ssh")
DEFAULT_PORT = 29500  # as torchrun's
_IN_ALLOCATION = "slurm"
_FILTERS = ("deepspeed_inclusion_filter", "deepspeed_exclusion_filter")


@dataclass(frozen=True)
class Fleet:
    """The machines of a run by rank, and the launcher that reaches them."""

    launcher: str
    hosts: tuple[Host, ...]
    notes: tuple[str, ...] = ()  # for the screen, on settings that were not followed to the letter


def fleet_from(values: Mapping[str, Said], environ: Mapping[str, str]) -> Fleet | None:
    """The machines that the settings name; None where the run has one, or is started by hand on each.

    Raises ConfigError about the hostfile, a filter, the numbers or Slurm's allocation.
    """
    launcher, hostfile = launcher_of(values), values["deepspeed_hostfile"]
    machines = values["num_machines"]
    alone = machines.value == 1 and (machines.origin is not Origin.DEFAULT or hostfile.value is None)
    if alone and launcher != _IN_ALLOCATION:
        return None
    if launcher == BY_HAND:
        for name in ("deepspeed_hostfile", *_FILTERS):
            if values[name].value is not None:
                raise ConfigError(
                    f"{name} is {values[name]}, but deepspeed_multinode_launcher is {BY_HAND}, which is you: no list "
                    "of machines is read. Leave one of them out: without a launcher a hostfile means pdsh."
                )
        return None
    if hostfile.value is not None:
        hosts, notes = _listed(values)
    elif launcher == _IN_ALLOCATION:
        if "SLURM_JOB_NODELIST" not in environ and machines.value == 1 and machines.origin is not Origin.DEFAULT:
            return None
        hosts, notes = _allocated(values, environ)
    else:
        raise ConfigError(
            f"deepspeed_multinode_launcher is {values['deepspeed_multinode_launcher']}, which needs a list of the "
            f"{machines} machines. Give --deepspeed_hostfile, a file with a line such as: worker-1 slots=4. Or run the "
            f"same command on each machine, with --deepspeed_multinode_launcher {BY_HAND} and its own --machine_rank."
        )
    return Fleet(launcher, hosts, tuple(notes))


def launcher_of(values: Mapping[str, Said]) -> str:
    """The launcher that was named, or else the one that fits what was said."""
    named = values["deepspeed_multinode_launcher"].value
    return str(named or (FIRST_CHOICE if values["deepspeed_hostfile"].value is not None else BY_HAND))


def idle_lists(values: Mapping[str, Said]) -> Iterator[str]:
    """Notes on lists of machines that a run on this machine alone does not read."""
    machines = values["num_machines"]
    for name in ("deepspeed_hostfile", *_FILTERS):
        if values[name].value is not None and machines.value == 1:
            reason = f"num_machines is {machines}"
            if machines.origin is Origin.DEFAULT:
                if values["deepspeed_hostfile"].value is not None:
                    continue
                reason = "there is no deepspeed_hostfile"
            yield f"{name}: {values[name]} has no effect: {reason}."


def own_rank(hosts: tuple[Host, ...], machine_rank: Said) -> int:
    """This machine's place among the hosts: what was said, or else by its name."""
    if machine_rank.origin is not Origin.DEFAULT:
        if machine_rank.value >= len(hosts):
            raise ConfigError(f"machine_rank is {machine_rank}, expected less than {len(hosts)}, the machines' number.")
        return int(machine_rank.value)
    name = socket.gethostname()
    short = name.partition(".")[0]
    found = [rank for rank, host in enumerate(hosts) if host.name in (name, short)]
    if not found:
        raise ConfigError(
            f"the hostfile has no machine {name}, which is this one's name. Give --machine_rank: its place in the "
            "hostfile, from 0."
        )
    return found[0]


def first_address(hosts: tuple[Host, ...], main_process_ip: Said) -> str:
    """Where the machines meet."""
    if main_process_ip.value:
        return str(main_process_ip.value)
    name = hosts[0].name
    if len(hosts) > 1 and (name.startswith("localhost") or name.startswith("127.")):
        raise ConfigError(
            f"the first machine is {name}, where the others would look for it on themselves. Give it another name in "
            "the hostfile, or give --main_process_ip, an address of it that all can reach."
        )
    return name


# --- lists ------------------------------------------------------------------------------------------------------------


def _listed(values: Mapping[str, Said]) -> tuple[tuple[Host, ...], list[str]]:
    said = values["deepspeed_hostfile"]
    try:
        path = Path(said.value).expanduser()
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, ValueError) as error:  # also a home that nobody has, a null byte, no text
        raise ConfigError(
            f"deepspeed_hostfile is {said}, which cannot be read: {error}. "
            "Give a text file with a line for each machine, such as: worker-1 slots=4"
        ) from None
    hosts = parse_hostfile(text, str(path))
    include, exclude = (values[name] for name in _FILTERS)
    if include.value is not None and exclude.value is not None:
        raise ConfigError(
            f"deepspeed_inclusion_filter is {include}, and deepspeed_exclusion_filter is {exclude}. Give one of them."
        )
    if include.value is not None:
        hosts = included(hosts, include.value, _FILTERS[0])
    if exclude.value is not None:
        hosts = excluded(hosts, exclude.value, _FILTERS[1])
    notes: list[str] = []
    hosts = _first_machines(hosts, values["num_machines"], "the hostfile and its filters name", notes)
    filtered = include.value is not None or exclude.value is not None
    return _first_slots(hosts, values["num_processes"], filtered, notes), notes


def _allocated(values: Mapping[str, Said], environ: Mapping[str, str]) -> tuple[tuple[Host, ...], list[str]]:
    listed = environ.get("SLURM_JOB_NODELIST")
    if not listed:
        raise ConfigError(
            f"deepspeed_multinode_launcher is {values['deepspeed_multinode_launcher']}, and this is no allocation of "
            "Slurm's. Run the command under salloc or sbatch; --slurm-script FILE writes a script for sbatch."
        )
    notes: list[str] = []
    names = _slurm_names(listed)
    each = (Host(name, ()) for name in names)
    hosts = _first_machines(tuple(each), values["num_machines"], "Slurm's allocation has", notes)
    processes = values["num_processes"]
    if processes.value is None:
        raise ConfigError(
            f"Slurm's allocation has {len(hosts)} machines, and nobody says how many processes they run. "
            "Give --num_processes: it counts those of all machines."
        )
    if processes.value % len(hosts):
        raise ConfigError(
            f"num_processes is {processes}, expected a multiple of {len(hosts)}, the machines of Slurm's allocation."
        )
    slots = tuple(range(processes.value // len(hosts)))
    return tuple(replace(host, slots=slots) for host in hosts), notes


def _slurm_names(listed: str) -> list[str]:
    """The names in a list of Slurm's, such as node[01-04,07]; Slurm itself knows best how they are written."""
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"`scontrol show hostnames {listed}` fails ({error}), so the machines of the allocation are unknown. "
            "Debian and Ubuntu have it in the package slurm-client."
        ) from None
    return found.stdout.split()


def _first_machines(hosts: tuple[Host, ...], asked: Said, who: str, notes: list[str]) -> tuple[Host, ...]:
    if asked.origin is Origin.DEFAULT or asked.value == len(hosts):
        return hosts
    if asked.value > len(hosts):
        raise ConfigError(f"num_machines is {asked}, but {who} {len(hosts)}. Add some, or ask for fewer.")
    notes.append(f"num_machines is {asked}: of the {len(hosts)} machines the first are used.")
    return hosts[: asked.value]


def _first_slots(hosts: tuple[Host, ...], asked: Said, filtered: bool, notes: list[str]) -> tuple[Host, ...]:
    total = sum(host.num_slots for host in hosts)
    if asked.value is None or asked.value == total:
        return hosts
    if filtered:
        words = f"num_processes is {asked}, but the filter chooses {total} slots"
        if asked.origin is Origin.FLAG:
            raise ConfigError(f"{words}. Leave one of them out.")
        notes.append(f"{words}, and so many run.")
        return hosts
    each, rest = divmod(asked.value, len(hosts))
    short = next((host for host in hosts if host.num_slots < each), None)
    if rest or short is not None:
        why = f"{short.name} has slots={short.num_slots}" if short and not rest else f"they have {len(hosts)} machines"
        raise ConfigError(
            f"num_processes is {asked}, expected {total}, the slots of the hostfile, or fewer, the same number on "
            f"every machine; but {why}. Choose others with --deepspeed_inclusion_filter."
        )
    return tuple(replace(host, slots=host.slots[:each]) for host in hosts)
