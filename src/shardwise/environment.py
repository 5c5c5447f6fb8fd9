"""Reading environment variables, and changing them for a while: for scripts and launchers, never for the engine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from shardwise.errors import ConfigError

TRUE_WORDS = ("1", "t", "true", "y", "yes", "on")
FALSE_WORDS = ("0", "f", "false", "n", "no", "off")


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """What ``value`` says: 1 or 0, or with ``to_bool`` True or False.

    Raises:
        ConfigError: it is no word for yes or no.
    """
    word = str(value).strip().lower()
    if word not in (*TRUE_WORDS, *FALSE_WORDS):
        raise ConfigError(f"{value!r} says neither yes nor no: expected one of {', '.join(TRUE_WORDS + FALSE_WORDS)}.")
    return word in TRUE_WORDS if to_bool else int(word in TRUE_WORDS)


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """The environment variable ``key`` as yes or no; ``default`` where it is not set.

    Raises:
        ConfigError: it is set to something else.
    """
    value = os.environ.get(key)
    if value is None:
        return default
    try:
        return bool(str_to_bool(value))
    except ConfigError as error:
        raise ConfigError(f"environment variable {key}: {error}") from None


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """The environment variable ``key``; ``default`` where it is not set."""
    return os.environ.get(key, default)


def get_int_from_env(env_keys: Iterable[str], default: int) -> int:
    """The first of these variables that holds a number of at least 0; ``default`` where none does."""
    for key in env_keys:
        value = int(os.environ.get(key, "-1"))
        if value >= 0:
            return value
    return default


@contextmanager
def patch_environment(**variables: Any) -> Iterator[None]:
    """Set environment variables (names in capitals, values as text) inside the block; then all are as before.

    Only these: what the block changes beside them stays.
    """
    wanted = {name.upper(): str(value) for name, value in variables.items()}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def clear_environment() -> Iterator[None]:
    """An empty environment inside the block; then it is as before, whatever the block set."""
    before = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
