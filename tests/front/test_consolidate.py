"""`shardwise consolidate` writes whole weights of a checkpoint, and says what it could not do."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import shardwise
from tests.front.command import shardwise as run


def write_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    config = {"train_micro_batch_size_per_gpu": 1}
    engine, *_ = shardwise.initialize(model=torch.nn.Linear(50, 30), config=config, device="cpu")
    with engine:
        engine.save_checkpoint(directory, tag="mine")
        return dict(engine.state_dict())


def test_the_command(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "checkpoints")
    done = run("consolidate", "checkpoints", "weights", "--dtype", "bf16", "--max_shard_size", "1KB",
               temporary=tmp_path, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Processing zero checkpoint at checkpoints/mine" in done.stdout
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "weights").glob("model-*-of-00002.safetensors"):
        found |= load_file(path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in weights.items())
    done = run("consolidate", "checkpoints", "model.bin", "--tag", "mine", temporary=tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = torch.load(tmp_path / "model.bin", weights_only=True)
    assert all(torch.equal(whole[name], value) for name, value in weights.items())


def test_a_mistake_is_a_short_message(tmp_path: Path) -> None:
    done = run("consolidate", str(tmp_path), "out", temporary=tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "latest" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3
