"""From a source to a checked `EngineConfig`: every fault in one error, every key without effect in one warning."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from shardwise.config.catalog import effect_of
from shardwise.config.effects import NoEffect, Unsupported
from shardwise.config.messages import Fault, Path, dotted, expectation, report, shown
from shardwise.config.normalise import Findings, Normaliser
from shardwise.config.rules import broken_rules
from shardwise.config.schema import EngineConfig
from shardwise.config.source import Source, read_source
from shardwise.config.values import Block
from shardwise.errors import ConfigError

_logger = logging.getLogger("shardwise.config")

BlockType = TypeVar("BlockType", bound=Block)


def load_config(source: str | FilePath | Mapping[str, Any] | None) -> EngineConfig:
    """Read and check a config.

    `source` is the path of a JSON file (comments and trailing commas are allowed), a base64 string of JSON, a mapping,
    or None for a config of defaults. Raises one ConfigError that lists all faults. Keys that are known but do not act
    are named, with reasons, in one warning of the logger ``shardwise.config``.
    """
    return load_source(open_source(source))


def load_source(read: Source) -> EngineConfig:
    """Check a config that was read before, as `load_config` does."""
    config, warning = load_silently(read)
    warn(warning)
    return config


def load_silently(read: Source) -> tuple[EngineConfig, str]:
    """`load_source`, with the text of its warning (empty for none) for a caller who knows which rank shall say it."""
    checked = check(read, EngineConfig, broken_rules)
    checked.raise_faults([*checked.faults, *checked.refused])
    config = checked.block
    config._auto_keys = checked.auto_keys
    return config, checked.idle_keys() if checked.idle else ""


def warn(warning: str) -> None:
    """Say what `load_silently` found, if it found something."""
    if warning:
        _logger.warning("%s", warning)


def open_source(source: str | FilePath | Mapping[str, Any] | None) -> Source:
    """Read what `load_config` accepts, unchecked."""
    if isinstance(source, str | FilePath):
        return read_source(source)
    return Source("The config", {} if source is None else source)


@dataclass(frozen=True)
class Checked(Generic[BlockType]):
    """What checking a source against a schema found. Paths in findings are spelt as the user spelt them."""

    source: Source
    block: BlockType  # of all keys that hold a right value
    faults: list[Fault]  # unknown keys, wrong values, broken rules
    refused: list[Fault]  # right values of keys that are not supported
    idle: list[Fault]  # keys without effect that ask for something
    findings: Findings

    @property
    def auto_keys(self) -> tuple[str, ...]:
        """Dotted keys that hold "auto"."""
        return tuple(dotted(written) for written in self.findings.autos.values())

    def raise_faults(self, faults: Sequence[Fault]) -> None:
        """Raise one ConfigError that lists `faults`, if there are any."""
        if faults:
            raise ConfigError(report(self.source.name, faults, self.source.lines))

    def idle_keys(self) -> str:
        """One text for the one warning that names the keys without effect."""
        rows = (f"\n  {dotted(fault.path)}: {fault.text}" for fault in self.idle)
        return f"{self.source.name} sets keys that have no effect here:{''.join(rows)}"


def check(
    read: Source,
    root: type[BlockType],
    rules: Callable[[BlockType], Iterable[Fault]] = lambda _: (),
    fillable: Callable[[Path], bool] = lambda _: False,
) -> Checked[BlockType]:
    """Check a source against the schema `root` and the `rules` between its keys.

    `fillable` says at which paths of the schema somebody above the engine will replace an "auto". Raises ConfigError
    only where the source is no block at all; every other fault is collected.
    """
    if not isinstance(read.data, Mapping):
        raise ConfigError(f"{read.name} holds {shown(read.data)}, expected a block {{...}} of keys.")
    normaliser = Normaliser(root, fillable)
    findings = normaliser.findings
    block, faults = _validated(root, normaliser.block(root, read.data))
    refused: list[Fault] = []
    idle: list[Fault] = []
    for path, value, field in given_keys(block):
        effect = effect_of(field)
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(effect, Unsupported) and value != default and not effect.neutral(value):
            refused.append(Fault(path, _refusal(value, default, effect)))
        elif isinstance(effect, NoEffect) and effect.warns and value != default:
            idle.append(Fault(path, f"{effect.reason}."))
    faults.extend(rules(block))

    def as_written(found: Iterable[Fault]) -> list[Fault]:
        return [Fault(findings.path_as_written(fault.path), fault.text) for fault in found]

    all_faults = [*read.faults, *findings.faults, *as_written(faults)]
    return Checked(read, block, all_faults, as_written(refused), as_written(idle), findings)


def _validated(root: type[BlockType], data: dict[str, Any]) -> tuple[BlockType, list[Fault]]:
    """Return the block of all keys that hold a right value, and a fault for each of the others.

    Faulty keys are taken out and the rest is tried again, so that the later checks still see the sound keys.
    """
    faults: list[Fault] = []
    while True:
        try:
            return root.model_validate(data), faults
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


def given_keys(block: Block, path: Path = ()) -> Iterator[tuple[Path, Any, FieldInfo]]:
    """Walk the keys that the user set, with their values."""
    for name, field in type(block).model_fields.items():
        if name not in block.model_fields_set:
            continue
        value = getattr(block, name)
        if isinstance(value, Block):
            yield from given_keys(value, (*path, name))
        else:
            yield (*path, name), value, field


def _refusal(value: Any, default: Any, effect: Unsupported) -> str:
    return (
        f"found {shown(value)}, which is not supported: {effect.reason}. "
        f"Expected {shown(default)}, which is the default: set it so, or remove the key."
    )
