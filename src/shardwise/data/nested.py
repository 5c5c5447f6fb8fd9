"""The samples of a batch of any shape: tensors and plain columns (texts, say) in dicts, lists, tuples, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shardwise.errors import ConfigError

Leaf = Callable[..., Any]


def map_leaves(function: Leaf, *batches: Any) -> Any:
    """A batch like the first one, with ``function(leaf, leaf of the second, …)`` for each leaf.

    Leaves are tensors and whatever is no container. A sequence without any container in it is one leaf: the texts of a
    batch, say. Strings are leaves.
    """
    head = batches[0]
    if isinstance(head, Mapping):
        return _like(head, {key: map_leaves(function, *(batch[key] for batch in batches)) for key in head})
    if isinstance(head, list | tuple) and not is_column(head):
        parts = [map_leaves(function, *items) for items in zip(*batches, strict=True)]
        return type(head)(*parts) if hasattr(head, "_fields") else type(head)(parts)
    if dataclasses.is_dataclass(head) and not isinstance(head, type):
        fields = [field.name for field in dataclasses.fields(head)]
        return _with_fields(
            head, {name: map_leaves(function, *(getattr(each, name) for each in batches)) for name in fields}
        )
    return function(*batches)


def is_column(batch: object) -> bool:
    """Whether a sequence holds one plain thing a sample (texts, numbers), instead of one tensor a feature."""
    return (
        isinstance(batch, list | tuple)
        and not hasattr(batch, "_fields")
        and len(batch) > 0
        and not any(_holds_more(item) for item in batch)
    )


def _holds_more(item: object) -> bool:
    return isinstance(item, Tensor | Mapping | list | tuple) or dataclasses.is_dataclass(item) or hasattr(item, "to")


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(mapping) is dict:
        return items
    try:  # a copy keeps what the class knows beside its items (a default factory, an encoding)
        new: Any = copy.copy(mapping)
        for key, value in items.items():
            new[key] = value
    except TypeError:
        new = type(mapping)(items)  # type: ignore[call-arg]
    return new


def _with_fields(instance: Any, values: dict[str, Any]) -> Any:
    new = copy.copy(instance)
    for name, value in values.items():
        object.__setattr__(new, name, value)  # a frozen dataclass too
    return new


def leaves(batch: Any) -> Iterator[Any]:
    """All leaves of a batch, in order."""
    found: list[Any] = []
    map_leaves(found.append, batch)
    return iter(found)


def num_rows(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor, or of its first column.

    Raises:
        ConfigError: nothing in it has a length.
    """
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
        if is_column(leaf):
            return len(leaf)
    raise ConfigError(
        f"a batch of type {type(batch).__name__} holds no tensor with a batch dim, so it cannot be shared between "
        "processes. Have the loader collate samples into tensors, or pass dispatch_batches=False."
    )


def take_rows(batch: Any, rows: slice) -> Any:
    """Some samples of a batch. Leaves without a length (numbers, texts, 0-dim tensors) stay whole."""
    total = num_rows(batch)

    def take(leaf: Any) -> Any:
        has_rows = (isinstance(leaf, Tensor) and leaf.dim() > 0) or (is_column(leaf) and len(leaf) == total)
        return leaf[rows] if has_rows else leaf

    return map_leaves(take, batch)


def concatenate(batches: list[Any]) -> Any:
    """One batch with the samples of all of them.

    Raises:
        ConfigError: their tensors differ in more than the number of samples.
    """
    if len(batches) == 1:
        return batches[0]

    def join(*leaves_: Any) -> Any:
        if isinstance(leaves_[0], Tensor):
            return torch.cat(leaves_) if leaves_[0].dim() else leaves_[0]
        if is_column(leaves_[0]):
            return type(leaves_[0])(item for leaf in leaves_ for item in leaf)
        return leaves_[0]

    try:
        return map_leaves(join, *batches)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"batches that shall be shared between processes do not fit together ({error}). Pad all of them to one "
            "length, pass split_batches=True (each batch is then cut by itself), or dispatch_batches=False (each "
            "process then reads its own)."
        ) from error
