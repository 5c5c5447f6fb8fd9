"""What each machine of a run is told, as one argument of a command line.

It is JSON in which only letters, digits and a few signs of JSON itself stand for themselves: every other character is
written as JSON's own escape `\\uXXXX`. So no shell (sh, csh, fish), no `%n` of pdsh and no `$(…)` of Kubernetes finds
anything in it to act on, and it can still be read. `node` unpacks it on the machine, from the standard library alone.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shardwise.launch.hostfile import Host
from shardwise.launch.job import Device, FaultPolicy, LaunchRequest, Meeting, ProgramKind

_NOT_SAFE = re.compile(r"\\u[0-9a-f]{4}|\\.|[^A-Za-z0-9 _.,:/+=@{}\[\]\"-]")
_SHORT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True)
class Capsule:
    """One run, as all of its machines are told."""

    hosts: tuple[Host, ...]  # by machine rank
    request: LaunchRequest  # the meeting's machine rank is left to each machine
    asked: str  # as `config.run.handover` packs it
    directory: str  # to work in
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment, to set

    def pack(self) -> str:
        """Write it; the directory, the variables and the machines' names stand where `node` reads them."""
        return packed(
            {
                "hosts": [[host.name, list(host.slots)] for host in self.hosts],
                "directory": self.directory,
                "variables": dict(self.variables),
                "request": asdict(self.request),
                "asked": self.asked,
            }
        )

    @classmethod
    def unpack(cls, text: str) -> "Capsule":
        """Read what `pack` wrote."""
        data = json.loads(text)
        hosts = tuple(Host(name, tuple(slots)) for name, slots in data["hosts"])
        return cls(hosts, _request(data["request"]), data["asked"], data["directory"], data["variables"])

    def request_of(self, machine_rank: int) -> LaunchRequest:
        """What machine `machine_rank` is asked to run."""
        return request_on(self.hosts, machine_rank, self.request)


def request_on(hosts: tuple[Host, ...], machine_rank: int, request: LaunchRequest) -> LaunchRequest:
    """`request` as it is for one of the hosts: its own number of processes, and its own GPUs if only some are used."""
    host = hosts[machine_rank]
    first_ones = host.slots == tuple(range(host.num_slots))
    return replace(
        request,
        meeting=replace(request.meeting, machine_rank=machine_rank),
        num_processes=sum(each.num_slots for each in hosts),
        num_local_processes=host.num_slots,
        gpu_ids=() if first_ones else tuple(map(str, host.slots)),
        places={**request.places, "gpu_ids": f"slots of {host.name}"},
    )


def packed(data: Any) -> str:
    """JSON without a character that means something to a shell inside of single quotes, or to what comes before it."""
    return _NOT_SAFE.sub(_escaped, json.dumps(data, separators=(",", ":")))


def _escaped(found: re.Match[str]) -> str:
    text = found[0]
    if text.startswith("\\u"):
        return text
    sign = _SHORT.get(text[1], text[1]) if text.startswith("\\") else text
    return f"\\u{ord(sign):04x}"


def _request(data: dict[str, Any]) -> LaunchRequest:
    return LaunchRequest(
        **data
        | {
            "arguments": tuple(data["arguments"]),
            "kind": ProgramKind(data["kind"]),
            "device": data["device"] and Device(data["device"]),
            "meeting": Meeting(**data["meeting"]),
            "gpu_ids": tuple(data["gpu_ids"]),
            "made_for_gpus": tuple(data["made_for_gpus"]),
            "faults": FaultPolicy(**data["faults"]),
        }
    )
