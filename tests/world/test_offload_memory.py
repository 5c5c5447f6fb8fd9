"""A model bigger than its memory: moments of four times the allowed bytes train from files, and not without them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.world.engine_runs import config_of, open_engine
from tests.world.offload_runs import zero_block
from tests.worlds import World

WIDTH = 1021
NUM_BLOCKS = 40
WINDOW = 1 << 18

_RUN = f"""
import json, re, resource, sys, threading
import torch
from torch import nn
import shardwise

threading.stack_size(1 << 18)  # the limit counts addresses, and a thread that sleeps in a read has 8 MiB of them

directory, device = sys.argv[1:]
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear({WIDTH}, {WIDTH}) for _ in range({NUM_BLOCKS})))
numel = sum(p.numel() for p in model.parameters())
place = {{"device": device, "nvme_path": directory}}
config = {{
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {{
        "stage": 3,
        "sub_group_size": {WINDOW},
        "offload_param": {{**place, "buffer_count": 2}},
        "offload_optimizer": {{**place, "buffer_count": 3}},
    }},
}}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine, _, _, _ = shardwise.initialize(model=model, optimizer=optimizer, config=config)
losses = []

def step():
    loss = engine(torch.ones(1, {WIDTH})).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(float(loss.detach()))

allowed = 8 * numel // 4  # a quarter of Adam's moments
report = engine.memory_report()
# Slabs were allocated already, and are no private memory: the limit is to count them all the same.
data = 1024 * int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_DATA, (data + allowed - report.host_bytes,) * 2)
for _ in range(3):
    step()
print(json.dumps(dict(losses=losses, allowed=allowed, host=report.host_bytes, files=report.nvme_bytes, numel=numel)))
engine.close()
"""


def run_limited(directory: Path, device: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", _RUN, str(directory), device]
    # One arena and one thread: what the limit counts is then what was asked for.
    environment = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=800)


def test_four_times_the_allowed_memory_trains_from_files(tmp_path: Path) -> None:
    run = run_limited(tmp_path, "nvme")
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["losses"][0] > found["losses"][2]
    assert found["files"] >= 16 * found["numel"]
    assert found["host"] < found["allowed"]


def test_the_same_run_without_files_dies(tmp_path: Path) -> None:
    run = run_limited(tmp_path, "none")
    assert run.returncode != 0
    assert "allocate" in run.stderr or "MemoryError" in run.stderr, run.stderr[-3000:]


def staging_is_the_formula(directory: str, parameter: str, optimizer: str) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    zero = zero_block(parameter, optimizer, Path(directory))
    zero["sub_group_size"] = WINDOW
    zero["offload_param"]["buffer_count"] = 3
    with open_engine(model, torch.optim.AdamW(model.parameters()), config_of(3, zero=zero)) as engine:
        shard = -(-(WIDTH * WIDTH + WIDTH + 63) // (64 * engine._comm.size)) * 64
        report = engine.memory_report()
        page = 4096
        states = {"nvme": 4 * 4 * (WINDOW * 4 if parameter == "nvme" else WINDOW * 3)}.get(optimizer, 0)
        slabs = {"nvme": 3 * 4 * shard}.get(parameter, 0)
        assert report.states_bytes == report.predicted_bytes
        assert abs(report.host_bytes - states - slabs) <= 8 * page, (report.host_bytes, states, slabs)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("pair", [("nvme", "nvme"), ("none", "nvme"), ("nvme", "none")], ids="-".join)
def test_host_memory_is_the_formula(world: World, pair: tuple[str, str], tmp_path: Path) -> None:
    world.run(staging_is_the_formula, str(tmp_path), *pair)
