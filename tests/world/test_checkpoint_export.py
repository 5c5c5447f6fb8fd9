"""Weights for others: streamed to rank 0, as shards or one file, in the dtype that the model computes in."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shardwise.errors import CheckpointError, ConfigError
from tests.accelerators import accelerator_of, model_of
from tests.checkpoints import begin, train_steps
from tests.world.engine_runs import STAGES, config_of, open_engine, rank
from tests.worlds import World

ALLOWED = {"stage3_gather_16bit_weights_on_model_save": True}
NARROW = {"bf16": {"enabled": True}}


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors":
            found |= load_file(path)
        elif path.suffix == ".bin":
            found |= torch.load(path, weights_only=True)
    return found


def exports(stage: int, directory: str) -> None:
    base = Path(directory)
    with begin(config_of(stage, zero=ALLOWED, **NARROW)) as engine:
        train_steps(engine, 0, 2)
        wanted = engine.state_dict()
        engine.write_weights(base / "shards", max_shard_size="8KB")
        engine.write_weights(base / "one.safetensors")
        engine.save_16bit_model(base / "torch")
        engine.save_16bit_model(base / "trained", "trained.bin", exclude_frozen_parameters=True)
        gathered = engine.gather_state_dict()
        train_steps(engine, 2, 3)  # the export has left no unit whole
    if rank() != 0:
        assert gathered == {}
        return
    assert list(gathered) == list(wanted)
    index = json.loads((base / "shards" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (base / "shards").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 2
    assert sorted(index["weight_map"]) == sorted(set(wanted) - {"right.weight"})
    trained = read_all(base / "trained")
    assert set(wanted) - set(trained) == {"frozen.weight", "frozen.bias"}
    for found in (gathered, read_all(base / "shards"), load_file(base / "one.safetensors"), read_all(base / "torch"),
                  trained):  # fmt: skip
        for name, value in found.items():
            assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), name
    assert "right.weight" in read_all(base / "torch")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 3], indirect=True)
def test_every_file_has_the_engines_weights(world: World, stage: int, tmp_path: Path) -> None:
    world.run(exports, stage, str(tmp_path))


def not_allowed(directory: str) -> None:
    with begin(config_of(3)) as engine:
        with pytest.raises(ConfigError, match="stage3_gather_16bit_weights_on_model_save"):
            engine.save_16bit_model(directory)
        assert not list(Path(directory).iterdir())


def test_gathering_that_is_not_allowed_says_what_to_set(world2: World, tmp_path: Path) -> None:
    world2.run(not_allowed, str(tmp_path))


class OneUnit(nn.Module):
    """Parameters that lie in one flat buffer, cut by ranks in their middle; 4 MB each but for an odd one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(1024, 1024)) for _ in range(11))
        self.odd = nn.Parameter(torch.randn(1021, 7))
        self.number = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = x @ weight
        return x * self.number


LARGEST = 4 << 20
TOTAL = 11 * LARGEST


def growth_of_a_gather(transport: str) -> tuple[int, int]:
    """By how much the peak of resident memory grew, and the bytes that stay in the transport's memory file."""
    config = config_of(3, shardwise={"transport": transport})
    with open_engine(OneUnit(), None, config) as engine:
        assert len(engine._units) == 1
        file = engine._comm._file.fd if transport == "shared_memory" else None
        held = os.fstat(file).st_blocks if file is not None else 0
        before = reset_peak()
        found = engine.gather_state_dict()
        grown = resident("VmHWM") - before
        if rank() == 0:
            wanted = OneUnit().state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
        return grown, os.fstat(file).st_blocks - held if file is not None else 0


def reset_peak() -> int:
    """After the C library gave back what it keeps of freed memory: the next peak is then what is asked for."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell peaks apart")
@pytest.mark.parametrize("transport", ["shared_memory", "process_group"])
def test_a_gather_needs_the_result_and_one_parameter(world2: World, transport: str) -> None:
    (first, first_kept), (second, second_kept) = world2.run(growth_of_a_gather, transport)
    slack = 3 << 20
    assert TOTAL <= first <= TOTAL + LARGEST + slack, f"rank 0 grew by {first / 2**20:.1f} MiB"
    assert second <= LARGEST + slack, f"rank 1 grew by {second / 2**20:.1f} MiB"
    assert (first_kept, second_kept) == (0, 0), "memory of the gather was kept"


def full_disk(directory: str) -> str:
    """Rank 0's directory is a file: all ranks are told, and the engine goes on."""
    with begin(config_of(3)) as engine:
        try:
            engine.write_weights(f"{directory}/file/weights")
        except (CheckpointError, OSError) as error:
            train_steps(engine, 0, 1)
            return str(error)
    return ""


def test_a_disk_that_fails_is_told_on_all_ranks(world2: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    for told in world2.run(full_disk, str(tmp_path)):
        assert "could not be written" in told


def front_end(stage: int, directory: str) -> None:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage, **ALLOWED}
    }  # fmt: skip
    with accelerator_of(config) as accelerator:
        model = accelerator.prepare(model_of())
        accelerator.save_model(model, f"{directory}/model", max_shard_size="30KB")
        state = accelerator.get_state_dict(model)
        if not accelerator.is_main_process:
            assert stage < 3 or state == {}
            return
        found = read_all(Path(directory) / "model")
        assert all(torch.equal(found[name], value) for name, value in model_of().state_dict().items())
        assert state is not None and all(torch.equal(found[name], value) for name, value in state.items())
        plain = torch.nn.Linear(3, 2)
        accelerator.save_model(plain, f"{directory}/plain", safe_serialization=False)
        assert torch.equal(read_all(Path(directory) / "plain")["weight"], plain.weight)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_accelerators_methods(world2: World, stage: int, tmp_path: Path) -> None:
    world2.run(front_end, stage, str(tmp_path))


def pretrained(directory: str) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=41, n_positions=16)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **ALLOWED}}
    with accelerator_of(config) as accelerator:
        torch.manual_seed(2)
        model = transformers.GPT2LMHeadModel(settings)
        wanted = {name: value.clone() for name, value in model.state_dict().items()}
        prepared = accelerator.prepare(model)
        accelerator.save_model(prepared, directory, max_shard_size="20KB")
        if accelerator.is_main_process:
            settings.save_pretrained(directory)
            again = transformers.GPT2LMHeadModel.from_pretrained(directory)
            assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
            assert again.lm_head.weight is again.transformer.wte.weight


def test_from_pretrained_reads_it(world2: World, tmp_path: Path) -> None:
    world2.run(pretrained, str(tmp_path))
