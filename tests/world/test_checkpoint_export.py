"""Weights for others: streamed to rank 0, as shards or one file, in the dtype that the model computes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardwise.checkpoint import export
from shardwise.errors import CheckpointError, ConfigError
from tests.accelerators import accelerator_of, model_of
from tests.checkpoints import begin, train_steps
from tests.world.engine_runs import STAGES, config_of, rank
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


def one_unit_at_a_time() -> tuple[int, int]:
    """The most bytes of whole units at once, and those of the largest unit."""
    with begin(config_of(3)) as engine:
        trained = engine.trained()
        order, _ = export.plan(trained)
        most = 0
        for _ in export.stream(order, 0):
            most = max(most, sum(unit.live_bytes() for unit in engine._units))
        return most, max(sum(s.parameters.full.nbytes for s in unit.segments) for unit in engine._units)


def test_one_unit_is_whole_at_a_time(world2: World) -> None:
    for most, largest in world2.run(one_unit_at_a_time):
        assert 0 < most <= largest


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
