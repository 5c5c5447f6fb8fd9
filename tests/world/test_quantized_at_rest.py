"""Parameters that rest as codes: the model computes with what the codes stand for, to the bit, wherever they rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.errors import ConfigError
from shardwise.quantize import build_quantizer
from tests import models
from tests.world.engine_runs import Config, config_of, open_engine, rank
from tests.world.offload_runs import host_memory_apart, zero_block
from tests.worlds import World

BLOCK = 64


def rounded(parameter: torch.Tensor, format: str, dtype: torch.dtype) -> torch.Tensor:
    """What a parameter becomes by resting in a format; blocks begin where it begins."""
    quantizer = build_quantizer(format, BLOCK)
    flat = parameter.detach().float().flatten()
    values = torch.cat([flat, torch.zeros(-flat.numel() % BLOCK)])[None]
    wire = torch.empty(1, quantizer.wire_bytes(values.numel()), dtype=torch.uint8)
    quantizer.encode(values, wire)
    decoded = torch.empty_like(values, dtype=dtype)  # one rounding, of the exact product
    quantizer.decode(wire, decoded)
    return decoded[0, : flat.numel()].view(parameter.shape)


def round_in_place(model: nn.Module, format: str, dtype: torch.dtype, frozen_only: bool) -> nn.Module:
    """A whole model with the values that an engine with codes has."""
    for parameter in model.parameters():
        if not (frozen_only and parameter.requires_grad):
            parameter.data = rounded(parameter, format, dtype)
    return model.to(dtype)


def settings(format: str, dtype: torch.dtype, zero: Config) -> Config:
    return config_of(
        3,
        zero={"stage3_param_persistence_threshold": 0, **zero},
        shardwise={"frozen_weights": format, "quantization_block": BLOCK},
        bf16={"enabled": dtype == torch.bfloat16},
    )


def infers_with_codes(format: str, dtype: torch.dtype, zero: Config) -> None:
    plain = round_in_place(models.build_gpt(), format, dtype, frozen_only=False)
    sharded = models.build_gpt()
    with host_memory_apart(), open_engine(sharded, None, settings(format, dtype, zero)) as engine, torch.no_grad():
        for index in range(3):
            batch = models.tokens(index, rank())
            assert torch.equal(models.language(engine, batch), models.language(plain, batch))
        report = engine.memory_report()
        assert report.states_bytes == report.predicted_bytes
        place = zero.get("offload_param", {}).get("device", "none")
        numel = sum(s.layout.shard(rank()).numel for unit in engine._units for s in unit.segments)
        expected = numel // BLOCK * (BLOCK * (4 if format == "int4" else 8) // 8 + 4)
        assert report.parameters_bytes == (expected if place == "none" else 0)
        assert place != "nvme" or expected <= report.nvme_bytes < expected + 4096 * 2 * len(engine._units)
        state = engine.state_dict()
        assert all(torch.equal(value.to(dtype), plain.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("world", "format", "place"),
    [
        (1, "int8", "none"),
        (1, "int4", "nvme"),
        (2, "int8", "nvme"),
        (2, "int4", "cpu"),
        (3, "fp8", "nvme"),
        (3, "int4", "none"),
    ],
    indirect=["world"],
)
def test_inference(world: World, format: str, place: str, tmp_path: Path) -> None:
    zero = {} if place == "none" else zero_block(place, "none", tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        world.run(infers_with_codes, format, dtype, zero)


# -- training beside a frozen base


class Adapted(nn.Module):
    """A frozen layer and a trained correction of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(97, 97)
        self.base.requires_grad_(False)
        self.down = nn.Linear(97, 4, bias=False)
        self.up = nn.Linear(4, 97, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def build_adapted() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(*(Adapted() for _ in range(3)))


def train(engine: Any, first: int, last: int) -> list[torch.Tensor]:
    losses = []
    for step in range(first, last):
        x = torch.randn(4, 97, generator=torch.Generator().manual_seed(10 * step + rank()))
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def open_adapted(model: nn.Module, config: Config) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return open_engine(model, torch.optim.AdamW(trained, lr=1e-2), config)


def trains_beside_codes(zero: Config, path: str) -> None:
    fp32 = torch.float32
    plain = round_in_place(build_adapted(), "int8", fp32, frozen_only=True)
    with open_adapted(plain, config_of(3)) as engine:
        wanted = train(engine, 0, 6)
        weights = engine.state_dict()
        engine.save_checkpoint(path, tag="values")
    config = settings("int8", fp32, {"zero_quantized_nontrainable_weights": True, **zero})
    del config["shardwise"]["frozen_weights"]
    with open_adapted(build_adapted(), config) as engine:
        found = train(engine, 0, 3)
        engine.save_checkpoint(path, tag="codes")
        found += train(engine, 3, 6)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert all(torch.equal(weights[name], value) for name, value in engine.state_dict().items())
        engine.load_checkpoint(path, tag="codes")
        again = train(engine, 3, 6)
        assert all(torch.equal(a, b) for a, b in zip(again, wanted[3:], strict=True))
        engine.load_checkpoint(path, tag="values")
        assert all(torch.equal(weights[name], value) for name, value in engine.state_dict().items())
    with open_adapted(build_adapted(), config_of(2)) as engine:
        engine.load_checkpoint(path, tag="codes")
        assert all(torch.equal(a, b) for a, b in zip(train(engine, 3, 6), wanted[3:], strict=True))


@pytest.mark.parametrize(("world", "place"), [(1, "nvme"), (2, "none"), (3, "nvme")], indirect=["world"])
def test_training_beside_a_frozen_base(world: World, place: str, tmp_path: Path) -> None:
    zero = {} if place == "none" else zero_block(place, place, tmp_path)
    world.run(trains_beside_codes, zero, str(tmp_path / "checkpoints"))


def hops_with_codes() -> None:
    """Codes travel as they are by all of ZeRO++, and its secondary shards are codes, too."""
    plus = {
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
        "zero_hpz_partition_size": 2,
        "zero_quantized_nontrainable_weights": True,
    }
    model = build_adapted()
    config = settings("int8", torch.float32, plus)
    base = {n: rounded(p, "int8", torch.float32) for n, p in model.named_parameters() if not p.requires_grad}
    with open_adapted(model, config) as engine:
        losses = train(engine, 0, 6)
        with engine.gathered_parameters():
            for name, parameter in model.named_parameters():
                assert parameter.requires_grad or torch.equal(parameter, base[name])
    assert losses[-1] < losses[0]


def test_codes_in_two_hops(world4: World) -> None:
    world4.run(hops_with_codes)


# -- what cannot work


def attaches_too_late() -> None:
    model = models.build_gpt()
    told = pytest.raises(ConfigError, match=r"rest quantised.*Pass the optimizer to initialize")
    with open_engine(model, None, settings("int4", torch.float32, {})) as engine, told:
        engine.attach_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_optimizer_that_comes_too_late(world2: World) -> None:
    world2.run(attaches_too_late)
