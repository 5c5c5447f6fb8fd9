"""States in host memory and in files beside a GPU: near the run that keeps them on it, for the CPU steps instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.gpu.test_parity import on_gpu
from tests.references import GPT, Recipe, assert_near
from tests.world.engine_runs import Config, config_of, train_with_engine
from tests.world.offload_runs import PAIRS, zero_block
from tests.worlds import World

TRAINED = dataclasses.replace(GPT, steps=4, accumulation=2)


def is_near(recipe: Recipe, plain: Config, offloaded: Config) -> None:
    expected = train_with_engine(on_gpu(recipe), plain)
    before = torch.cuda.memory_allocated()
    found = train_with_engine(on_gpu(recipe), offloaded)
    assert_near(found, expected, "offloaded against not", rtol=1e-4, atol=1e-5)
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


@pytest.mark.parametrize("gpu_world", [1, 2], indirect=True)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_trains_alike(gpu_world: World, stage: int, pair: tuple[str, str], tmp_path: Path) -> None:
    if stage < 3 and pair[0] != "none":
        pytest.skip("below stage 3 parameters are whole on the device")
    ordered = {"shardwise": {"reduction": "ordered"}} if gpu_world.size > 1 else {}
    settings = {"accumulation": 2, "gradient_clipping": 0.5, **ordered}
    zero = zero_block(*pair, tmp_path)
    gpu_world.run(is_near, TRAINED, config_of(stage, **settings), config_of(stage, zero=zero, **settings))
