"""What a DeepSpeed JSON that an answer or a config file names has to say."""

from typing import Any

from shardwise.config.load import given_keys
from shardwise.config.messages import Path
from shardwise.config.run.gather import read_json
from shardwise.config.run.precedence import resolve
from shardwise.config.run.resolved import IN_JSON, PRECISIONS, checked_json
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.source import Source
from shardwise.errors import ConfigError

_AUTO = "auto"


def json_fault(path: str) -> str | None:
    """All faults of a JSON file as one text, by the rules that the launcher checks it by; None if it has none."""
    try:
        resolve(Asked(json=_named(path)))
    except ConfigError as error:
        return str(error)
    return None


def json_stage(path: str | None) -> int | str | None:
    """The ZeRO stage of a sound JSON, or "auto"; None without a file."""
    if path is None:
        return None
    checked = checked_json(_named(path))
    stage = IN_JSON["zero_stage"]
    return _AUTO if stage in checked.findings.autos else checked.block.zero_optimization.stage


def json_leaves_open(path: str | None, setting: str) -> bool:
    """Whether a sound JSON has no word of its own on a setting; so it is without a file."""
    return path is None or setting not in said_in(_named(path))


def said_in(source: Source) -> dict[str, Any]:
    """Settings of a run on which a JSON has a concrete word, and that word; ConfigError with all its faults."""
    typed = typed_keys(source)
    return {name: typed[path] for name, path in IN_JSON.items() if path in typed}


def precision_in(source: Source, wanted: str) -> str | None:
    """The compute dtype that a JSON names, or "no" where it switches the wanted one off; None where it is silent."""
    typed = typed_keys(source)
    on = next((dtype for dtype in PRECISIONS if typed.get((dtype, "enabled"))), None)
    return on or ("no" if typed.get((wanted, "enabled")) is False else None)


def typed_keys(source: Source) -> dict[Path, Any]:
    """Every concrete value of a JSON by its path; ConfigError with all its faults."""
    return {path: value for path, value, _ in given_keys(checked_json(source).block)}


def _named(path: str) -> Source:
    return read_json(Said(path, Origin.FILE, "your answer"))
