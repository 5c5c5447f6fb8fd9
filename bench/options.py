"""Types of command-line options that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import TypeVar

Value = TypeVar("Value")


def at_least(minimum: int) -> Callable[[str], int]:
    """A whole number that is not below ``minimum``."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"found {text}; expected a whole number of at least {minimum}")
        return int(text)

    return whole_number


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """A name among ``known``."""

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"found {text}; expected one of: {', '.join(known)}")
        return text

    return name


def comma_separated(item: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """A comma-separated list of what ``item`` accepts."""

    def items(text: str) -> list[Value]:
        return [item(part.strip()) for part in text.split(",")]

    return items
