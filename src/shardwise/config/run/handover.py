"""What a launcher hands to its ranks: everything that was asked for, as one JSON text.

A rank resolves it again together with what its script says, by the same rules.
"""

import json
from typing import Any

from shardwise.config.messages import Path
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.source import Source


def pack(asked: Asked) -> str:
    """Write what was asked for."""
    source = asked.json
    return json.dumps(
        {
            "mentions": {
                name: [[said.value, said.origin, said.place] for said in mentions]
                for name, mentions in asked.mentions.items()
            },
            "json": source and {"name": source.name, "data": source.data, "lines": _packed(source.lines)},
            "file": asked.file,
        }
    )


def unpack(text: str) -> Asked:
    """Read what `pack` wrote."""
    data = json.loads(text)
    mentions = {
        name: tuple(Said(_frozen(value), Origin(origin), place) for value, origin, place in found)
        for name, found in data["mentions"].items()
    }
    source = data["json"]
    if source is not None:
        source = Source(source["name"], source["data"], {tuple(path): line for path, line in source["lines"]})
    return Asked(mentions, source, data["file"])


def _packed(lines: dict[Path, int]) -> list[Any]:
    return [[list(path), line] for path, line in lines.items()]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
