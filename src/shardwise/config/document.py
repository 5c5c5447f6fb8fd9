"""The page that documents every key, made of the schema's own marks: it cannot say what the code does not do.

``python -m shardwise.config.document`` prints it; ``make docs`` writes it.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import to_jsonable_python

from shardwise.config.catalog import Key, Section, sections_of
from shardwise.config.effects import Acts, NoEffect, Unsupported
from shardwise.config.json_schema import Schema, value_schema
from shardwise.config.run.page import run_introduction
from shardwise.config.run.schema import RunConfig
from shardwise.config.schema import EngineConfig
from shardwise.config.values import LARGEST_COUNT, Block

INTRODUCTION = """\
# Configuration

*This page is made of the schema that checks configs (`make docs`). What it says of a key is what the code does.*

## How a config is read

`shardwise.initialize(config=…)` and `shardwise.config.load_config` take

- the path of a JSON file; comments (`//`, `#`, `/* */`) and a comma after the last item are allowed;
- a dict;
- a base64 string of JSON.

All faults come in one error, each with its line:

```text
config.json has 3 faults:
  line 3, train_batch_size: found "8", expected a whole number.
  line 5, zero_optimizaton: unknown key. Did you mean "zero_optimization"?
  line 9, fp16.enabled: found twice, on lines 8 and 9; expected once. Remove one of the two.
```

Types are strict: `true` is not `1`, and `"2"` is not `2`. The one licence is JSON's own, where `2e8` is a way to
write a whole number. A block that is `null` is a block that is not there.

## What becomes of a key

| | |
|---|---|
| it acts | it does what its table says |
| it has no effect | it is accepted; one warning names it with the reason, if its value asks for something |
| it is not supported | it is an error with the reason, unless its value asks for nothing, as its default does |
| nobody knows it | it is an error that names the nearest key |

## `"auto"`

