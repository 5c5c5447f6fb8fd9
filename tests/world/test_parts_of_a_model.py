"""An encoder and a decoder: a tensor that enters many units, and a part that is called without the model around it.

What the encoder gives is used three times in each block of the decoder. A unit may neither change the order in which
those gradients add up nor wait, whole, until the last of them has left.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import models
from tests.references import MLP, Recipe
from tests.world.engine_runs import STAGES, config_of, equals_reference, open_engine, rank
from tests.worlds import World

WIDTH, DEPTH = 57, 5
OUT = models.vectors(0, 0)[1].shape[1]
IN = models.vectors(0, 0)[0].shape[1]


class Crossing(nn.Module):
    """Reads the memory three times, each time with a weight of its own, and hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.readers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, *, memory: Tensor) -> tuple[Tensor, Tensor]:
        for reader in self.readers:
            x = x + torch.tanh(reader(memory)) * x
        return self.norm(x), memory


class Encoder(nn.Module):
    """Its first layer and its norm are no units: they belong to the model's root."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(IN, WIDTH, bias=False)
        self.blocks = nn.ModuleList(models.Block(WIDTH, 2 * WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class EncoderDecoder(nn.Module):
    """Each block of the decoder takes what the encoder gave."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.blocks = nn.ModuleList(Crossing() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, OUT)
        self.whole: list[list[bool]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        memory = self.encoder(inputs)
        if memory.requires_grad:
            memory.grad_fn.register_hook(self._note)
        x = memory.flip(0)
        for block in self.blocks:
            x, memory = block(x, memory=memory)
            if x.requires_grad:
                x.register_hook(self._note)
        return self.head(x)

    def _note(self, *_: Any) -> None:
        self.whole.append([not block.norm.weight.isnan().any().item() for block in self.blocks])


def build() -> nn.Module:
    torch.manual_seed(5)
    return EncoderDecoder()


def by_parts(model: Any, batch: models.Batch) -> Tensor:
    """A step without the model's own forward."""
    inputs, targets = batch
    parts = model.module if hasattr(model, "module") else model
    memory = parts.encoder(inputs)
    return F.mse_loss(parts.head(parts.blocks[0](memory, memory=memory)[0]), targets)


RECIPE: Recipe = dataclasses.replace(MLP, model=build)


@pytest.mark.parametrize("transport", ["auto", "process_group"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_tensor_that_many_units_use(world2: World, stage: int, transport: str) -> None:
    world2.run(equals_reference, RECIPE, config_of(stage, shardwise={"transport": transport}))


def test_a_step_by_parts(world2: World) -> None:
    world2.run(equals_reference, dataclasses.replace(RECIPE, loss=by_parts), config_of(3))


def whole_in_backward() -> None:
    model: Any = build()
    with open_engine(model, RECIPE.optimizer(model), config_of(3)) as engine:
        for index in range(2):
            model.whole.clear()
            engine.backward(RECIPE.loss(engine, RECIPE.batch(index, rank())))
            engine.step()
    assert len(model.whole) == DEPTH + 1
    assert not any(model.whole.pop()), "the decoder, behind the encoder's norm"
    for number, whole in enumerate(reversed(model.whole)):
        assert not any(whole[number + 1 :]), f"at the gradient of block {number}'s output whole: {whole}"


def test_units_are_put_away_though_the_memory_waits_for_all(world2: World) -> None:
    world2.run(whole_in_backward)


def gathers_of_the_decoder() -> dict[str | None, int]:
    model: Any = build()
    log = {"comms_logger": {"enabled": True, "debug": True}}
    with open_engine(model, RECIPE.optimizer(model), config_of(3, **log)) as engine:
        for index in range(2):
            engine.backward(RECIPE.loss(engine, RECIPE.batch(index, rank())))
            engine.step()
        totals = [t for t in engine.comms_summary().totals if t.operation == "all_gather" and t.unit is not None]
        return {t.unit: t.count for t in totals if t.unit.startswith("blocks.")}


def test_a_unit_that_hands_an_input_on_is_gathered_no_third_time(world2: World) -> None:
    # The last one stays whole from its forward to its backward, once it is known to be the last.
    expected = {f"blocks.{number}": 4 if number < DEPTH - 1 else 3 for number in range(DEPTH)}
    assert world2.run(gathers_of_the_decoder) == [expected, expected]


def the_encoder_alone(transport: str) -> None:
    model: Any = build()
    inputs = RECIPE.batch(0, 0)[0]
    wanted = model.encoder(inputs).detach()
    with open_engine(model, None, config_of(3, shardwise={"transport": transport})) as engine:
        with torch.no_grad():
            assert torch.equal(engine.module.encoder(inputs), wanted)
        assert model.encoder.stem.weight.isnan().all(), "put away behind the call"
        assert model.encoder.blocks[1].up.weight.isnan().all()


@pytest.mark.parametrize("transport", ["auto", "process_group"])
def test_an_encoder_alone(world2: World, transport: str) -> None:
    world2.run(the_encoder_alone, transport)
