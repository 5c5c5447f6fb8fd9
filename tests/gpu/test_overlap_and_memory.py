"""On GPUs gathers run beside compute, and the allocator's peak is the states plus what the schedule allows."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.references import adamw_in_two_groups
from tests.world.engine_runs import STAGES, config_of, open_engine
from tests.world.test_memory import BIG_HIDDEN, BIG_WIDTH, Tower, bytes_allowed_at_once, formula_bytes, num_parameters
from tests.worlds import World

MICRO_BATCH = 4096
"""Large enough that a block computes for longer than its gather takes to start."""

Interval = tuple[float, float]


def steps_on_gpu(engine: object, steps: int, micro_batch: int) -> None:
    for _ in range(steps):
        loss = engine(torch.randn(micro_batch, BIG_WIDTH, device="cuda")).square().mean()  # type: ignore[operator]
        engine.backward(loss)  # type: ignore[attr-defined]
        engine.step()  # type: ignore[attr-defined]
    torch.cuda.synchronize()


def overlapped_microseconds() -> tuple[float, float]:
    """(time of all gathers, part of it during which a matrix product ran) in one step of stage 3."""
    model = Tower(BIG_WIDTH, BIG_HIDDEN).cuda()
    with open_engine(model, adamw_in_two_groups(model), config_of(3)) as engine:
        steps_on_gpu(engine, 3, MICRO_BATCH)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            steps_on_gpu(engine, 1, MICRO_BATCH)
    gathers: list[Interval] = []
    products: list[Interval] = []
    for event in trace.events():
        if event.device_type is not DeviceType.CUDA:
            continue
        interval = (event.time_range.start, event.time_range.end)
        name = event.name.lower()
        if "allgather" in name:
            gathers.append(interval)
        elif "gemm" in name or "cutlass" in name:
            products.append(interval)
    common = sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in gathers for start, stop in products)
    return sum(end - begin for begin, end in gathers), common


@pytest.mark.parametrize("gpu_world", [2], indirect=True)
def test_gathers_run_beside_compute(gpu_world: World) -> None:
    for total, overlapped in gpu_world.run(overlapped_microseconds):
        assert total > 0
        assert overlapped > 0, "no gather ran beside a matrix product"


def peak_bytes(stage: int) -> tuple[int, int]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    model = Tower(BIG_WIDTH, BIG_HIDDEN)
    with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
        steps_on_gpu(engine, 3, micro_batch=2)
        return torch.cuda.max_memory_allocated() - start, num_parameters(model)


@pytest.mark.parametrize("gpu_world", [1, 2], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_peak_memory(gpu_world: World, stage: int) -> None:
    allowed = bytes_allowed_at_once(stage, Tower(BIG_WIDTH, BIG_HIDDEN))
    slack = 32 * 2**20  # cuBLAS workspaces and activations
    for peak, parameters in gpu_world.run(peak_bytes, stage):
        assert peak <= formula_bytes(stage, parameters, gpu_world.size, narrow=False) + allowed + slack
