"""Raw data to the schema's own names: aliases resolved, "auto" taken out, unknown keys found.

This is the part of checking that pydantic cannot say in the user's words. It never raises: every fault is noted, the
faulty key is left out, and the walk goes on, so that one reading finds all faults.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from shardwise.config.catalog import effect_of, homes_of_names, names_in, nested_block
from shardwise.config.effects import Acts, Effect, NoEffect
from shardwise.config.messages import Fault, Path, dotted, nearest, shown
from shardwise.config.values import Block

AUTO = "auto"
SCHEMA_OF_EDITORS = "$schema"
_AUTO_REFUSED = (
    'found "auto", but the engine alone has no way to choose this. Write the value, or remove the key for the default.'
)


@dataclass
class Findings:
    """What a walk over raw data noted."""

    faults: list[Fault] = field(default_factory=list)
    autos: dict[Path, Path] = field(default_factory=dict)  # of keys left to "auto": path in the schema -> as written
    written: dict[Path, Path] = field(default_factory=dict)  # path in the schema -> path as the user wrote it

    def path_as_written(self, path: Path) -> Path:
        """Return the user's own spelling of a path of the schema."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.written:
                return self.written[path[:length]] + path[length:]
        return path


@dataclass(frozen=True)
class Normaliser:
    """Walks raw data beside the schema `root`."""

    root: type[Block]
    fillable: Callable[[Path], bool] = lambda _: False  # whether somebody above the engine replaces "auto" at a path
    findings: Findings = field(default_factory=Findings)

    def block(self, block: type[Block], raw: Mapping[Any, Any], path: Path = (), written: Path = ()) -> dict[str, Any]:
        """Return the data of one block under the schema's names, without what is faulty or "auto"."""
        data: dict[str, Any] = {}
        spelling: dict[str, str] = {}
        names = names_in(block)
        for key, value in raw.items():
            if not isinstance(key, str):
                self._fault((*written, str(key)), _key_is_no_string(key))
                continue
            if key == SCHEMA_OF_EDITORS and not path:
                continue  # it tells editors where the JSON Schema is
            if key not in names:
                self._fault((*written, key), self._unknown(block, key))
                continue
            name = names[key]
            if name in spelling:
                self._fault((*written, key), f'means the same as "{spelling[name]}", and both are set. Remove one.')
                continue
            spelling[name] = key
            self.findings.written[(*path, name)] = (*written, key)
            self._entry(block.model_fields[name], value, (*path, name), (*written, key), data)
        return data

    def _entry(self, field: FieldInfo, value: Any, path: Path, written: Path, data: dict[str, Any]) -> None:
        name = str(path[-1])
        inner = nested_block(field)
        if inner is None:
            effect = effect_of(field)
            if _is_auto(value):
                if field.default != AUTO:
                    self._auto(effect, path, written)
            elif isinstance(value, Mapping) and isinstance(effect, Acts):
                data[name] = self._arguments(value, path, written)
            else:
                data[name] = self._plain(value, written)
            return
        if value is None:
            return  # a block that is null is a block that is not there
        value = inner.expand(value)
        if isinstance(value, Mapping):
            data[name] = self.block(inner, value, path, written)
        else:
            self._fault(written, f"found {shown(value)}, expected a block {{...}} of keys.")

    def _auto(self, effect: Effect, path: Path, written: Path) -> None:
        """Leave the key at its default, from which the engine chooses; or say that nobody can choose."""
        if (isinstance(effect, Acts) and effect.auto) or self.fillable(path):
            self.findings.autos[path] = written
        elif not isinstance(effect, NoEffect):
            self._fault(written, _AUTO_REFUSED)

    def _arguments(self, value: Mapping[Any, Any], path: Path, written: Path) -> Any:
        """Return a copy of the keyword arguments of an optimizer or scheduler; the engine fills no "auto" there."""
        data = {}
        for key, item in value.items():
            if _is_auto(item) and isinstance(key, str) and self.fillable((*path, key)):
                self.findings.autos[(*path, key)] = (*written, key)
            elif _is_auto(item):
                self._fault((*written, key), _AUTO_REFUSED)
            else:
                data[key] = item
        return self._plain(data, written)

    def _plain(self, value: Any, written: Path) -> Any:
        """Copy a value, so that the config shares nothing that the caller may change."""
        if isinstance(value, Mapping):
            copy = {}
            for key, item in value.items():
                if isinstance(key, str):
                    copy[key] = self._plain(item, (*written, key))
                else:
                    self._fault(written, _key_is_no_string(key))
            return copy
        if isinstance(value, list | tuple):
            return [self._plain(item, (*written, place)) for place, item in enumerate(value)]
        return value

    def _unknown(self, block: type[Block], key: str) -> str:
        homes = homes_of_names(self.root)
        if key in homes:
            return f"unknown key here. It belongs in {dotted(homes[key]) or 'the top level'}; move it there."
        neighbour = nearest(key, names_in(block))
        if neighbour is not None:
            return f'unknown key. Did you mean "{neighbour}"?'
        elsewhere = nearest(key, homes, likeness=0.8)
        if elsewhere is not None:
            return f'unknown key. Did you mean "{dotted((*homes[elsewhere], elsewhere))}"?'
        return "unknown key, and no known one is near it. Remove it."

    def _fault(self, path: Path, text: str) -> None:
        self.findings.faults.append(Fault(path, text))


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == AUTO


def _key_is_no_string(key: object) -> str:
    return f"found the key {key!r}, expected a string. Write it in quotes."
