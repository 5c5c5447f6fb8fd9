"""The fear: a benchmark that says a copy is hidden when it is not, or counts bytes that never crossed the bus."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from bench.device_trace import DeviceTrace
from bench.gpu_offload import LIBRARIES_BYTES, SIZES, Needs, Run, build_model, missing_room, predicted
from bench.intervals import Interval, common, length, share_beside, united
from shardwise.store.base import PAGE_BYTES
from tests.world.engine_runs import open_engine
from tests.world.offload_runs import host_memory_apart

HORIZON = 40


def some_intervals(generator: random.Random) -> list[Interval]:
    """Overlapping, touching and empty ones, in no order."""
    begins = [generator.randrange(HORIZON) for _ in range(generator.randrange(7))]
    return [(begin, min(HORIZON, begin + generator.randrange(9))) for begin in begins]


def moments(intervals: list[Interval]) -> set[int]:
    """The same by brute force: the unit steps of time that they cover."""
    return {moment for begin, end in intervals for moment in range(int(begin), int(end))}


@pytest.mark.parametrize("seed", range(40))
def test_intervals_are_sets_of_moments(seed: int) -> None:
    generator = random.Random(seed)
    some, others = some_intervals(generator), some_intervals(generator)
    for found, expected in (
        (united(some), moments(some)),
        (common(some, others), moments(some) & moments(others)),
    ):
        assert moments(found) == expected
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(found)), found
        assert all(begin < end for begin, end in found), found
    assert length(some) == len(moments(some))
    share = share_beside(some, others)
    if not moments(some):
        assert share is None
    else:
        assert share == len(moments(some) & moments(others)) / len(moments(some))


def event(category: str, name: str, begin: float, microseconds: float, **args: object) -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": microseconds, "args": args}


def test_a_trace_is_read_by_direction(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    events = [
        {"ph": "M", "name": "process_name", "ts": 0},
        event("kernel", "gemm", 100, 50),
        event("kernel", "gemm of another stream", 120, 60),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 90, 20, bytes=4096),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 160, 40, bytes=1000),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 170, 10, bytes=24),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0, 500, bytes=1 << 30),
        event("gpu_memset", "Memset (Device)", 0, 500, bytes=1 << 30),
        event("cuda_runtime", "cudaMemcpyAsync", 0, 500),
        {"ph": "i", "cat": "kernel", "name": "a mark", "ts": 5},
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    trace = DeviceTrace.read(path)
    assert trace.kernel_seconds == pytest.approx(80e-6)
    up, down = trace.transfer(trace.up), trace.transfer(trace.down)
    assert (up.num_bytes, up.hidden_share) == (4096, 0.5)
    assert (down.num_bytes, down.hidden_share) == (1024, 0.5)
    assert down.seconds == pytest.approx(40e-6)


def run_of(size: str, parameters: str, device: str) -> Run:
    return Run(size, parameters, "cpu", device, "/", 1, 16, 1, 1, 0, {})


def test_predicted_host_memory_is_what_the_engine_takes() -> None:
    run = run_of("tiny", "cpu", "cuda")
    model = build_model(SIZES["tiny"], torch.bfloat16, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with host_memory_apart(), open_engine(model, optimizer, run.engine_config, device="cpu") as engine:
        taken = engine.memory_report().host_bytes
    found = predicted(run).host - LIBRARIES_BYTES
    pages = 6 * PAGE_BYTES * (1 + SIZES["tiny"].layers)  # each unit's four states and its parameters end on whole ones
    assert abs(found - taken) <= pages < found / 10, (found, taken)


def test_what_does_not_fit_is_named() -> None:
    gib = 1 << 30
    needs = predicted(run_of("6.7B", "cpu", "cuda"))
    assert 17.9 < (needs.host - 5 * gib) / 6_658_404_352 < 18.1
    assert missing_room(needs, Needs(128 * gib, 0, 80 * gib)) == ""
    assert "117 GiB of host memory, and 96 are free" in missing_room(needs, Needs(96 * gib, 0, 80 * gib))
    assert "GPU memory" in missing_room(needs, Needs(128 * gib, 0, 8 * gib))
