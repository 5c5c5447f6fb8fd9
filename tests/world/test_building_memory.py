"""Bytes: building, loading and handing over a model holds this rank's shards, and a unit or a few parameters beside."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from tests.world.engine_runs import config_of, open_engine
from tests.world.test_memory import live_bytes_beyond, live_storages
from tests.worlds import World, _free_port

WIDTH, DEPTH = 256, 12
ROOM = 4 * 4 * WIDTH**2
"""Four matrices."""


class Deep(nn.Module):
    """As a language model is built: blocks, then all weights once more from the outside; `sample` is asked often."""

    def __init__(self, width: int, depth: int, sample: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)))
            if sample is not None:
                sample()
        for parameter in self.parameters():
            nn.init.normal_(parameter)
            if sample is not None:
                sample()


def look_again(before: dict[int, int]) -> int:
    time.sleep(0.05)  # a thread of gloo lets go of a buffer a moment after who waited for it goes on
    return live_bytes_beyond(before)


def peaks() -> dict[str, int]:
    gc.collect()
    before = live_storages()
    found: dict[str, int] = {"building": 0, "handing over": 0}

    def sample() -> None:
        with torch._C.DisableTorchFunction():  # who asks a parameter for its storage makes it stay
            found["building"] = max(found["building"], live_bytes_beyond(before))

    torch.manual_seed(0)
    with shardwise.zero.Init(max_whole_bytes=ROOM):
        model = Deep(WIDTH, DEPTH, sample)
    found["whole"] = sum(parameter.nbytes for parameter in model.parameters())
    gc.collect()
    found["built"] = min(look_again(before) for _ in range(5))
    from shardwise.zero import parameters

    plain = parameters.copy_whole

    def copy_whole(*arguments: Any) -> None:
        plain(*arguments)
        found["handing over"] = max(found["handing over"], live_bytes_beyond(before))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(parameters, "copy_whole", copy_whole)
        with open_engine(model, None, config_of(3, shardwise={"transport": "process_group"})):
            gc.collect()
            found["handed over"] = live_bytes_beyond(before)
    return found


def test_no_more_lives_at_once_than_was_promised(world3: World) -> None:
    matrix, small = 4 * WIDTH**2, 4 * WIDTH * 2 * DEPTH
    for found in world3.run(peaks):
        shards = found["whole"] / 3
        assert found["built"] <= shards + small + matrix // 2, found
        # The limit, what the next operation needs, and a copy of a slice that travels.
        assert found["building"] <= shards + small + ROOM + 3 * matrix, found
        # A unit is whole while the next one's pieces are still there.
        assert found["handing over"] <= shards + small + 4 * matrix, found
        assert found["handed over"] <= shards + small + matrix, found


LIMITED = """
import resource, sys
import torch
from torch import nn
import shardwise
from tests.world.test_building_memory import Deep

way, path, width, depth = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
shardwise.init_distributed(device="cpu")

def data_bytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024

def use(way, width, depth):
    if way == "plain":
        model = Deep(width, depth)
    elif way == "init":
        with shardwise.zero.Init(max_whole_bytes=1 << 23):
            model = Deep(width, depth)
        shardwise.load_pretrained(model, path) if width > 8 else None
    elif way == "meta":
        with torch.device("meta"):
            model = Deep(width, depth)
        shardwise.load_pretrained(model, path)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
              "shardwise": {"transport": "process_group"}}
    engine, *_ = shardwise.initialize(model=model, config=config, device="cpu")
    shards = sum(segment.parameters.resting.load().sum().item() for unit in engine._units for segment in unit.segments)
    engine.close()
    return shards

use("init", 8, 2)  # what libraries load lazily is no model
model_bytes = 8 * width**2 * depth
resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + model_bytes // 4,) * 2)
print("sum of my shards", use(way, width, depth))
"""
BIG_WIDTH, BIG_DEPTH, RANKS = 1024, 48, 6  # 403 MB


def run_limited(way: str, path: Path) -> tuple[int, str]:
    arguments = [way, str(path), str(BIG_WIDTH), str(BIG_DEPTH)]
    port = str(_free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LIMITED, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                "RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                # What malloc keeps of freed tensors is held by nobody: let it keep nothing large.
                "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin",
            },
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    outputs = []
    try:
        for rank in ranks:
            outputs.append(rank.communicate(timeout=400)[0])
            if rank.returncode:  # the others would wait for it
                break
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return sum("sum of my shards" in output for output in outputs), "\n".join(outputs)


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("big")
    names = [name for name, _ in Deep(8, BIG_DEPTH).named_parameters()]
    files = {name: f"part{i // 16}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        own = [name for name in names if files[name] == file]
        shapes = {name: (BIG_WIDTH, BIG_WIDTH) if name.endswith("weight") else (BIG_WIDTH,) for name in own}
        save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is on what Linux counts as data")
@pytest.mark.parametrize("way", ["init", "meta"])
def test_a_model_of_four_times_the_allowed_memory(way: str, big_file: Path) -> None:
    number, output = run_limited(way, big_file)
    assert number == RANKS, output
    shards = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("sum of my shards")]
    assert sum(shards) == 0.5 * 2 * BIG_DEPTH * (BIG_WIDTH**2 + BIG_WIDTH)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is on what Linux counts as data")
def test_the_ordinary_way_does_not_fit(big_file: Path) -> None:
    number, output = run_limited("plain", big_file)
    assert number == 0
    assert "can't allocate memory" in output or "MemoryError" in output or "bad_alloc" in output, output
