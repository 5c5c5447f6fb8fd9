"""Settings as rows: value, who said it, what becomes of it, what it costs, and where DeepSpeed would differ."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardwise.config.catalog import Key, keys_of, sections_of
from shardwise.config.document import json_text
from shardwise.config.effects import Acts, Effect, NoEffect, Unsupported
from shardwise.config.load import Checked, check, given_keys
from shardwise.config.messages import Path, dotted
from shardwise.config.rules import broken_rules
from shardwise.config.run.auto import FILLED_FROM
from shardwise.config.run.nested import get, put
from shardwise.config.run.precedence import resolve
from shardwise.config.run.resolved import AUTO, IN_JSON, Resolved, fillable
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.run.schema import PluginConfig, RunConfig
from shardwise.config.schema import EngineConfig
from shardwise.config.source import Source
from shardwise.errors import ConfigError

# Shown also where nobody said anything: what a reader of a config asks first.
_FIRST_QUESTIONS = {
    ("distributed_type",),
    ("num_processes",),
    ("mixed_precision",),
    ("zero_stage",),
    ("train_batch_size",),
    ("train_micro_batch_size_per_gpu",),
    ("gradient_accumulation_steps",),
    ("gradient_clipping",),
    ("zero_optimization", "stage"),
}
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Row:
    """One setting."""

    key: str  # as users write it, from its block on
    value: Any
    origin: Origin
    place: str  # where it was said
    meaning: str = ""  # what it does
    cost: str = ""  # memory and traffic
    auto: str = ""  # who fills "auto", and by which formula
    idle: str = ""  # why it has no effect
    refused: str = ""  # why it cannot work
    deepspeed: str = ""  # what DeepSpeed does where nobody says the key
    shown_first: bool = True  # in the short view

    @property
    def value_text(self) -> str:
        """The value as one would write it into a config."""
        return json_text(self.value)


@dataclass(frozen=True)
class Table:
    """The rows of one block."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Explanation:
    """All settings of a run."""

    tables: tuple[Table, ...]
    refused: tuple[str, ...]  # dotted keys that the run will not start with
    warnings: tuple[str, ...]
    resolved: Resolved
    config: EngineConfig | None  # None in a run without ZeRO

    def check_batch(self) -> None:
        """Raise ConfigError where the batch sizes do not fit the ranks, as far as all are numbers already."""
        num_ranks = self.resolved["num_processes"]
        if self.config is None or num_ranks is None or self.waits_for_auto:
            return
        if self.config.train_batch_size or self.config.train_micro_batch_size_per_gpu:
            self.config.resolve_batch(num_ranks)

    @property
    def waits_for_auto(self) -> bool:
        """Whether prepare fills one of the batch sizes."""
        return any(row.auto for table in self.tables for row in table.rows if row.key in _BATCH)


def explain(asked: Asked) -> Explanation:
    """Decide every setting and say what becomes of it.

    Keys that are not supported are rows, so that one look shows all of the config. Raises ConfigError where nothing
    can be decided: unknown keys, wrong values, contradictions.
    """
    resolved, config = _resolve_past_refusals(asked)
    run = Table("Settings of the run", tuple(_run_rows(resolved)))
    if config is None:
        return Explanation((run,), (), resolved.warnings, resolved, None)
    lines = asked.json.lines if asked.json is not None else {}
    checked = check(Source(resolved.json_name, config, lines), EngineConfig, broken_rules, fillable)
    checked.raise_faults(checked.faults)
    tables = (run, *_engine_tables(checked, resolved.origins, asked))
    refused = tuple(dotted(fault.path) for fault in checked.refused)
    return Explanation(tables, refused, resolved.warnings, resolved, checked.block)


def _resolve_past_refusals(asked: Asked) -> tuple[Resolved, dict[str, Any] | None]:
    """Resolve, though keys be refused; and the DeepSpeed config with these keys in it."""
    if asked.json is None:
        resolved = resolve(asked)
        return resolved, resolved.ds_config
    checked = check(asked.json, EngineConfig, broken_rules, fillable)
    checked.raise_faults(checked.faults)
    try:
        resolved = resolve(asked)
        return resolved, resolved.ds_config
    except ConfigError:
        if not checked.refused:
            raise
    paths = [fault.path for fault in checked.refused]
    resolved = resolve(replace(asked, json=_without(asked.json, paths)))
    config = copy.deepcopy(resolved.ds_config or {})
    for path in paths:
        put(config, path, get(asked.json.data, path))
    return resolved, config


def _without(source: Source, paths: list[Path]) -> Source:
    data = copy.deepcopy(source.data)
    for path in paths:
        get(data, path[:-1]).pop(path[-1])
    return replace(source, data=data)


# --- the run ---------------------------------------------------------------------------------------------------------


def _run_rows(resolved: Resolved) -> Iterator[Row]:
    keys = {key.path[-1]: key for key in keys_of(RunConfig)}
    for name, said in resolved.values.items():
        path = IN_JSON.get(name, ())
        if path and get(resolved.ds_config, path) == AUTO:
            said = replace(resolved.origins.get(path, said), value=AUTO)  # prepare decides, by the row below
        row = _row(name, said, keys[name])
        if resolved.ds_config is None and name in PluginConfig.model_fields:
            is_said = said.origin is not Origin.DEFAULT
            unread = "only a run with ZeRO reads it; distributed_type: DEEPSPEED asks for one" if is_said else ""
            row = replace(row, idle=unread, cost="", shown_first=is_said)
        yield row


