"""Bringing an old or hand-made config file into the present form."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.config.catalog import effect_of
from shardwise.config.effects import Unsupported
from shardwise.config.load import Checked
from shardwise.config.messages import shown
from shardwise.config.run.file import SECTION, file_mentions, read_run_file
from shardwise.config.run.gather import read_json
from shardwise.config.run.schema import PluginConfig, RunConfig
from shardwise.questionnaire.json_file import precision_in, said_in

_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """One key of the file that becomes another, or goes."""

    key: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class Update:
    """The new content of a file, and how it differs from the old one."""

    run: dict[str, Any]
    changes: tuple[Change, ...]


def updated(path: Path) -> Update:
    """What `path` should hold; ConfigError with all faults of the file, or of the JSON that it names."""
    checked = read_run_file(path)
    run, section = _as_written(checked)
    changes = [*_old_forms(checked, run), *_empty(run, RunConfig), *_empty(section, PluginConfig)]
    changes += _said_by_json(checked, run, section)
    if section and run.get("distributed_type") is None:
        run["distributed_type"] = "DEEPSPEED"
        changes.append(Change("distributed_type", "", "DEEPSPEED", f"{SECTION} asks for ZeRO"))
    return Update(run | {SECTION: section} if section else run, tuple(changes))


def _as_written(checked: Checked[RunConfig]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The top level and the section, with values as the file has them."""
    run = dict(checked.source.data)
    section = dict(run.pop(SECTION, None) or {})
    return run, section


def _old_forms(checked: Checked[RunConfig], run: dict[str, Any]) -> Iterator[Change]:
    if "fp16" in run:
        old = run.pop("fp16")
        reason = "the old form of mixed_precision"
        if checked.block.fp16 and "mixed_precision" not in run:
            run["mixed_precision"] = "fp16"
            yield Change("fp16", shown(old), "mixed_precision: fp16", reason)
        else:
            yield Change("fp16", shown(old), "", reason)
    if run.get("mixed_precision") is False:
        run["mixed_precision"] = "no"
        yield Change("mixed_precision", "false", '"no"', "a bare no is false to some readers")
    for name, field in RunConfig.model_fields.items():
        if name in run and name != SECTION and isinstance(effect_of(field), Unsupported):
            yield Change(name, shown(run.pop(name)), "", "asks for nothing")


def _empty(block: dict[str, Any], schema: type[RunConfig] | type[PluginConfig]) -> Iterator[Change]:
    """Keys that hold null say nothing that their absence does not; one says "no clipping" to a JSON's "auto"."""
    for name in schema.model_fields:
        if name != "gradient_clipping" and block.get(name, _ABSENT) is None:
            del block[name]
            yield Change(name, "null", "", "null says nothing")


def _said_by_json(checked: Checked[RunConfig], run: dict[str, Any], section: dict[str, Any]) -> Iterator[Change]:
    """What the JSON says concretely is its own word: the file's goes."""
    mentions = file_mentions(checked)
    named = mentions.get("deepspeed_config_file")
    if named is None or named.value is None:
        return
    source = read_json(named, checked.source.name)
    words: Mapping[str, Any] = said_in(source)
    for name in [name for name in section if name in words]:
        yield Change(name, shown(section.pop(name)), "", f"{source.name} says {shown(words[name])}")
    if "mixed_precision" in run:
        precision = precision_in(source, str(run["mixed_precision"]))
        if precision is not None:
            yield Change("mixed_precision", shown(run.pop("mixed_precision")), "", f"{source.name} says {precision}")
