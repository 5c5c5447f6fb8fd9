"""One DeepSpeed JSON, and what flags, YAML and code say beside it."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from shardwise.config.load import given_keys
from shardwise.config.messages import Path
from shardwise.config.run.contradictions import Pair
from shardwise.config.run.nested import get, put
from shardwise.config.run.resolved import (
    IN_JSON,
    NO_PROGRESS,
    PRECISIONS,
    Resolved,
    checked_json,
    idle_settings,
    late_refusals,
    origins_of,
    section_of,
)
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.schema import EngineConfig
from shardwise.config.source import Source
from shardwise.errors import ConfigError

# "auto" at these keys waits for what prepare sees, where nobody has said a value before.
_LEFT_TO_PREPARE = ("gradient_accumulation_steps", "gradient_clipping")


class Merge:
    """The JSON on its way to being resolved: values written into it, and pairs of mentions that met."""

    def __init__(self, asked: Asked, values: dict[str, Said], source: Source) -> None:
        self.asked = asked
        self.values = values
        self.source = source
        self.checked = checked_json(source)
        self.typed = {path: value for path, value, _ in given_keys(self.checked.block)}
        self.data: dict[str, Any] = copy.deepcopy(dict(source.data))
        self.known: dict[Path, Said] = {}
        self.pairs: list[Pair] = []
        self.warnings: list[str] = []

    def resolved(self) -> Resolved:
        """Fill and compare every setting; ConfigError that lists all contradictions."""
        self._need_a_stage()
        for name, path in IN_JSON.items():
            self._setting(name, path)
        self._precision()
        if not all(pair.agrees for pair in self.pairs):
            raise ConfigError(self._ambiguous())
        self._write(("steps_per_print",), NO_PROGRESS)
        if self.pairs:
            self.warnings.append(
                f"said twice, and agrees: {'; '.join(map(str, self.pairs))}. The JSON alone is enough."
            )
        if self.checked.idle:
            self.warnings.append(self.checked.idle_keys())
        self.warnings += [
            *idle_settings(self.values),
            *late_refusals(checked_json(replace(self.source, data=self.data))),
        ]
        elsewhere = Said(None, Origin.JSON, self.source.name)
        origins = origins_of(self.data, self.known, elsewhere, self.source.lines)
        return Resolved(self.values, self.data, origins, tuple(self.warnings), self.source.name)

    def _need_a_stage(self) -> None:
        if self.data.get("zero_optimization") is None and self.asked.said("zero_stage") is None:
            raise ConfigError(
                f"{self.source.name} has no zero_optimization, so the ZeRO stage is unknown. "
                'Add "zero_optimization": {"stage": 2} (0, 1, 2 or 3) to it, or give --zero_stage.'
            )

    def _setting(self, name: str, path: Path) -> None:
        said = self.asked.said(name)
        meant = said and _meant(name, said)
        if path in self.typed:
            mentions = (_meant(name, mention) for mention in self.asked.mentions.get(name, ()))
            self._json_speaks(name, self._own(path), [mention for mention in mentions if mention])
        elif path in self.checked.findings.autos:
            if meant or name not in _LEFT_TO_PREPARE:
                self._write(path, meant or self.values[name])
        elif meant:
            self._write(path, meant)
        elif said is None:
            self.values[name] = Said(_field(EngineConfig(), path), Origin.DEFAULT, "default of the JSON")

    def _precision(self) -> None:
        """The JSON's sections fp16 and bf16 are one setting, mixed_precision."""
        mentions = self.asked.mentions.get("mixed_precision", ())
        on = next((dtype for dtype in PRECISIONS if self.typed.get((dtype, "enabled"))), None)
        if on is not None:
            own = replace(self._own((on, "enabled")), value=on)
            # Files carry a "no" that nobody chose; the JSON's choice is no surprise beside it.
            idle = [said for said in mentions if said.value == "no" and said.origin is Origin.FILE]
            self._json_speaks("mixed_precision", own, [said for said in mentions if said not in idle])
            self.warnings += [f"mixed_precision: {said} gives way to {own}." for said in idle]
        wanted = self.values["mixed_precision"]
        for dtype in PRECISIONS:
            if (dtype, "enabled") not in self.typed:
                self._switch(dtype, replace(wanted, value=wanted.value == dtype))
            elif on is None and wanted.value == dtype:
                self.pairs.append(Pair("mixed_precision", wanted, replace(self._own((dtype, "enabled")), value="no")))

    def _switch(self, dtype: str, enabled: Said) -> None:
        """Write whether a compute dtype is on; a section that was not there is written whole."""
        block = self.checked.findings.path_as_written((dtype,))
        if not isinstance(get(self.data, block), dict):
            section = section_of(dtype, enabled.value)
            put(self.data, block, section)
            self.known |= {(*block, key): enabled for key in section}
        self._write((dtype, "enabled"), enabled)

    def _json_speaks(self, name: str, own: Said, mentions: Iterable[Said]) -> None:
        self.values[name] = own
        self.pairs += [Pair(name, said, own) for said in mentions]

    def _own(self, path: Path) -> Said:
        """What the JSON says at a path of the schema."""
        line = self.source.lines.get(self.checked.findings.path_as_written(path))
        place = f"{self.source.name}, line {line}" if line else self.source.name
        return Said(self.typed[path], Origin.JSON, place)

    def _write(self, path: Path, said: Said) -> None:
        written = self.checked.findings.path_as_written(path)
        put(self.data, written, list(said.value) if isinstance(said.value, tuple) else said.value)
        self.known[written] = said

    def _ambiguous(self) -> str:
        apart = [pair for pair in self.pairs if not pair.agrees]
        alike = [pair for pair in self.pairs if pair.agrees]
        lines = [f"deepspeed_config_file {self.source.name} is contradicted, and what it says is its own word:"]
        lines += [f"  {pair}" for pair in apart]
        if alike:
            lines += ["Said twice, though they agree:", *(f"  {pair}" for pair in alike)]
        lines.append(
            f"Beside a deepspeed_config_file these are said in the JSON: {', '.join([*IN_JSON, 'mixed_precision'])}."
        )
        if self.asked.file is not None and any(pair.one.origin is Origin.FILE for pair in apart):
            command = f"shardwise config update --config_file {self.asked.file}"
            lines.append(f"To mend it: {command}    (it takes them out of that file)")
        else:
            lines.append("To mend it, leave them out beside the JSON.")
        lines.append('Or write "auto" at these keys of the JSON, and it takes the other value.')
        return "\n".join(lines)


def _meant(name: str, said: Said) -> Said | None:
    """What a mention says to the JSON: null is "no clipping", any other null and an empty list say nothing."""
    if said.value not in (None, ()):
        return said
    return replace(said, value=0.0) if name == "gradient_clipping" else None


def _field(block: Any, path: Path) -> Any:
    for part in path:
        block = getattr(block, str(part))
    return block
