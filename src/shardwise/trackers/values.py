"""What scripts log, in the forms that trackers take: plain numbers, and flat dicts of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

_logger = logging.getLogger(__name__)

SCALARS = (bool, int, float, str)


def plain(value: Any) -> Any:
    """Numbers of torch and NumPy as Python's, inside of dicts and lists too; everything else as it is.

    An array of one element is a number, whatever its shape.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    # bool, int, float and str first: NumPy's float64 is a float, too.
    if isinstance(value, SCALARS) or not hasattr(value, "item"):
        return value
    return value.item() if _num_elements(value) == 1 else value


def _num_elements(value: Any) -> int | None:
    if hasattr(value, "numel"):  # a tensor; NumPy calls it size
        return int(value.numel())
    size = getattr(value, "size", None)
    return size if isinstance(size, int) else None


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as one, with names such as ``optimizer/lr``; values are ``plain``."""
    return dict(_leaves(plain(values), ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


class LeftOut:
    """Says once a name what a tracker cannot hold: the rest of the values shall reach it all the same."""

    def __init__(self, tracker: str) -> None:
        self._tracker = tracker
        self._told: set[str] = set()

    def tell(self, name: str, value: Any, expected: str) -> None:
        """``value`` was not written, because it is not what is ``expected``."""
        if name not in self._told:
            self._told.add(name)
            _logger.warning(
                "the tracker %r leaves out %r: it is a %s, expected %s",
                self._tracker,
                name,
                type(value).__name__,
                expected,
            )
