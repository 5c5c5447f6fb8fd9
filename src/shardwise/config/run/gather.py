"""Collecting what was asked for: flags, the YAML from its place, and the DeepSpeed JSON that either of them names."""

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from shardwise.config.run.file import file_mentions, flag_mentions, read_run_file
from shardwise.config.run.places import accelerate_default, own_default
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.source import Source, read_source
from shardwise.errors import ConfigError


def gather(
    flags: Mapping[str, Any], config_file: FilePath | None, environ: Mapping[str, str]
) -> tuple[Asked, tuple[str, ...]]:
    """Return what was asked for, and notes for the screen about files that nobody named.

    `flags` holds each given flag by the name of its setting; `config_file` is the YAML that was named, else the default
    places are looked at. Raises ConfigError with all faults of the flags, of the YAML, or of the JSON's syntax.
    """
    spoken = flag_mentions(flags)
    mentions, file, notes = _file(config_file, environ)
    asked = Asked({name: (said,) for name, said in mentions.items()}, None, file).stronger(spoken)
    named = asked.said("deepspeed_config_file")
    if named is None or named.value is None:
        return asked, notes
    return Asked(asked.mentions, read_json(named, file), file), notes


def read_json(named: Said, file: str | None = None) -> Source:
    """Read the DeepSpeed JSON that a setting names: from the working directory, else from beside the YAML."""
    try:
        path = FilePath(named.value).expanduser()
        beside = FilePath(file).parent / path if file is not None and named.origin is Origin.FILE else path
        found = next((place for place in (path, beside) if place.is_file()), None)
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that nobody has
        raise ConfigError(f"deepspeed_config_file ({named.place}) cannot be read: {error}.") from None
    if found is None:
        looked = " nor ".join(dict.fromkeys(str(place.absolute()) for place in (path, beside)))
        raise ConfigError(
            f"deepspeed_config_file is {named.value} ({named.place}), and there is no file {looked}. "
            "Give the path of a DeepSpeed JSON."
        )
    return read_source(found)


def _file(
    config_file: FilePath | None, environ: Mapping[str, str]
) -> tuple[dict[str, Said], str | None, tuple[str, ...]]:
    if config_file is not None:
        return file_mentions(read_run_file(config_file)), str(config_file), ()
    own = own_default(environ)
    if own.is_file():
        return file_mentions(read_run_file(own)), str(own), ()
    foreign = accelerate_default(environ)
    if foreign is None:
        return {}, None, ()
    try:
        mentions = file_mentions(read_run_file(foreign))
    except ConfigError as error:  # nobody named this file, so its faults are not this run's
        return {}, None, (f"Accelerate's {foreign} is left aside. {error}",)
    return mentions, str(foreign), (f"Settings come from Accelerate's {foreign}; `shardwise config` makes our own.",)
