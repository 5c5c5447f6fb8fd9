"""What a run was asked to be, built from texts as `gather` builds it from files."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from shardwise.config.run.file import checked_run, file_mentions, flag_mentions
from shardwise.config.run.precedence import resolve
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.run.yaml_text import parse_yaml
from shardwise.config.source import parse
from shardwise.errors import ConfigError

YAML_NAME = "run.yaml"
JSON_NAME = "ds.json"


def asked_of(
    yaml: str | None = None,
    ds_config: str | Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    code: Mapping[str, Any] | None = None,
) -> Asked:
    """Collect what a YAML, a DeepSpeed JSON (its text, or its data), flags and a script's arguments say."""
    mentions = {} if yaml is None else file_mentions(checked_run(parse_yaml(yaml, YAML_NAME)))
    text = ds_config if ds_config is None or isinstance(ds_config, str) else json.dumps(ds_config, indent=2)
    source = None if text is None else parse(text, JSON_NAME)
    asked = Asked({name: (said,) for name, said in mentions.items()}, source, None if yaml is None else YAML_NAME)
    asked = asked.stronger(flag_mentions(flags or {}))
    return asked.stronger({name: in_code(name, value) for name, value in (code or {}).items()})


def in_code(name: str, value: Any) -> Said:
    """A mention by the script."""
    return Said(value, Origin.CODE, f"DeepSpeedPlugin({name}=…)")


def resolved_of(*args: Any, **kwargs: Any):
    """Resolve what `asked_of` collects."""
    return resolve(asked_of(*args, **kwargs))


def error_of(*args: Any, **kwargs: Any) -> str:
    """The text of the ConfigError that these texts end in, while they are read or while they are resolved."""
    with pytest.raises(ConfigError) as caught:
        resolved_of(*args, **kwargs)
    assert type(caught.value) is ConfigError
    return str(caught.value)


def line_of(text: str, fragment: str) -> int:
    """The number of the first line of `text` that holds `fragment`."""
    return next(number for number, line in enumerate(text.splitlines(), 1) if fragment in line)
