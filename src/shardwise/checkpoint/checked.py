"""JSON of a file that anybody may have written, as the types that it should have: all else is a ValueError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from shardwise.checkpoint.tree import DTYPES

MAX_INTEGER = 1 << 62
"""Beyond what any length or count may be, and far within what the arithmetic of tensors takes."""
_SHOWN = 60  # characters of what was found

T = TypeVar("T")


def found(value: Any) -> str:
    """A value for a message, short whatever it is."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "a huge number"
    return repr(value)[:_SHOWN]


def anything(value: Any) -> Any:
    """What somebody else will check."""
    return value


def integer(value: Any, low: int = 0, high: int = MAX_INTEGER) -> int:
    """A whole number from ``low`` to ``high``, and no truth value."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{found(value)} where a whole number from {low} on was expected")
    return value


def text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"{found(value)} where a text was expected")
    return value


def truth(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{found(value)} where true or false was expected")
    return value


def dtype_name(value: Any) -> str:
    """One of safetensors' words for a dtype."""
    if text(value) not in DTYPES:
        raise ValueError(f"{found(value)} where the name of a dtype was expected")
    return str(value)


def members(value: Any, of: Callable[[Any], T]) -> tuple[T, ...]:
    """A list, each member as ``of`` checks it."""
    if not isinstance(value, list):
        raise ValueError(f"{found(value)} where a list was expected")
    return tuple(of(each) for each in value)


def table(value: Any, of: Callable[[Any], T]) -> dict[str, T]:
    """An object, each value as ``of`` checks it."""
    if not isinstance(value, dict):
        raise ValueError(f"{found(value)} where an object was expected")
    return {key: of(each) for key, each in value.items()}


def record(value: Any, *names: str) -> dict[str, Any]:
    """An object that has exactly these members."""
    given = table(value, anything)
    if set(given) != set(names):
        odd = sorted(set(given) ^ set(names))
        raise ValueError(f"an object that has, or lacks, {', '.join(map(found, odd[:3]))}")
    return given


def optional(value: Any, of: Callable[[Any], T]) -> T | None:
    """None, or what ``of`` checks."""
    return None if value is None else of(value)
