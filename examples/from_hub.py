"""What examples fetch from the Hugging Face hub, with one way to say that it cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardwise.errors import ConfigError


def from_hub(what: str, load: Callable[[], Any], instead: str) -> Any:
    """What ``load`` gives.

    Args:
        what: the option and its value, as the user wrote them.
        load: reads from a local folder, from the hub's cache or from the hub.
        instead: what to do on a machine without the hub.

    Raises:
        ConfigError: the hub cannot be reached, it has no such thing, or a package for it is missing.
    """
    try:
        return load()
    except ImportError as error:
        raise ConfigError(f"{what} needs the package {error.name}: `pip install {error.name}`. {instead}") from None
    except (OSError, ValueError) as error:  # ConnectionError is an OSError; a name that does not exist is either
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{what} cannot be had: {reason} {instead}") from None


def load_split_dataset(name: str, config_name: str | None, instead: str) -> Any:
    """A data set of the hub by ``--dataset_name``, as a dict of its splits; ConfigError as in ``from_hub``."""

    def load() -> Any:
        from datasets import load_dataset

        return load_dataset(name, config_name)

    return from_hub(f"--dataset_name {name}", load, instead)
