"""A value that was saved comes back as it was, whatever nests in it; what cannot be kept is refused with its place."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.checkpoint.tree import decode, encode
from shardwise.errors import CheckpointError


def there_and_back(value: Any, **allowed: Any) -> Any:
    import json

    kept: list[torch.Tensor] = []

    def put(tensor: torch.Tensor) -> str:
        kept.append(tensor.clone())
        return str(len(kept) - 1)

    text = json.dumps(encode(value, put, "value", **allowed))
    return decode(json.loads(text), lambda key: kept[int(key)], "value", **allowed)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4) | st.tuples(inner, inner)
    | st.sets(st.integers(), max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
@settings(deadline=None, max_examples=200)
def test_nested_values(value: Any) -> None:
    found = there_and_back(value)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool,
                                   torch.uint8, torch.complex64])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.randn(shape) * 3).to(dtype)
    found = there_and_back([value])[0]
    assert found.dtype == dtype
    assert found.shape == value.shape
    assert torch.equal(found, value)


def test_numbers_at_the_edge() -> None:
    found = there_and_back({"a": float("inf"), "b": -float("inf"), "c": float("nan"), "d": 5e-324, "e": -0.0})
    assert found["a"] == math.inf and found["b"] == -math.inf and math.isnan(found["c"])
    assert found["d"] == 5e-324 and math.copysign(1, found["e"]) == -1
    assert torch.isnan(there_and_back(torch.tensor(float("nan"))))
    assert torch.equal(there_and_back(torch.tensor(16777217, dtype=torch.int64)), torch.tensor(16777217))


def test_what_schedulers_and_loaders_keep() -> None:
    class Mode(Enum):
        A = 1

    class Level(IntEnum):
        HIGH = 3

    value = {
        "milestones": Counter({30: 1, 80: 2}),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "number": np.float64(0.1),
        "ordered": OrderedDict(a=1),
        "dtype": torch.bfloat16,
        "level": Level.HIGH,
    }
    found = there_and_back(value)
    assert found["milestones"] == value["milestones"] and isinstance(found["milestones"], Counter)
    assert np.array_equal(found["array"], value["array"]) and found["array"].dtype == np.float32
    assert found["number"] == 0.1 and found["ordered"] == {"a": 1} and found["dtype"] is torch.bfloat16
    assert found["level"] == 3
    with pytest.raises(CheckpointError, match=r"value\.mode is a Mode.*allow_pickle"):
        there_and_back({"mode": Mode.A})


def test_other_objects_are_refused_with_their_place() -> None:
    with pytest.raises(CheckpointError, match=r"value\.a\.1\.b is a object.*allow_pickle=\['value\.a\.1\.b'\]"):
        there_and_back({"a": [0, {"b": object()}]})
    assert there_and_back({"a": [0, {"b": range(3)}]}, allow_pickle=["value.a.1.b"])["a"][1]["b"] == range(3)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nested"):
        there_and_back(loop)
