"""The schema read as a list of keys: for suggestions, for tests and for the page that documents each key."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic.fields import FieldInfo

from shardwise.config.effects import Acts, Alias, DeepSpeedDefault, Effect, NoEffect, Unsupported
from shardwise.config.values import Block


@dataclass(frozen=True)
class Key:
    """One key that holds a value."""

    path: tuple[str, ...]
    aliases: tuple[str, ...]  # other names of the last part of the path
    default: Any
    effect: Effect
    required: bool = False  # it has no default; its block needs it
    deepspeed: DeepSpeedDefault | None = None  # where DeepSpeed's default is another one

    @property
    def dotted(self) -> str:
        """The path as users write it: ``zero_optimization.stage``."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Section:
    """One block at its place, with the keys that stand directly in it."""

    path: tuple[str, ...]  # empty for the root
    aliases: tuple[str, ...]  # other names of the last part of the path
    block: type[Block]
    keys: tuple[Key, ...]


def nested_block(field: FieldInfo) -> type[Block] | None:
    """Return the class of the block that `field` holds, or None where it holds a value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Block):
            return candidate
    return None


def effect_of(field: FieldInfo) -> Effect:
    """Return the mark of a field that holds a value; a field with none or two is a fault of the schema."""
    (effect,) = [mark for mark in field.metadata if isinstance(mark, Acts | NoEffect | Unsupported)]
    return effect


def aliases_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the other names of a field."""
    return tuple(mark.name for mark in field.metadata if isinstance(mark, Alias))


@cache
def names_in(block: type[Block]) -> dict[str, str]:
    """Return every accepted name of the block's keys, aliases too, with the field that it means."""
    names = {name: name for name in block.model_fields}
    for name, field in block.model_fields.items():
        names.update(dict.fromkeys(aliases_of(field), name))
    return names


def keys_of(block: type[Block], path: tuple[str, ...] = ()) -> Iterator[Key]:
    """Walk all keys of `block` and of the blocks inside it, in the order of the schema."""
    for name, field in block.model_fields.items():
        inner = nested_block(field)
        if inner is not None:
            yield from keys_of(inner, (*path, name))
        else:
            yield _key((*path, name), field)


def sections_of(block: type[Block], path: tuple[str, ...] = (), aliases: tuple[str, ...] = ()) -> Iterator[Section]:
    """Walk `block` and the blocks inside it; a block comes before those inside it."""
    fields = block.model_fields.items()
    keys = tuple(_key((*path, name), field) for name, field in fields if nested_block(field) is None)
    yield Section(path, aliases, block, keys)
    for name, field in fields:
        inner = nested_block(field)
        if inner is not None:
            yield from sections_of(inner, (*path, name), aliases_of(field))


def _key(path: tuple[str, ...], field: FieldInfo) -> Key:
    required = field.is_required()
    default = None if required else field.get_default(call_default_factory=True, validated_data={})
    deepspeed = next((mark for mark in field.metadata if isinstance(mark, DeepSpeedDefault)), None)
    return Key(path, aliases_of(field), default, effect_of(field), required, deepspeed)


@cache
def homes_of_names(root: type[Block]) -> dict[str, tuple[str, ...]]:
    """Return for each name that stands in exactly one block the path of that block: where a misplaced key belongs."""
    homes: dict[str, list[tuple[str, ...]]] = {}

    def visit(block: type[Block], path: tuple[str, ...]) -> None:
        for name in names_in(block):
            homes.setdefault(name, []).append(path)
        for name, field in block.model_fields.items():
            inner = nested_block(field)
            if inner is not None:
                visit(inner, (*path, name))

    visit(root, ())
    return {name: paths[0] for name, paths in homes.items() if len(paths) == 1}
