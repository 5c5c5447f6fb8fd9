"""What a user reads when a config is wrong: each fault with its key, all faults in one error."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_unicode": "a string of valid characters",
    "string_too_short": "a string that is not empty",
    "dict_type": "a block {...}",
    "model_type": "a block {...}",
    "list_type": "a list [...]",
    "tuple_type": "a list [...]",
    "finite_number": "a finite number",
}


@dataclass(frozen=True)
class Fault:
    """One thing wrong: the key, and a sentence that says what was found, what was expected and what to do."""

    path: Path
    text: str


def dotted(path: Path) -> str:
    """Write a path as users write it: ``leaf_module.classes[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown(value: object) -> str:
    """Write a found value as JSON does, shortened."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return the known name that `name` most likely meant, without regard to case; None if none is near.

    `likeness` is difflib's ratio, from 0 (nothing in common) to 1 (the same).
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=likeness)
    return by_lower[found[0]] if found else None


def expectation(error: Mapping[str, Any]) -> str:
    """Return in words what a pydantic error expected."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return f"one of {str(context['expected']).replace(chr(39), chr(34))}"
    if kind == "multiple_of":
        return f"a multiple of {context['multiple_of']}"
    for bound, word in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if bound in context:
            limit = context[bound]
            return f"a number {word} {limit:g}" if isinstance(limit, float) else f"a number {word} {limit}"
    return _EXPECTED.get(kind) or str(error["msg"])


def report(source: str, faults: Sequence[Fault], lines: Mapping[Path, int]) -> str:
    """Write all faults of one source, in the order of its lines where it has lines."""
    placed = [(_line_of(fault.path, lines), fault) for fault in faults]
    if lines:
        placed.sort(key=lambda pair: pair[0] or 0)
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    rows = [
        f"  {f'line {line}, ' if line else ''}{f'{dotted(fault.path)}: ' if fault.path else ''}{fault.text}"
        for line, fault in placed
    ]
    return "\n".join([f"{source} has {count}:", *rows])


def _line_of(path: Path, lines: Mapping[Path, int]) -> int | None:
    """Return the line of the key, or of the nearest block around it."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None
