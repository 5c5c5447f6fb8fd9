"""The schema as JSON Schema (draft 2020-12), for editors: completion, hints and faults while a config is written.

It says of a JSON document what `load_config` says of it, but for three things that no JSON Schema can say: rules
between keys, which values of an unsupported key ask for nothing, and what the reader takes beyond JSON (comments,
``Infinity``). An unsupported key is therefore accepted, and marked as deprecated with the reason.

``python -m shardwise.config.json_schema`` prints it.
"""

import inspect
import itertools
import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from shardwise.config.catalog import aliases_of, effect_of, nested_block
from shardwise.config.effects import Acts, Effect, NoEffect, Unsupported
from shardwise.config.run.auto import FILLED_FROM
from shardwise.config.run.resolved import IN_JSON, PRECISIONS
from shardwise.config.schema import EngineConfig
from shardwise.config.values import Block

Schema = dict[str, Any]

FILLED_ABOVE = sorted(
    {
        ".".join(map(str, path))
        for path in (*FILLED_FROM, *IN_JSON.values(), *((dtype, "enabled") for dtype in PRECISIONS))
    }
)
"""Keys at which the front-end replaces an "auto" that the engine itself refuses."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_AUTO = {"const": "auto"}


def config_schema(root: type[Block] = EngineConfig, also_auto: Collection[str] = ()) -> Schema:
    """Return the schema of a document that holds the block `root`.

    `also_auto` are dotted keys at which somebody above the engine replaces an "auto" that the engine itself refuses.
    """
    schema = _block_schema(root, (), also_auto)
    properties = {"$schema": {"type": "string", "description": "where an editor finds this schema"}}
    return {"$schema": DIALECT, **schema, "properties": {**properties, **schema["properties"]}}


def value_schema(block: type[Block], name: str) -> Schema:
    """Return the schema of the value of one key, as its type alone says: no description, no "auto"."""
    schema: Schema = dict(block.model_json_schema()["properties"][name])
    return {key: value for key, value in schema.items() if key not in ("title", "default")}


def _block_schema(block: type[Block], path: tuple[str, ...], also_auto: Collection[str]) -> Schema:
    properties: Schema = {}
    demands: list[Schema] = []
    for name, field in block.model_fields.items():
        here = (*path, name)
        inner = nested_block(field)
        if inner is None:
            properties[name] = _key_schema(block, here, also_auto)
        else:
            properties[name] = _or_shorthand(inner, _block_schema(inner, here, also_auto))
        aliases = aliases_of(field)
        properties.update({alias: {"$ref": _pointer(here)} for alias in aliases})
        names = (name, *aliases)
        demands += [{"not": {"required": list(pair)}} for pair in itertools.combinations(names, 2)]
        if field.is_required():
            demands.append({"anyOf": [{"required": [each]} for each in names]})
    return {
        "type": "object",
        "description": inspect.cleandoc(block.__doc__ or ""),
        "properties": properties,
        "additionalProperties": False,
        **({"allOf": demands} if demands else {}),
    }


def _or_shorthand(block: type[Block], schema: Schema) -> Schema:
    """A block may be null, which is a block that is not there, and some may be written as true or false."""
    others = ["null", "boolean"] if isinstance(block.expand(True), Mapping) else ["null"]
    return {"description": schema.pop("description"), "anyOf": [schema, *({"type": other} for other in others)]}


def _pointer(path: tuple[str, ...]) -> str:
    """Where in the document the schema of a key stands; every block around it is the first of its alternatives."""
    *blocks, name = path
    return "#" + "".join(f"/properties/{part}/anyOf/0" for part in blocks) + f"/properties/{name}"


def _key_schema(block: type[Block], path: tuple[str, ...], also_auto: Collection[str]) -> Schema:
    field = block.model_fields[path[-1]]
    effect = effect_of(field)
    value = value_schema(block, path[-1])
    if isinstance(effect, Acts) and value.get("type") == "object":
        value = _arguments_schema(".".join(path), also_auto)
    if isinstance(effect, NoEffect) or (isinstance(effect, Acts) and effect.auto) or ".".join(path) in also_auto:
        value = {"anyOf": [*value.get("anyOf", [value]), _AUTO]}
    elif _takes_any_text(value):
        value = {**value, "not": _AUTO}
    described: Schema = {"description": _description(effect)}
    if isinstance(effect, Unsupported):
        described["deprecated"] = True
    if not field.is_required():
        described["default"] = to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}))
    return {**described, **value}


def _arguments_schema(dotted: str, also_auto: Collection[str]) -> Schema:
    """Keyword arguments of an optimizer or scheduler: anything, but "auto" only where somebody replaces it."""
    replaced = [key.removeprefix(f"{dotted}.") for key in also_auto if key.startswith(f"{dotted}.")]
    schema: Schema = {"type": "object", "additionalProperties": {"not": _AUTO}}
    return {**schema, "properties": {name: {} for name in replaced}} if replaced else schema


def _takes_any_text(value: Schema) -> bool:
    return any(option.get("type") == "string" and "enum" not in option for option in value.get("anyOf", [value]))


def _description(effect: Effect) -> str:
    if isinstance(effect, NoEffect):
        return f"No effect: {effect.reason}."
    if isinstance(effect, Unsupported):
        return f"Not supported: {effect.reason}."
    auto = f' "auto": {effect.auto}.' if effect.auto else ""
    cost = f" Memory, traffic, speed: {effect.cost}." if effect.cost else ""
    return f"{effect.meaning[0].upper()}{effect.meaning[1:]}.{auto}{cost}"


if __name__ == "__main__":
    print(json.dumps(config_schema(also_auto=FILLED_ABOVE), indent=2))