def _row(name: str, said: Said, key: Key) -> Row:
    says_something = said.origin is not Origin.DEFAULT and said.value not in (None, {}, (), [])
    acts = key.effect if isinstance(key.effect, Acts) else Acts("")
    return Row(
        key=name,
        value=said.value,
        origin=said.origin,
        place=said.place,
        meaning=acts.meaning,
        cost=acts.cost,
        idle=_idle(key.effect),
        shown_first=says_something or (name,) in _FIRST_QUESTIONS,
    )


def _idle(effect: Effect) -> str:
    match effect:
        case NoEffect(reason=reason):
            return reason
        case Unsupported(reason=reason):
            return f"accepted where it asks for nothing, else refused: {reason}"
    return ""


# --- the DeepSpeed JSON -----------------------------------------------------------------------------------------------


def _engine_tables(checked: Checked[EngineConfig], origins: Mapping[Path, Said], asked: Asked) -> Iterator[Table]:
    teller = _Teller(checked, origins, asked)
    for section in sections_of(EngineConfig):
        rows = tuple(row for key in section.keys for row in teller.rows(key))
        if rows:
            yield Table(dotted(section.path) or "DeepSpeed config, top level", rows)


class _Teller:
    """Rows of the JSON's keys."""

    def __init__(self, checked: Checked[EngineConfig], origins: Mapping[Path, Said], asked: Asked) -> None:
        self.config = checked.block
        self.given = {path: value for path, value, _ in given_keys(checked.block)}
        self.findings = checked.findings
        self.refused = {fault.path: fault.text for fault in checked.refused}
        self.origins = origins
        self.json = asked.json

    def rows(self, key: Key) -> Iterator[Row]:
        """One row a key; a key that holds arguments (optimizer.params) has one row an argument."""
        inner = {path for path in self.findings.autos if path[:-1] == key.path}
        value = self.given.get(key.path)
        if isinstance(value, dict) and isinstance(key.effect, Acts):
            inner |= {(*key.path, name) for name in value}
        if inner:
            for path in sorted(inner, key=str):
                yield self._argument(key, path, value)
        elif key.path in self.findings.autos or key.path in self.given or not self._in_absent_block(key.path):
            yield self._key(key)

    def _key(self, key: Key) -> Row:
        path = key.path
        written = self.findings.path_as_written(path)
        is_auto = path in self.findings.autos
        value = AUTO if is_auto else self.given.get(path, key.default)
        said = self._said(written, value)
        row = _row(str(path[-1]), said, key)
        refused = self.refused.get(written, "")
        differs = key.deepspeed if said.origin is Origin.DEFAULT and not is_auto else None
        deepspeed = ""
        if differs is not None:
            deepspeed = f"{json_text(differs.value)} where the key is not given"
            deepspeed += f"; {differs.note}" if differs.note else ""
        first = row.shown_first or path in _FIRST_QUESTIONS or bool(refused) or is_auto
        if path in {("fp16", "enabled"), ("bf16", "enabled")} and not said.value:
            first = False  # some compute dtype is off in every run
        return replace(
            row,
            auto=_auto(path, key.effect) if is_auto else "",
            idle="" if refused else row.idle,
            refused=refused,
            deepspeed=deepspeed,
            shown_first=first or (bool(deepspeed) and self._matters(path)),
        )

    def _argument(self, key: Key, path: Path, arguments: Any) -> Row:
        is_auto = path in self.findings.autos
        value = AUTO if is_auto else arguments[path[-1]]
        row = _row(f"{key.path[-1]}.{path[-1]}", self._said(self.findings.path_as_written(path), value), key)
        return replace(row, meaning="", auto=_auto(path, key.effect) if is_auto else "")

    def _said(self, written: Path, value: Any) -> Said:
        if written in self.origins:
            return replace(self.origins[written], value=value)
        for length in range(len(written), 0, -1):  # a value inside a list or a block that is one value
            if self.json is not None and written[:length] in self.json.lines and written in self._all_given():
                return Said(value, Origin.JSON, f"{self.json.name}, line {self.json.lines[written[:length]]}")
        return Said(value, Origin.DEFAULT, "default")

    def _all_given(self) -> set[Path]:
        return {self.findings.path_as_written(path) for path in self.given}

    def _in_absent_block(self, path: Path) -> bool:
        """Whether the key stands in a block (optimizer, scheduler) that the config has not at all."""
        block: Any = self.config
        for part in path[:-1]:
            block = getattr(block, str(part))
            if block is None:
                return True
        return False

    def _matters(self, path: Path) -> bool:
        """Whether the rest of the config lets DeepSpeed read the key."""
        match path:
            case ("zero_optimization", "leaf_module", *_):
                return False  # it is there for a hang that cannot happen here
            case ("zero_optimization", name) if str(name).startswith("stage3_"):
                return self.config.zero_optimization.stage == 3
            case ("fp16" | "bf16" as dtype, _):
                return self.config.compute_dtype == dtype
            case ("data_types", _):
                return self.config.compute_dtype != "fp32"
        return True


def _auto(path: Path, effect: Effect) -> str:
    """Who fills "auto": prepare, by Accelerate's formulas, or else the engine."""
    prepare = FILLED_FROM.get(path)
    if prepare is None and path[:2] in {("optimizer", "params"), ("scheduler", "params")}:
        prepare = f"{'DummyOptim' if path[0] == 'optimizer' else 'DummyScheduler'}({path[-1]}=...)"
    engine = effect.auto if isinstance(effect, Acts) else ""
    said = [f"prepare fills in {prepare}"] if prepare else []
    said += [f"{'initialize alone' if prepare else 'the engine'} takes {engine}"] if engine else []
    return "; ".join(said)
