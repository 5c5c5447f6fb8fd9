"""The fear: an object of settings takes a value and does something else with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    ProfileKwargs,
    clean_state_dict_for_safetensors,
    compare_versions,
    is_torch_version,
    load,
)
from tests.accelerators import accelerator_of


def test_hooks_of_gradients_are_a_dtype_or_refused() -> None:
    assert DistributedDataParallelKwargs(find_unused_parameters=True).communication_dtype is None
    assert DistributedDataParallelKwargs(comm_hook="bf16").communication_dtype == "bf16"
    half = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16, comm_wrapper="fp16")
    assert half.communication_dtype == "fp16" and half.to_kwargs() == {"comm_hook": "fp16", "comm_wrapper": "fp16"}
    with pytest.raises(ConfigError, match=r"power_sgd.*'fp16' or 'bf16'"):
        DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.POWER_SGD)
    with pytest.raises(ConfigError, match="Leave comm_wrapper out"):
        DistributedDataParallelKwargs(comm_hook="fp16", comm_wrapper="bf16")
    with pytest.raises(ConfigError, match=r"'fp8'.*expected one of no, fp16"):
        DistributedDataParallelKwargs(comm_hook="fp8")


def test_with_zero_the_json_says_the_dtype_of_gradients() -> None:
    handlers = [DistributedDataParallelKwargs(comm_hook="fp16")]
    with (
        pytest.raises(ConfigError, match="communication_data_type"),
        accelerator_of({"zero_optimization": {"stage": 2}}, kwargs_handlers=handlers),
    ):
        pass


def test_a_profile_is_of_the_block_and_written_where_it_was_asked_for(tmp_path: Path) -> None:
    handler = ProfileKwargs(activities=["cpu"], record_shapes=True, output_trace_dir=str(tmp_path / "traces"))
    with accelerator_of(kwargs_handlers=[handler]) as accelerator:
        torch.ones(3).sin()
        with accelerator.profile() as profiler:
            torch.ones(17).cos()
        events = {event.key for event in profiler.key_averages()}
        assert "aten::cos" in events and "aten::sin" not in events
        assert any([17] in event.input_shapes for event in profiler.events())
        assert "aten::cos" in (tmp_path / "traces" / "profile_0.json").read_text()


def test_a_profile_follows_its_schedule() -> None:
    ready = []
    handler = ProfileKwargs(
        activities=["cpu"],
        schedule_option={"wait": 1, "warmup": 1, "active": 2, "repeat": 1},
        on_trace_ready=lambda profiler: ready.append(sum(e.count for e in profiler.key_averages() if "cos" in e.key)),
    )
    with accelerator_of() as accelerator, accelerator.profile(handler) as profiler:
        for _ in range(6):
            torch.ones(3).cos()
            profiler.step()
    assert ready == [2]
    with pytest.raises(ConfigError, match=r"activities=\['tpu'\].*'cpu' and 'cuda'"):
        ProfileKwargs(activities=["tpu"])


@pytest.mark.parametrize(
    ("version", "operation", "other", "holds"),
    [
        ("2.10.0", ">", "2.9", True),
        ("2.9.1+cpu", ">=", "2.9.1", True),
        ("1.0", "==", "1.0.0", True),
        ("1.0rc1", "<", "1.0", True),
        ("3.0", "<=", "2.99", False),
        ("3.0", "!=", "3.0", False),
    ],
)
def test_versions_compare_as_versions(version: str, operation: str, other: str, holds: bool) -> None:
    assert compare_versions(version, operation, other) is holds


def test_versions_of_packages() -> None:
    assert is_torch_version(">=", "2.0") and not is_torch_version("<", "2.0") and compare_versions("torch", ">", "2")
    with pytest.raises(ConfigError, match="not installed"):
        compare_versions("no-such-package", ">", "1")
    with pytest.raises(ConfigError, match=r"'=>'.*expected one of > >="):
        is_torch_version("=>", "2.0")


def test_loading_unpickles_tensors_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "tensors.pt")
    assert load(tmp_path / "tensors.pt")["a"].tolist() == [0, 1, 2]
    torch.save(Path("somewhere"), tmp_path / "object.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load(tmp_path / "object.pt")
    assert load(tmp_path / "object.pt", weights_only=False) == Path("somewhere")


def test_a_state_dict_for_safetensors_names_each_memory_once() -> None:
    weight = torch.randn(4, 6)
    clean = clean_state_dict_for_safetensors(
        {"a": weight, "tied": weight, "turned": torch.randn(3, 2).t(), "n": "4bit"}
    )
    assert set(clean) == {"a", "turned", "n"} and clean["turned"].is_contiguous() and clean["n"] == "4bit"
