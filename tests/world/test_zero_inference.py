"""Inference: no optimizer, parameters from where they rest, and the outputs of the whole model on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from shardwise.errors import ConfigError
from tests import models
from tests.accelerators import accelerator_of
from tests.real_models import build_gpt2
from tests.world.engine_runs import config_of, open_engine, rank
from tests.world.offload_runs import host_memory_apart, zero_block
from tests.worlds import World


def outputs_equal_the_whole_model(config: dict[str, Any]) -> None:
    plain, sharded = models.build_gpt(), models.build_gpt()
    if config.get("bf16"):
        plain = plain.bfloat16()
    tokens = [models.tokens(index, rank()) for index in range(3)]
    with host_memory_apart(), open_engine(sharded, None, config) as engine, torch.no_grad():
        for batch in tokens:  # the second pass reads ahead, and into the third
            assert torch.equal(models.language(engine, batch), models.language(plain, batch))
        report = engine.memory_report()
        assert report.optimizer_bytes == report.gradients_bytes == 0
        in_file = config["zero_optimization"]["offload_param"]["device"] == "nvme"
        itemsize = 2 if config.get("bf16") else 4
        numel = sum(unit.segments[0].layout.numel for unit in engine._units)
        assert not in_file or report.nvme_bytes < numel * itemsize / engine._comm.size * 1.1 + 4096 * 64
        assert report.parameters_bytes == 0


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("place", ["cpu", "nvme"])
def test_outputs(world: World, place: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(3, zero=zero_block(place, "none", tmp_path), **settings)
    world.run(outputs_equal_the_whole_model, config)


def generates_as_alone(config: dict[str, Any]) -> list[int]:
    """Ranks stop at different lengths: each has an end token of its own."""
    plain, sharded = build_gpt2().eval(), build_gpt2().eval()
    prompt = torch.tensor([[3 + 4 * rank(), 5, 8]])
    free: torch.Tensor = plain.generate(prompt, max_new_tokens=12, do_sample=False)
    settings = dict(max_new_tokens=12 - 5 * rank(), do_sample=False)
    wanted = plain.generate(prompt, **settings)
    with open_engine(sharded, None, config) as engine:
        engine.eval()
        found = engine.module.generate(prompt, synced_gpus=True, **settings)
    assert torch.equal(found, wanted) and free.shape[1] >= wanted.shape[1]
    return [found.shape[1]]


def test_generation_of_different_lengths(world2: World, tmp_path: Path) -> None:
    lengths = world2.run(generates_as_alone, config_of(3, zero=zero_block("nvme", "none", tmp_path)))
    assert lengths[0] != lengths[1]


def prepares_for_inference(stage: int, zero: dict[str, Any]) -> None:
    config = {"zero_optimization": {"stage": stage, **zero}, "train_micro_batch_size_per_gpu": 2}
    with accelerator_of(config) as accelerator:
        loader = DataLoader(torch.arange(8), batch_size=2)
        if stage == 3:
            model, _ = accelerator.prepare(models.build_gpt(), loader)
            assert model.memory_report().nvme_bytes > 0
        else:
            with pytest.raises(ConfigError, match="inference set the stage to 3"):
                accelerator.prepare(models.build_gpt(), loader)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_prepare_with_a_loader_alone(world2: World, stage: int, tmp_path: Path) -> None:
    zero = zero_block("nvme", "none", tmp_path) if stage == 3 else {}
    world2.run(prepares_for_inference, stage, zero)
