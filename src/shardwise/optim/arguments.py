"""Checks of the keyword arguments that a config gives to an optimizer or a scheduler."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from shardwise.config.messages import nearest, shown
from shardwise.errors import ConfigError

Found = TypeVar("Found")

_NUMBERS = (int, float, "int", "float")  # annotations, evaluated or not


def find_by_name(kind: str, name: str, known: Mapping[str, Found]) -> Found:
    """Return the entry called `name`, in any case; ConfigError with the nearest name where there is none."""
    by_lower = {candidate.lower(): entry for candidate, entry in known.items()}
    if name.lower() not in by_lower:
        raise ConfigError(f"{kind}.type is {shown(name)}, which is no {kind} known here. {_hint(name, tuple(known))}")
    return by_lower[name.lower()]


def check_names(
    owner: str,
    call: Callable[..., Any],
    given: Mapping[str, Any],
    supplied: Collection[str],
    extra: Collection[str] = (),
) -> None:
    """Raise ConfigError unless `call` can be called with `given`, by the names of its parameters; no text for numbers.

    `supplied` are parameters that the engine fills itself; `extra` are names that the caller of this check understands
    although `call` does not.
    """
    parameters = inspect.signature(call).parameters
    known = [*(name for name in parameters if name not in supplied), *extra]
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{owner} has no parameter {shown(name)}. {_hint(name, known)}")
        # Some constructors of torch keep such a value and fail at a later step.
        if isinstance(value, str) and name in parameters and parameters[name].annotation in _NUMBERS:
            raise ConfigError(f"{owner} has {name} = {shown(value)}, expected a number. Write it without quotes.")
    missing = [
        name
        for name in known
        if name in parameters and parameters[name].default is inspect.Parameter.empty and name not in given
    ]
    if missing:
        raise ConfigError(f"{owner} needs {', '.join(missing)}, which its params do not give. Add them.")


def construct(owner: str, call: Callable[..., Found], *args: Any, **given: Any) -> Found:
    """Call a constructor of torch, and turn its refusal of a value into a ConfigError."""
    try:
        return call(*args, **given)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        values = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
        raise ConfigError(f"{owner} refuses its params ({values}): {error}. Change the value that it names.") from error


def number(name: str, value: Any, at_least: float = 0.0) -> float:
    """Return a finite number of at least `at_least`; ConfigError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < at_least:
        raise ConfigError(f"{name} is {shown(value)}, expected a number of at least {at_least:g}. Change it.")
    return float(value)


def count(name: str, value: Any, at_least: int = 0) -> int:
    """Return a whole number of at least `at_least`, written as 1000 or 1e3; ConfigError for anything else."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < at_least:
        raise ConfigError(f"{name} is {shown(value)}, expected a whole number of at least {at_least}. Change it.")
    return int(value)


def switch(name: str, value: Any) -> bool:
    """Return a bool; ConfigError for anything else."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}, expected true or false. Change it.")
    return value


def per_group(name: str, value: Any, num_groups: int) -> list[float]:
    """Return one number a parameter group, from one number for all or a list of them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [number(name, value)] * num_groups
    if len(value) != num_groups:
        raise ConfigError(
            f"{name} lists {len(value)} values, but the optimizer has {num_groups} parameter groups. "
            "Give one value for each group, or one number for all."
        )
    return [number(f"{name}[{place}]", item) for place, item in enumerate(value)]


def _hint(name: str, known: Sequence[str]) -> str:
    """Return the nearest of the known names, and all of them."""
    neighbour = nearest(name, known)
    meant = f'Did you mean "{neighbour}"? ' if neighbour else ""
    return f"{meant}Known names: {', '.join(known)}."
