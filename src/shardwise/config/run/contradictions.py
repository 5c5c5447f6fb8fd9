"""Two mentions of one setting that differ, and what the user reads about them."""

from collections.abc import Iterator
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
