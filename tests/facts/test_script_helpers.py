"""The small helpers that scripts import do what they say, and leave the environment and the model as they were."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import shardwise
from shardwise import availability, helpers, memory
from shardwise.environment import (
    clear_environment,
    get_int_from_env,
    parse_choice_from_env,
    parse_flag_from_env,
    patch_environment,
    str_to_bool,
)
from shardwise.errors import ConfigError, StateError
from shardwise.operations import convert_outputs_to_fp32

NAME = "SHARDWISE_TEST_VARIABLE"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)


# -- environment


@pytest.mark.parametrize("word", ["yes", "True", "1", "ON", "y", "t"])
def test_words_for_yes(word: str) -> None:
    assert str_to_bool(word) == 1 and str_to_bool(word, to_bool=True) is True


@pytest.mark.parametrize("word", ["no", "False", "0", "off"])
def test_words_for_no(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str_to_bool(word) == 0 and str_to_bool(word, to_bool=True) is False
    monkeypatch.setenv(NAME, word)
    assert parse_flag_from_env(NAME, True) is False


def test_a_word_that_says_neither_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "perhaps")
    with pytest.raises(ConfigError, match=f"{NAME}.*perhaps"):
        parse_flag_from_env(NAME)


def test_defaults_stand_where_nothing_is_set() -> None:
    assert parse_flag_from_env(NAME) is False and parse_flag_from_env(NAME, True) is True
    assert parse_choice_from_env(NAME) == "no"
    with patch_environment(**{NAME: 7}):
        assert get_int_from_env(["ABSENT", NAME], 1) == 7
    assert get_int_from_env(["ABSENT", NAME], 1) == 1


def test_a_patched_environment_is_put_back_also_after_an_error() -> None:
    before = dict(os.environ)
    with pytest.raises(RuntimeError), patch_environment(shardwise_test_variable=1, PATH="/nowhere"):
        assert (os.environ[NAME], os.environ["PATH"]) == ("1", "/nowhere")
        raise RuntimeError
    assert dict(os.environ) == before
    with clear_environment():
        assert not os.environ
        os.environ[NAME] = "1"
    assert dict(os.environ) == before


# -- memory


def test_the_batch_shrinks_until_it_fits() -> None:
    tried = []

    @memory.find_executable_batch_size(starting_batch_size=10)  # type: ignore[untyped-decorator]
    def train(batch_size: int, *, word: str) -> tuple[int, str]:
        tried.append(batch_size)
        if batch_size > 7:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 EiB")
        return batch_size, word

    assert train(word="done") == (7, "done")
    assert tried == [10, 9, 8, 7]


def test_no_batch_fits_or_something_else_is_wrong() -> None:
    def never(batch_size: int) -> None:
        raise MemoryError

    def wrong(batch_size: int) -> None:
        raise ValueError("wrong")

    sizes = iter([2, 0])
    with pytest.raises(StateError, match="reached zero"):
        memory.find_executable_batch_size(never, starting_batch_size=4, reduce_batch_size_fn=lambda: next(sizes))()
    with pytest.raises(ValueError, match="wrong"):
        memory.find_executable_batch_size(wrong)()
    with pytest.raises(ConfigError, match="Batch size was passed into never"):
        memory.find_executable_batch_size(never)(16)


def test_released_names_hold_nothing() -> None:
    assert memory.release_memory(torch.ones(1), "x") == [None, None]


# -- models and files


def test_the_model_inside_is_found() -> None:
    model = nn.Linear(2, 2)
    assert helpers.extract_model_from_parallel(nn.DataParallel(model)) is model
    assert helpers.extract_model_from_parallel(model) is model
    compiled: Any = torch.compile(model)
    around: Any = torch.compile(nn.DataParallel(model))
    assert helpers.extract_model_from_parallel(compiled) is compiled
    assert helpers.extract_model_from_parallel(compiled, keep_torch_compile=False) is model
    assert helpers.extract_model_from_parallel(nn.DataParallel(compiled)) is compiled
    assert helpers.extract_model_from_parallel(around) is model
    assert isinstance(around._orig_mod, nn.DataParallel), "unwrapping changed the wrapper"


def test_the_model_inside_an_engine_is_found() -> None:
    model = nn.Linear(2, 2)
    engine, *_ = shardwise.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1}, device="cpu")
    assert helpers.extract_model_from_parallel(engine) is model


def test_a_forward_in_fp32_is_unwrapped_on_demand() -> None:
    model = nn.Linear(2, 2)
    model.forward = convert_outputs_to_fp32(model.forward)  # type: ignore[method-assign]
    assert "forward" in vars(helpers.extract_model_from_parallel(model))
    helpers.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert "forward" not in vars(model)
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_saved_tensors_are_read_again(tmp_path: Path) -> None:
    tied, whole = torch.arange(4.0), torch.arange(6.0)
    tensors = {"a": tied, "b": tied, "part": whole[2:4], "whole": whole, "across": whole.view(2, 3).t()}
    helpers.save(tensors, tmp_path / "x.safetensors", safe_serialization=True)
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == {"a", "part", "whole", "across"}, "one name of a tied tensor is enough"
    assert all(torch.equal(loaded[name], tensors[name]) for name in loaded)
    helpers.save({"any": object}, tmp_path / "x.bin")
    assert torch.load(tmp_path / "x.bin", weights_only=False) == {"any": object}
    with pytest.raises(ConfigError, match="dict of tensors"):
        helpers.save({"any": 1}, tmp_path / "y", safe_serialization=True)


def test_dicts_merge_entry_by_entry() -> None:
    destination = {"a": {"x": 1, "y": 2}, "b": 1}
    assert helpers.merge_dicts({"a": {"y": 3}, "c": {"z": 4}}, destination) is destination
    assert destination == {"a": {"x": 1, "y": 3}, "b": 1, "c": {"z": 4}}


@pytest.mark.parametrize(
    ("size", "words"), [(10, "10 bytes"), (1024, "1.0 KB"), (1610612736, "1.5 GB"), (1024**5, "1024.0 TB")]
)
def test_bytes_in_words(size: int, words: str) -> None:
    assert helpers.convert_bytes(size) == words


def test_what_is_there_is_found() -> None:
    assert availability.is_pytest_available() and availability.is_deepspeed_available()
    assert not availability.is_xpu_available(check_device=True)
    assert availability.is_cuda_available() == torch.cuda.is_available()
