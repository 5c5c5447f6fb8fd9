"""A forward that reads a weight of another module trains as in one process, once it was registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise import zero
from shardwise.errors import ConfigError
from shardwise.zero.wrap import plan_units
from tests import models
from tests.references import Recipe, adamw_in_two_groups
from tests.world.engine_runs import config_of, equals_reference
from tests.worlds import World


class Reader(models.Block):
    """A block that also uses the first block's weight, which it does not hold."""

    def __init__(self, width: int, hidden: int, other: list[nn.Module] | None = None) -> None:
        super().__init__(width, hidden)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.other:
            x = x + nn.functional.linear(x, self.other[0].up.weight)[..., : x.shape[-1]]  # type: ignore[arg-type]
        return x


class Readers(models.Mlp):
    def __init__(self, registered: bool) -> None:
        super().__init__(make_block=Reader)
        first, _, last = self.blocks
        last.other = [first]  # type: ignore[assignment]
        if registered:
            zero.register_external_parameter(last, first.up.weight)  # type: ignore[arg-type]


def build() -> nn.Module:
    torch.manual_seed(0)
    return Readers(registered=True)


RECIPE = Recipe(build, models.vectors, models.regression, adamw_in_two_groups)


@pytest.mark.parametrize("transport", ["shared_memory", "process_group"])
def test_it_trains_as_in_one_process(world2: World, transport: str) -> None:
    world2.run(equals_reference, RECIPE, config_of(3, shardwise={"transport": transport}))


def units_of(model: nn.Module) -> dict[str, set[str]]:
    return {plan.name: set(plan.parameters) for plan in plan_units(model)}


def test_it_belongs_to_a_unit_around_all_its_users() -> None:
    assert "blocks.0.up.weight" in units_of(Readers(registered=False))["blocks.0"]
    model: Any = Readers(registered=True)
    assert "blocks.0.up.weight" in units_of(model)["<root>"]
    zero.unregister_external_parameter(model.blocks[2], model.blocks[0].up.weight)
    assert "blocks.0.up.weight" in units_of(model)["blocks.0"]


def test_mistakes_are_named() -> None:
    model: Any = Readers(registered=False)
    with pytest.raises(ConfigError, match="no such parameter was registered"):
        zero.unregister_external_parameter(model.blocks[2], model.blocks[0].up.weight)
    with pytest.raises(ConfigError, match=r"Expected a module and the nn\.Parameter"):
        zero.register_external_parameter(model.blocks[2], torch.ones(3))  # type: ignore[arg-type]
