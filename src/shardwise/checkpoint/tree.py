"""Nested values as JSON: what a scheduler, a loader or a script wants to keep, without pickle.

Tensors and arrays go into a shard file and leave their key behind; the rest is JSON itself. What JSON has no word for
is an object of one member whose name begins with ``$``::

    (1, 2)  {"$tuple": [1, 2]}      {3: "a"}  {"$dict": [[3, "a"]]}      tensor  {"$tensor": "client/0"}

An object of any other class is refused with its place, unless its place was allowed by name to be a pickle.
"""

from __future__ import annotations

import base64
import pickle
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from shardwise.errors import CheckpointError

MAX_DEPTH = 100
"""Nesting that a value may have; far below what the interpreter's own stack bears."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors, by their names there."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Put = Callable[[torch.Tensor], str]
"""Takes a tensor to be written and gives its key."""
Get = Callable[[str], torch.Tensor]
"""The tensor of a key."""


def encode(value: Any, put: Put, place: str, allow_pickle: Collection[str] = ()) -> Any:
    """``value`` as JSON.

    Args:
        value: nested dicts, lists, tuples, sets, numbers, texts, bytes, None, tensors and arrays.
        put: where its tensors go.
        place: what the value is called in messages; parts add ``.key``.
        allow_pickle: places whose values may be any object: these are pickled.

    Raises:
        CheckpointError: an object has another class, or the nesting is too deep; names its place.
    """
    return _Encoder(put, frozenset(allow_pickle)).encode(value, place, 0)


class _Encoder:
    def __init__(self, put: Put, allow_pickle: frozenset[str]) -> None:
        self._put = put
        self._allow_pickle = allow_pickle

    def encode(self, value: Any, place: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{place[:80]}... is nested more than {MAX_DEPTH} deep: expected flatter data.")
        if place in self._allow_pickle:
            pickled = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
            return {"$pickle": self._put(pickled)}
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value.detach())
        if isinstance(value, dict):
            return self._dict(value, place, depth)
        if isinstance(value, (list, tuple, set, frozenset)):
            items = [self.encode(item, f"{place}.{index}", depth + 1) for index, item in enumerate(value)]
            if isinstance(value, list):
                return items
            return {"$tuple" if isinstance(value, tuple) else "$set": items}
        return self._rarer(value, place)

    def _tensor(self, value: torch.Tensor) -> Any:
        name = DTYPE_NAMES.get(value.dtype)
        # A number is shorter in place than a tensor's entry in a file; a float64 holds every one of these exactly.
        if value.dim() == 0 and name is not None and not value.is_complex():
            return {"$scalar": [value.item(), name]}
        return {"$tensor": self._put(value)}

    def _dict(self, value: dict[Any, Any], place: str, depth: int) -> Any:
        plain = all(type(key) is str and not key.startswith("$") for key in value)
        if plain and not isinstance(value, Counter):
            return {key: self.encode(item, f"{place}.{key}", depth + 1) for key, item in value.items()}
        pairs = [
            [self.encode(key, f"{place}.{key}", depth + 1), self.encode(item, f"{place}.{key}", depth + 1)]
            for key, item in value.items()
        ]
        return {"$counter" if isinstance(value, Counter) else "$dict": pairs}

    def _rarer(self, value: Any, place: str) -> Any:
        if isinstance(value, (bytes, bytearray)):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            return {"$array": self._put(torch.from_numpy(np.array(value, copy=True)))}
        if isinstance(value, np.generic) and value.dtype.kind in "fiub":
            return value.item()
        if isinstance(value, (bool, int, float, str)):  # an enum, say: its plain value
            return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        raise CheckpointError(
            f"{place} is a {type(value).__name__}, which a checkpoint keeps only as a pickle. Keep its tensors, "
            f"numbers and texts instead, or allow the pickle by name: allow_pickle=[{place!r}]."
        )


def decode(value: Any, get: Get, place: str, allow_pickle: Collection[str] = ()) -> Any:
    """The value that ``encode`` was given; tensors are on the CPU.

    Raises:
        CheckpointError: it is no such JSON, or holds a pickle at a place that is not allowed to.
    """
    return _Decoder(get, frozenset(allow_pickle)).decode(value, place, 0)


class _Decoder:
    def __init__(self, get: Get, allow_pickle: frozenset[str]) -> None:
        self._get = get
        self._allow_pickle = allow_pickle

    def decode(self, value: Any, place: str, depth: int) -> Any:
        if depth > 3 * MAX_DEPTH:
            raise CheckpointError(f"{place[:80]}... is nested deeper than any value that is saved.")
        if isinstance(value, list):
            return [self.decode(item, f"{place}.{index}", depth + 1) for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        marks = [key for key in value if key.startswith("$")]
        if not marks:
            return {key: self.decode(item, f"{place}.{key}", depth + 1) for key, item in value.items()}
        try:
            return self._marked(marks[0], value[marks[0]], place, depth)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{place} of the checkpoint is not what was saved: {error!r}.") from error

    def _marked(self, mark: str, value: Any, place: str, depth: int) -> Any:
        if mark == "$scalar":
            return torch.tensor(value[0], dtype=DTYPES[value[1]])
        if mark == "$tensor":
            return self._get(value)
        if mark == "$array":
            return self._get(value).numpy()
        if mark == "$bytes":
            return base64.b64decode(value, validate=True)
        if mark == "$dtype":
            dtype = getattr(torch, value, None)
            if not isinstance(dtype, torch.dtype):
                raise CheckpointError(f"{place} of the checkpoint names the unknown dtype {value!r}.")
            return dtype
        if mark == "$pickle":
            if place not in self._allow_pickle:
                raise CheckpointError(
                    f"{place} of the checkpoint is a pickle, and loading one runs whatever code its writer put there. "
                    f"If you trust the checkpoint, allow it by name: allow_pickle=[{place!r}]."
                )
            return pickle.loads(self._get(value).numpy().tobytes())
        items = self.decode(value, place, depth + 1)
        made: dict[str, Callable[[Any], Any]] = {"$tuple": tuple, "$set": set, "$dict": dict, "$counter": _counter}
        if mark not in made:
            raise CheckpointError(f"{place} of the checkpoint has the unknown mark {mark!r}: a newer version wrote it.")
        return made[mark](items)


def _counter(pairs: Any) -> Counter[Any]:
    return Counter(dict(pairs))