`"auto"` leaves a value to the program. The engine fills those whose table says how; for any other key it is an error
that names the key. `Accelerator` knows model and data, and fills more of them before the engine sees the config (see
[below](#a-run-flags-yaml-script-and-json)).

## Words of the tables

| | |
|---|---|
| P | parameters of the model |
| W | ranks |
| g | micro-batches a step (`gradient_accumulation_steps`) |
| b | bytes of an element that travels: 4 in fp32, 2 in bf16 and fp16; for gradients `communication_data_type` decides |
| size | the value of the key itself, in elements |

Traffic is what one rank receives. Every figure of traffic stands for itself times (W - 1)/W: one's own slice does not
travel. What rests in memory, and what lives for a moment, is told in [memory.md](memory.md).

## For editors

[deepspeed-config.schema.json](deepspeed-config.schema.json) is the same as a JSON Schema. VS Code completes and checks
keys with it once `json.schemas` in its settings names that file, or the config's own `"$schema"` does.
"""


def configuration_page() -> str:
    """Return the whole page."""
    run = tables(RunConfig, "The YAML of a run, the flags of `launch`, the fields of `DeepSpeedPlugin`")
    return f"{INTRODUCTION}\n{run_introduction()}{run}\n{tables(EngineConfig, 'The DeepSpeed JSON')}"


def tables(root: type[Block], title: str) -> str:
    """Return one part of the page: all blocks of `root`, each with the tables of its keys."""
    parts = [f"## {title}"]
    for places in _by_class(sections_of(root)):
        parts += _block_parts(places)
    return "\n\n".join(parts) + "\n"


def _by_class(sections: Iterable[Section]) -> list[list[Section]]:
    """Blocks of one class are told once, with all their places."""
    places: dict[type[Block], list[Section]] = {}
    for section in sections:
        places.setdefault(section.block, []).append(section)
    return list(places.values())


def _block_parts(places: Sequence[Section]) -> Iterator[str]:
    first = places[0]
    if not first.keys:
        return
    names = [".".join(place.path) for place in places]
    yield f"### {', '.join(f'`{name}`' for name in names) if first.path else 'Top level'}"
    if first.path:
        also = f" Also written {_names(first.aliases)}." if first.aliases else ""
        yield _text_of(first.block) + also
    acting = [(key, key.effect) for key in first.keys if isinstance(key.effect, Acts)]
    if acting:
        yield _table(
            ("key", "type", "default", "what it does", "memory, traffic, speed"),
            [_acting_row(first.block, key, effect) for key, effect in acting],
        )
    differing = [key for key in first.keys if key.deepspeed is not None]
    if differing:
        yield "DeepSpeed differs where the key is not given:"
        yield "\n".join(_difference(key) for key in differing)
    idle = _by_reason(first.keys, lambda key: key.effect.reason if isinstance(key.effect, NoEffect) else None)
    if idle:
        yield _table(("accepted without effect (default)", "because"), idle)
    refused = _by_reason(first.keys, lambda key: key.effect.reason if isinstance(key.effect, Unsupported) else None)
    if refused:
        yield _table(("not supported (default)", "because"), refused)


def _acting_row(block: type[Block], key: Key, effect: Acts) -> tuple[str, ...]:
    also = f" (also {_names(key.aliases)})" if key.aliases else ""
    auto = f'; `"auto"`: {effect.auto}' if effect.auto else ""
    default = "required" if key.required else f"`{json_text(key.default)}`"
    kind = type_in_words(value_schema(block, key.path[-1]))
    return f"`{key.path[-1]}`{also}", kind, default, effect.meaning + auto, effect.cost


def _difference(key: Key) -> str:
    assert key.deepspeed is not None
    note = f"; {key.deepspeed.note}" if key.deepspeed.note else ""
    return f"- `{key.path[-1]}`: `{json_text(key.deepspeed.value)}`{note}"


def _by_reason(keys: Iterable[Key], reason_of: Callable[[Key], str | None]) -> list[tuple[str, str]]:
    """One row for all keys that share a reason."""
    rows: dict[str, list[str]] = {}
    for key in keys:
        reason = reason_of(key)
        if reason is not None:
            rows.setdefault(reason, []).append(f"`{key.path[-1]}` (`{json_text(key.default)}`)")
    return [(", ".join(names), reason) for reason, names in rows.items()]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table without the columns that are empty in every row."""
    filled = [column for column in range(len(head)) if any(row[column] for row in rows)]
    lines = [[head[column] for column in filled], ["---"] * len(filled)]
    lines += [[row[column].replace("|", "\\|") for column in filled] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _text_of(block: type[Block]) -> str:
    return inspect.cleandoc(block.__doc__ or "").replace("``", "`")


def json_text(value: Any) -> str:
    """Return a value as one would write it into a config; large round numbers short."""
    value = to_jsonable_python(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000 and value % 10_000 == 0:
        digits = str(value).rstrip("0")
        return f"{digits}e{len(str(value)) - len(digits)}"
    return json.dumps(value)


def type_in_words(schema: Schema) -> str:
    """Return for people what the JSON Schema of a value says."""
    if "anyOf" in schema:
        return _either(type_in_words(option) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return _either(value if isinstance(value, str) else json_text(value) for value in values)
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _number_in_words("whole number" if kind == "integer" else "number", schema)
    if kind == "array":
        named = schema.get("items", {}).get("type") == "string"
        return "list of names" if named else "list"
    return _WORDS.get(str(kind), "anything")


_WORDS = {"boolean": "true or false", "string": "text", "object": "block", "null": "null"}


def _number_in_words(word: str, schema: Mapping[str, Any]) -> str:
    bounds = [
        f"{sign} {json_text(schema[bound])}"
        for bound, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if bound in schema and schema[bound] != LARGEST_COUNT
    ]
    return f"{word} {', '.join(bounds)}".rstrip()


def _either(words: Iterable[str]) -> str:
    """Join alternatives: ``fp32, fp16 or bf16``."""
    options = [part for word in words for part in word.split(" or ")]
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


if __name__ == "__main__":
    print(configuration_page(), end="")
