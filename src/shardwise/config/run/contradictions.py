"""Mentions that cannot hold together, and what the user reads about them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardwise.config.run.said import Asked, Origin, Said


@dataclass(frozen=True)
class Pair:
    """Two mentions of one setting."""

    name: str
    one: Said
    other: Said

    @property
    def agrees(self) -> bool:
        """Whether they say the same; "no device" and "no path" have several spellings."""
        return bool(_plain(self.one.value) == _plain(self.other.value))

    def __str__(self) -> str:
        return f"{self.name}: {self.one} {'and' if self.agrees else 'but'} {self.other}"


def _plain(value: Any) -> Any:
    return None if value == "none" else list(value) if isinstance(value, tuple) else value


def code_against_flags(asked: Asked) -> Iterator[Pair]:
    """A script's arguments win over the YAML, but a flag that somebody typed is never dropped."""
    for name, mentions in asked.mentions.items():
        code = next((said for said in mentions if said.origin is Origin.CODE), None)
        flag = next((said for said in mentions if said.origin is Origin.FLAG), None)
        if code is not None and flag is not None:
            pair = Pair(name, flag, code)
            if not pair.agrees:
                yield pair


def misfits(values: Mapping[str, Said]) -> Iterator[str]:
    """Settings that only fit each other or not once it is known who wins: a flag and the YAML share them out.

    A hostfile says by itself how many machines there are, and how many processes each of them runs.
    """
    if values["deepspeed_hostfile"].value is not None:
        return
    processes, machines, rank = (values[name] for name in ("num_processes", "num_machines", "machine_rank"))
    if processes.value is not None and processes.value % machines.value:
        yield (
            f"num_processes is {processes}, expected a multiple of num_machines, which is {machines}: it counts the "
            "processes of all machines, and each machine runs as many as the others."
        )
    if rank.value >= machines.value:
        yield (
            f"machine_rank is {rank}, expected less than num_machines, which is {machines}: machines count from 0. "
            "Set both."
        )
