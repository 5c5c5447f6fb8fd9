"""What is split between processes is there once, in order and evenly; padding makes the shares equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.process import share, split

lengths = st.integers(0, 40)
worlds = st.integers(1, 9)


@given(lengths, worlds)
def test_every_item_goes_to_one_process_in_order(length: int, num_processes: int) -> None:
    shares = [share(length, rank, num_processes) for rank in range(num_processes)]
    assert [item for each in shares for item in each] == list(range(length))
    sizes = [len(each) for each in shares]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@given(lengths.filter(bool), worlds, st.sampled_from(["list", "tuple", "tensor", "array"]))
def test_padded_shares_are_equally_long(length: int, num_processes: int, kind: str) -> None:
    make: dict[str, Any] = {"list": list, "tuple": tuple, "tensor": torch.tensor, "array": np.array}
    inputs = make[kind](list(range(length)))
    shares = [split(inputs, rank, num_processes, apply_padding=True) for rank in range(num_processes)]
    assert {type(each) for each in shares} == {type(inputs)}
    assert len({len(each) for each in shares}) == 1
    for rank, each in enumerate(shares):
        mine = [int(item) for item in each]
        plain = list(share(length, rank, num_processes)) if num_processes > 1 else list(range(length))
        assert mine[: len(plain)] == plain
        assert set(mine[len(plain) :]) <= {plain[-1] if plain else length - 1}


def test_a_dict_is_split_value_by_value_and_stays_as_it_is() -> None:
    inputs = {"a": [1, 2, 3], "b": torch.arange(3)}
    first, second = (split(inputs, rank, 2, apply_padding=False) for rank in range(2))
    assert first["a"] == [1, 2] and first["b"].tolist() == [0, 1]
    assert second["a"] == [3] and second["b"].tolist() == [2]
    assert inputs["a"] == [1, 2, 3]
    with pytest.raises(ConfigError, match="'b': 2"):
        split({"a": [1, 2, 3], "b": [1, 2]}, 0, 2, apply_padding=False)


def test_a_dataset_is_asked_for_rows() -> None:
    class Dataset:
        def __len__(self) -> int:
            return 5

        def select(self, rows: list[int]) -> list[int]:
            return rows

    assert split(Dataset(), 1, 2, apply_padding=True) == [3, 4, 4]


@pytest.mark.parametrize("inputs", ["one prompt", 7, None])
def test_one_thing_goes_to_all(inputs: Any) -> None:
    assert split(inputs, 1, 2, apply_padding=True) == inputs
