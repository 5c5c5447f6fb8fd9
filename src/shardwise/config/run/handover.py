"""What a launcher hands to its ranks: everything that was asked for, as one JSON text.

A rank resolves it again together with what its script says, by the same rules.
"""

import json
from typing import Any

from shardwise.config.messages import Fault, Path
from shardwise.config.run.file import default_of
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
            "json": source and _packed(source),
            "file": asked.file,
        }
    )


def unpack(text: str) -> Asked:
    """Read what `pack` wrote."""
    data = json.loads(text)
    mentions = {
        name: tuple(Said(_typed(name, value), Origin(origin), place) for value, origin, place in found)
        for name, found in data["mentions"].items()
    }
    return Asked(mentions, data["json"] and _unpacked(data["json"]), data["file"])


def _packed(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "data": source.data,
        "lines": list(source.lines.items()),
        "faults": [(fault.path, fault.text) for fault in source.faults],
    }


def _unpacked(data: dict[str, Any]) -> Source:
    lines: dict[Path, int] = {tuple(path): line for path, line in data["lines"]}
    faults = [Fault(tuple(path), text) for path, text in data["faults"]]
    return Source(data["name"], data["data"], lines, faults)


def _typed(name: str, value: Any) -> Any:
    """JSON has no tuples, which some settings hold."""
    return tuple(value) if isinstance(default_of(name), tuple) else value
