"""What the engine does with a key of the JSON: the mark that every key of the schema carries.

A key acts, or it is accepted without effect for a stated reason, or it is refused for a stated reason.
The marks are data: `load.py` obeys them, and `catalog.py` lists them for documentation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _nothing_else(value: Any) -> bool:
    return False


def switched_off(value: Any) -> bool:
    """Whether a block of a foreign feature asks for nothing: empty, or with ``enabled`` false."""
    return isinstance(value, Mapping) and (not value or value.get("enabled") is False)


@dataclass(frozen=True)
class Acts:
    """The key does what `meaning` says."""

    meaning: str
    auto: str = ""  # what the engine chooses for "auto"; empty: the engine cannot choose, "auto" is a fault
    cost: str = ""  # what the value does to memory, traffic or speed; empty: nothing that could be measured


@dataclass(frozen=True)
class NoEffect:
    """The key is accepted and changes nothing, because of `reason`.

    A value other than the default is named in the load's one warning, unless `warns` is False: that is for the
    details of a feature whose own switch already warns or is refused.
    """

    reason: str
    warns: bool = True


@dataclass(frozen=True)
class Unsupported:
    """The key is refused because of `reason`, unless its value is the default or `neutral` says it asks for nothing."""

    reason: str
    neutral: Callable[[Any], bool] = _nothing_else


Effect = Acts | NoEffect | Unsupported


@dataclass(frozen=True)
class Alias:
    """A second name under which the key is accepted."""

    name: str


@dataclass(frozen=True)
class DeepSpeedDefault:
    """A config without the key means something else to DeepSpeed 0.19: there it has the default `value`.

    `note` says what to do about it, or what the same value means there.
    """

    value: Any
    note: str = ""
