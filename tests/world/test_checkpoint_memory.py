"""Bytes: a rank reads what it will hold and no more; writing and consolidating hold no second copy of the model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.checkpoint import shard_file, zero_to_fp32
from shardwise.checkpoint.shard_file import BLOCK_BYTES
from tests.checkpoints import train_steps
from tests.models import build_wide
from tests.references import adamw_in_two_groups
from tests.world.engine_runs import config_of, open_engine
from tests.worlds import WorldPool

WIDTH, DEPTH = 1024, 48  # 201 MB of fp32, 4 MB the largest parameter


def write_wide(directory: str) -> int:
    model = build_wide()
    with open_engine(model, adamw_in_two_groups(model), config_of(0)) as engine:
        train_steps(engine, 0, 1)
        engine.save_checkpoint(directory)
        return 3 * 4 * sum(parameter.numel() for parameter in model.parameters())


def bytes_read(directory: str, stage: int) -> int:
    read = 0

    def counted(name: str) -> Callable[..., None]:
        plain = getattr(shard_file.ShardFile, name)

        def call(self: Any, key: str, begin: int, out: torch.Tensor) -> None:
            nonlocal read
            read += out.nbytes if "/tree/" not in key else 0
            plain(self, key, begin, out)

        return call

    model = build_wide()
    with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name in ("read_into", "read_later"):
                monkeypatch.setattr(shard_file.ShardFile, name, counted(name))
            engine.load_checkpoint(directory)
        return read


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_reads_what_it_will_hold(worlds: WorldPool, stage: int, tmp_path: Path) -> None:
    total = worlds[1].run(write_wide, str(tmp_path))[0]
    read = worlds[4].run(bytes_read, str(tmp_path), stage)
    assert sum(read) == total, "something was read twice, or not at all"
    assert max(read) < total / 4 * 1.01


MEASURED = """
import resource, sys
import torch
{prepare}
def peak():
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) * 1024
before = peak()
{measured}
print(peak() - before)
"""


def growth(prepare: str, measured: str) -> int:
    """By how many bytes the process's peak grew, pages of files included."""
    code = MEASURED.format(prepare=prepare, measured=measured)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def big_model(depth: int = DEPTH, vocabulary: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth))
    return nn.Sequential(nn.Embedding(vocabulary, WIDTH), *layers)


def write_big(directory: Path, *arguments: int) -> int:
    """Save a big model in a process of its own; by how much the save's peak grew."""
    prepare = (
        "import shardwise\nfrom tests.world.test_checkpoint_memory import big_model\n"
        f"engine, *_ = shardwise.initialize(model=big_model(*{arguments}), config={{'train_micro_batch_size_per_gpu': "
        "1}, device='cpu')"
    )
    return growth(prepare, f"engine.save_checkpoint({str(directory)!r})")


def consolidate(directory: Path, output: Path, max_shard_size: str) -> int:
    """By how much the peak of a process grew that had only the script."""
    prepare = f"sys.path.append({str(Path(zero_to_fp32.__file__).parent)!r})\n" \
              "from zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert"  # fmt: skip
    return growth(prepare, f"convert({str(directory)!r}, {str(output)!r}, {max_shard_size!r})")


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint, and the growth of the process that wrote it."""
    directory = tmp_path_factory.mktemp("big")
    return directory, write_big(directory)


def test_a_save_holds_one_block(big: tuple[Path, int]) -> None:
    assert big[1] < BLOCK_BYTES + 12 * 2**20


@pytest.mark.parametrize("output", ["weights.bin", "weights.safetensors", "shards"])
def test_consolidation_holds_one_parameter(big: tuple[Path, int], output: str, tmp_path: Path) -> None:
    total, largest = 4 * DEPTH * WIDTH**2, 4 * WIDTH**2
    grown = consolidate(big[0], tmp_path / output, "50MB")
    assert grown < total / 10 + largest + BLOCK_BYTES, f"{grown / 2**20:.0f} MiB of {total / 2**20:.0f}"
    if output == "weights.bin":
        found = torch.load(tmp_path / output, mmap=True, weights_only=True)
        wanted = big_model().state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("output", ["weights.bin", "shards"])
def test_consolidation_of_two_gigabytes(output: str, tmp_path: Path) -> None:
    """The largest parameter is half of what a tenth of the whole is."""
    depth, vocabulary = 450, 25_600
    largest = 4 * vocabulary * WIDTH
    total = largest + 4 * depth * WIDTH**2
    assert total > 1.99e9 and largest < total / 10
    assert write_big(tmp_path / "big", depth, vocabulary) < BLOCK_BYTES + 12 * 2**20
    grown = consolidate(tmp_path / "big", tmp_path / output, "500MB")
    assert grown < total / 10 + largest, f"{grown / 2**20:.0f} MiB of {total / 2**20:.0f}"
