"""Reading and writing nested blocks by path."""

from collections.abc import Iterator, Mapping
from typing import Any

from shardwise.config.messages import Path


def put(data: dict[str, Any], path: Path, value: Any) -> None:
    """Set the key at `path`, making the blocks on the way; a block that was written as true or false is spelt out."""
    for part in path[:-1]:
        inner = data.get(str(part))
        if isinstance(inner, bool):
            inner = {"stage": int(inner)}
        data[str(part)] = inner if isinstance(inner, dict) else {}
        data = data[str(part)]
    data[str(path[-1])] = value


def get(data: Any, path: Path) -> Any:
    """The value at `path`, or None where a key or a block on the way is missing."""
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def leaves(data: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Walk the values of nested blocks; an empty block is a value."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value
