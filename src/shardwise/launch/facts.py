"""What must be the same on every machine of a run, and the words for a machine on which it is not.

Machines that differ in one of these train apart, or fail late and far from the cause. Machine 0's are the measure.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwise.config.messages import dotted, shown
from shardwise.config.run.nested import leaves
from shardwise.launch.job import Job, ProgramKind

# What each machine may say its own way: its place in the run, its own devices, its own paths of files.
_EACH_ITS_OWN = frozenset(
    {
        "machine_rank",
        "gpu_ids",
        "main_process_ip",
        "deepspeed_config_file",
        "deepspeed_hostfile",  # where machines read one each: what it says counts, as numbers of machines and processes
        "deepspeed_multinode_launcher",
    }
)
_VERSIONS = ("shardwise", "torch", "python")


def facts_of(job: Job, asked: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """This machine's facts; `asked` is what `config.run.handover` packs."""
    data = json.loads(asked)
    settings = {
        name: mentions[0][0]
        for name, mentions in data.get("mentions", {}).items()
        if mentions and name not in _EACH_ITS_OWN
    }
    concrete = (data.get("json") or {}).get("data") or {}
    return {
        **versions,
        "device": str(job.device),
        "number of machines": job.meeting.num_machines,
        "number of processes": job.num_processes,
        "script": _digest(job),
        **{f"setting {name}": value for name, value in settings.items()},
        **{f"DeepSpeed JSON's {dotted(path)}": value for path, value in leaves(concrete)},
    }


def versions_here() -> dict[str, str]:
    """The versions that must agree; of Python its last number is free."""
    import torch

    from shardwise import __version__

    return {
        "shardwise": __version__,
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def differences(reference: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """Each fact that is not the same, in words, with machine 0's first."""
    for name in dict.fromkeys((*reference, *other)):
        here, there = reference.get(name), other.get(name)
        if here == there:
            continue
        if name == "script":
            yield "another text in the script"
        elif name in _VERSIONS:
            yield f"{name} {there} instead of {here}"
        else:
            yield f"{name} {shown(there)} instead of {shown(here)}"


def _digest(job: Job) -> str:
    """Of the script's text; a directory, a module and an executable have none that is looked for."""
    path = Path(job.program)
    if job.kind is not ProgramKind.SCRIPT or not path.is_file():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()
