"""From a source to a checked `EngineConfig`: every fault in one error, every key without effect in one warning."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from shardwise.config.catalog import effect_of
from shardwise.config.effects import NoEffect, Unsupported
from shardwise.config.messages import Fault, Path, dotted, expectation, report, shown
from shardwise.config.normalise import Normaliser
from shardwise.config.rules import broken_rules
from shardwise.config.schema import EngineConfig
from shardwise.config.source import Source, read_source
from shardwise.config.values import Block
from shardwise.errors import ConfigError

_logger = logging.getLogger("shardwise.config")


def load_config(source: str | FilePath | Mapping[str, Any] | None) -> EngineConfig:
    """Read and check a config.

    `source` is the path of a JSON file (comments and trailing commas are allowed), a base64 string of JSON, a mapping,
    or None for a config of defaults. Raises one ConfigError that lists all faults. Keys that are known but do not act
    are named, with reasons, in one warning of the logger ``shardwise.config``.
    """
    if isinstance(source, str | FilePath):
        read = read_source(source)
    else:
        read = Source("The config", {} if source is None else source)
    if not isinstance(read.data, Mapping):
        raise ConfigError(f"{read.name} holds {shown(read.data)}, expected a block {{...}} of keys.")

    normaliser = Normaliser(EngineConfig)
    findings = normaliser.findings
    config, faults = _validated(normaliser.block(EngineConfig, read.data))
    idle: list[Fault] = []
    for path, value, field in _given(config):
        effect = effect_of(field)
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(effect, Unsupported) and value != default and not effect.neutral(value):
            faults.append(Fault(path, _refusal(value, default, effect)))
        elif isinstance(effect, NoEffect) and effect.warns and value != default:
            idle.append(Fault(path, f"{effect.reason}."))
    faults.extend(broken_rules(config))

    as_written = [Fault(findings.path_as_written(fault.path), fault.text) for fault in faults]
    all_faults = [*read.faults, *findings.faults, *as_written]
    if all_faults:
        raise ConfigError(report(read.name, all_faults, read.lines))
    if idle:
        rows = (f"\n  {dotted(findings.path_as_written(fault.path))}: {fault.text}" for fault in idle)
        _logger.warning("%s sets keys that have no effect here:%s", read.name, "".join(rows))
    config._auto_keys = tuple(findings.auto_keys)
    return config


def _validated(data: dict[str, Any]) -> tuple[EngineConfig, list[Fault]]:
    """Return the config of all keys that hold a right value, and a fault for each of the others.

    Faulty keys are taken out and the rest is tried again, so that the later checks still see the sound keys.
    """
    faults: list[Fault] = []
    while True:
        try:
            return EngineConfig.model_validate(data), faults
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                path: Path = detail["loc"]
                if detail["type"] == "missing":
                    faults.append(Fault(path, "missing, and it has no default. Add it, or remove the block around it."))
                    _take_out(data, path[:-1])
                else:
                    found, expected = shown(detail["input"]), expectation(detail)
                    faults.append(Fault(path, f"found {found}, expected {expected}."))
                    _take_out(data, path)


def _take_out(data: dict[str, Any], path: Path) -> None:
    """Remove the innermost key of the blocks on `path`, unless an earlier fault has removed it."""
    block: Any = data
    for part in path[:-1]:
        if not isinstance(block.get(part), dict):
            block.pop(part, None)
            return
        block = block[part]
    block.pop(path[-1], None)


def _given(block: Block, path: Path = ()) -> Iterator[tuple[Path, Any, FieldInfo]]:
    """Walk the keys that the user set, with their values."""
    for name, field in type(block).model_fields.items():
        if name not in block.model_fields_set:
            continue
        value = getattr(block, name)
        if isinstance(value, Block):
            yield from _given(value, (*path, name))
        else:
            yield (*path, name), value, field


def _refusal(value: Any, default: Any, effect: Unsupported) -> str:
    return (
        f"found {shown(value)}, which is not supported: {effect.reason}. "
        f"Expected {shown(default)}, which is the default: set it so, or remove the key."
    )
