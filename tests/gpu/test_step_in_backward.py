"""Steps beside a GPU's backward: as without, and neither waits for the other's stream."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from shardwise.store.beside import Beside
from tests.gpu.test_parity import on_gpu
from tests.references import GPT, Recipe, assert_near
from tests.world.engine_runs import Config, config_of, train_with_engine
from tests.world.offload_runs import PAIRS, zero_block
from tests.world.test_step_in_backward import stepped_early
from tests.worlds import World

TRAINED = dataclasses.replace(GPT, steps=4, accumulation=2)
OFFLOADED = [pair for pair in PAIRS if pair[1] != "none"]


def is_near(recipe: Recipe, config: Config) -> None:
    own = config.pop("shardwise")
    expected = train_with_engine(on_gpu(recipe), {**config, "shardwise": own})
    before = torch.cuda.memory_allocated()
    with stepped_early() as units:
        found = train_with_engine(on_gpu(recipe), {**config, "shardwise": {**own, "step_in_backward": True}})
    assert len(units) >= recipe.steps
    assert_near(found, expected, "stepped in backward against not", rtol=1e-4, atol=1e-5)
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


@pytest.mark.parametrize("gpu_world", [1, 2], indirect=True)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("pair", OFFLOADED, ids="-".join)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trains_alike(gpu_world: World, stage: int, pair: tuple[str, str], precision: str, tmp_path: Path) -> None:
    if stage < 3 and pair[0] != "none":
        pytest.skip("below stage 3 parameters are whole on the device")
    own = {"reduction": "ordered"} if gpu_world.size > 1 else {}
    narrow = {} if precision == "fp32" else {precision: {"enabled": True}}
    zero = {**zero_block(*pair, tmp_path), "sub_group_size": 5000}
    gpu_world.run(is_near, TRAINED, config_of(stage, accumulation=2, zero=zero, shardwise=own, **narrow))


def a_thread_apart_waits_for_the_moment_alone() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    beside = Beside(device)
    gradient = torch.ones(1 << 20, device=device)
    landed, brought = torch.empty(1 << 20).pin_memory(), torch.empty(1 << 20, device=device)
    torch.cuda.synchronize(device)
    gradient.mul_(3.0)
    with beside.run():
        landed.copy_(gradient, non_blocking=True)
    arrived = beside.after_caller()
    torch.cuda._sleep(4_000_000_000)  # some seconds of backward
    late = torch.cuda.current_stream(device).record_event()
    passed = []

    def step() -> None:
        with beside.apart():
            arrived.wait()
            landed.add_(1.0)
            with beside.run():
                brought.copy_(landed, non_blocking=True)
            beside.end().wait()
            passed.append(not late.query())

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert passed == [True], "the step waited for the end of backward"
    torch.cuda.synchronize(device)
    assert bool((brought == 4.0).all())


@pytest.mark.parametrize("gpu_world", [1], indirect=True)
def test_a_step_does_not_wait_for_the_rest_of_backward(gpu_world: World) -> None:
    gpu_world.run(a_thread_apart_waits_for_the_moment_alone)
