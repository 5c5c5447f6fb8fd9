"""An operation reaches every tensor in any nesting, keeps all classes and everything else, and changes no argument."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch

from shardwise import operations
from shardwise.errors import ConfigError
from shardwise.operations import UnsupportedTypeError

Pair = namedtuple("Pair", ["left", "right"])


@dataclass(frozen=True)
class Output:
    loss: torch.Tensor
    name: str = "unnamed"


class Encoding(UserDict[str, Any]):
    """Like the batches of tokenizers: a mapping that holds more than its items."""

    def __init__(self, data: dict[str, Any], encodings: str = "") -> None:
        super().__init__(data)
        self.encodings = encodings


class Movable(Encoding):
    def to(self, device: Any) -> Movable:
        return Movable({key: value.to(device) for key, value in self.data.items()}, "moved")


def nested() -> dict[str, Any]:
    one = torch.ones(2)
    return {
        "list": [one, "text", None],
        "tuple": (one, 1),
        "pair": Pair(one, [one]),
        "output": Output(one, "mine"),
        "encoding": Encoding({"ids": one}, "kept"),
        "ordered": OrderedDict(b=one, a=one),
        "default": defaultdict(list, {"x": one}),
        "proxy": MappingProxyType({"x": one}),
    }


def test_every_tensor_is_reached_and_every_class_is_kept() -> None:
    data = nested()
    result = operations.recursively_apply(lambda tensor: tensor * 2, data)
    assert {key: type(value) for key, value in result.items()} == {key: type(value) for key, value in data.items()}
    found = list(operations._tensors(result))
    assert len(found) == len(list(operations._tensors(data))) == 10
    assert all(torch.equal(tensor, torch.full((2,), 2.0)) for tensor in found)
    assert result["list"][1:] == ["text", None]
    assert result["output"].name == "mine"
    assert result["encoding"].encodings == "kept"
    assert list(result["ordered"]) == ["b", "a"]
    assert result["default"]["absent"] == []
    assert all(torch.equal(tensor, torch.ones(2)) for tensor in operations._tensors(data)), "the argument was changed"


def test_something_else_is_refused_where_only_tensors_make_sense() -> None:
    with pytest.raises(UnsupportedTypeError, match="'text' of type str"):
        operations.recursively_apply(torch.clone, nested(), error_on_other_type=True)
    assert issubclass(UnsupportedTypeError, TypeError) and issubclass(UnsupportedTypeError, ConfigError)


def test_moving_leaves_skipped_keys_and_uses_the_method_of_a_batch() -> None:
    data = {"x": torch.ones(2), "keep": torch.ones(2), "batch": Movable({"ids": torch.ones(2)})}
    moved = operations.send_to_device(data, "meta", skip_keys="keep")
    assert moved["x"].device.type == moved["batch"]["ids"].device.type == "meta"
    assert moved["batch"].encodings == "moved"
    assert moved["keep"].device.type == "cpu"
    everywhere = operations.send_to_device(nested(), torch.device("meta"), non_blocking=True)
    assert {tensor.device.type for tensor in operations._tensors(everywhere)} == {"meta"}
    deep = operations.send_to_device([{"keep": torch.ones(1), "x": torch.ones(1)}], "meta", skip_keys=["keep"])
    assert [deep[0][key].device.type for key in ("keep", "x")] == ["cpu", "meta"]


def test_a_structure_describes_tensors_that_can_be_made_again() -> None:
    data = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": [torch.tensor(1)], "c": "text"}
    structure = operations.get_data_structure(data)
    assert operations.is_tensor_information(structure["a"])
    made = operations.initialize_tensors(structure)
    assert operations.get_data_structure(made) == structure
    assert operations.get_shape(data) == {"a": [2, 3], "b": [[]], "c": "text"}


@pytest.mark.parametrize(
    ("data", "size"),
    [(torch.ones(3, 2), 3), ({"a": [torch.ones(4)], "b": torch.ones(5)}, 4), (Output(torch.ones(2)), 2)],
)
def test_the_first_tensor_gives_the_batch_size(data: Any, size: int) -> None:
    assert operations.find_batch_size(data) == operations.ignorant_find_batch_size(data) == size


@pytest.mark.parametrize("data", [[], {}, "text", 1, [1], torch.tensor(1), [[], torch.ones(2)]])
def test_no_batch_size_is_an_error_or_none(data: Any) -> None:
    with pytest.raises(ConfigError):
        operations.find_batch_size(data)
    assert operations.ignorant_find_batch_size(data) is None


def test_slices_and_pieces_joined_again_are_the_whole() -> None:
    data = {"a": torch.arange(6), "b": Pair(torch.arange(12).view(6, 2), (torch.ones(6),))}
    pieces = [operations.slice_tensors(data, slice(at, at + 2)) for at in (0, 2, 4)]
    whole = operations.concatenate(pieces)
    assert type(whole["b"]) is Pair
    for joined, original in zip(operations._tensors(whole), operations._tensors(data), strict=True):
        assert torch.equal(joined, original)
    wide = operations.concatenate([[torch.ones(2, 1)], [torch.zeros(2, 2)]], dim=1)
    assert wide[0].tolist() == [[1, 0, 0], [1, 0, 0]]
    with pytest.raises(UnsupportedTypeError, match="int"):
        operations.concatenate([[1], [2]])


@pytest.mark.parametrize(("batch_size", "num_processes", "padded"), [(3, 4, 4), (5, 4, 8), (6, 4, 8), (4, 4, 4)])
def test_padding_repeats_the_last_item_until_it_divides(batch_size: int, num_processes: int, padded: int) -> None:
    data = [torch.arange(batch_size), torch.tensor(7), torch.arange(2)]
    first, *others = operations.pad_input_tensors(data, batch_size, num_processes)
    assert first.tolist() == [*range(batch_size), *[batch_size - 1] * (padded - batch_size)]
    assert [tensor.shape for tensor in others] == [(), (2,)], "a tensor without the batch's dim stays"


def test_halves_become_fp32_and_nothing_else_changes() -> None:
    data = [torch.ones(1, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8)]
    dtypes = [tensor.dtype for tensor in operations.convert_to_fp32(data)]
    assert dtypes == [torch.float32, torch.float32, torch.float64, torch.int8]

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": x.bfloat16()}

    wrapped = operations.convert_outputs_to_fp32(forward)
    assert wrapped(torch.ones(1))["logits"].dtype == torch.float32
    assert wrapped.__wrapped__ is forward  # type: ignore[attr-defined]


def test_numbers_come_out_of_every_dtype() -> None:
    data = {"a": torch.ones(2, dtype=torch.bfloat16, requires_grad=True), "b": torch.tensor(True), "c": "text"}
    assert operations.listify(data) == {"a": [1.0, 1.0], "b": True, "c": "text"}


def test_the_device_is_that_of_the_first_tensor() -> None:
    assert operations.find_device([1, {"a": torch.ones(1, device="meta")}]) == torch.device("meta")
    assert operations.find_device({"a": 1}) is None


def test_an_unknown_reduction_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="sum, mean, max, none"):
        operations.reduce(torch.ones(1), "average")
