"""Optimizers that need whole matrices: right in stages 0, 1, 2, refused with the reason in stage 3."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import ConfigError
from shardwise.optim.json_optimizers import build_optimizer
from tests import models
from tests.checkpoints import differences, join, optimizer_parts, train_steps, warmup
from tests.optimizers import Maker, maker
from tests.references import GPT, MLP, Recipe, assert_same
from tests.world.engine_runs import config_of, equals_reference, open_engine, run_steps, train_with_engine
from tests.worlds import World, WorldPool

Parts = list[tuple[str, str, int, Tensor]]


@dataclass(frozen=True)
class FromJson(Maker):
    """Builds the optimizer that a config's block of that type describes."""

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(self.name, dict(self.arguments), model.parameters(), model)

    def __str__(self) -> str:
        return f"json-{super().__str__()}"


JSON_LAMB = FromJson("Lamb", (("lr", 3e-3), ("weight_decay", 0.1)))
JSON_MUON = FromJson("Muon", (("lr", 3e-3), ("muon_lr", 1e-2), ("weight_decay", 0.1)))
WHOLE_MATRIX = [
    (maker("Lamb"), models.build_mlp),
    (maker("Adafactor", lr=1e-2), models.build_mlp),
    (maker("Muon", lr=1e-2), models.build_matrices),
]
RECIPES = {
    str(optimizer): dataclasses.replace(MLP, model=model, optimizer=optimizer) for optimizer, model in WHOLE_MATRIX
}
OF_THE_JSON = {
    str(optimizer): dataclasses.replace(recipe, optimizer=optimizer, accumulation=2)
    for optimizer, recipe in ((JSON_LAMB, MLP), (JSON_MUON, GPT))
}


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_owner_steps_whole_matrices(world: World, recipe: Recipe, stage: int) -> None:
    world.run(equals_reference, recipe, config_of(stage))


@pytest.mark.parametrize("recipe", OF_THE_JSON.values(), ids=OF_THE_JSON)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_lamb_and_muon_of_the_json_train_whole_models(world2: World, recipe: Recipe, stage: int) -> None:
    world2.run(equals_reference, recipe, config_of(stage, accumulation=2))


def block_says_what_the_object_does(recipe: Recipe) -> None:
    """A config's block and the object that it describes train alike: the engine tells Muon the model's embeddings."""
    assert isinstance(recipe.optimizer, FromJson)
    block = {"type": recipe.optimizer.name, "params": dict(recipe.optimizer.arguments)}
    with open_engine(recipe.model(), None, config_of(2, accumulation=2, optimizer=block)) as engine:
        from_block = run_steps(recipe, engine)
    assert_same(from_block, train_with_engine(recipe, config_of(2, accumulation=2)), "the block against the object")


@pytest.mark.parametrize("recipe", OF_THE_JSON.values(), ids=OF_THE_JSON)
def test_the_block_of_a_config_is_enough(world2: World, recipe: Recipe) -> None:
    world2.run(block_says_what_the_object_does, recipe)


def save_and_go_on(optimizer: Maker, stage: int, directory: str) -> tuple[list[Tensor], Parts]:
    """Losses after the checkpoint, and this rank's part of the state that is in it."""
    model = models.build_mlp()
    with open_engine(model, optimizer(model), config_of(stage), lr_scheduler=warmup) as engine:
        train_steps(engine, 0, 3)
        engine.save_checkpoint(directory)
        parts = optimizer_parts(engine)
        step = engine._step
        assert step.predicted_state_bytes() == step.state_bytes() > 0, "bytes kept are not those that are foreseen"
        return train_steps(engine, 3, 6), parts


def load_and_go_on(optimizer: Maker, stage: int, directory: str) -> tuple[list[Tensor], Parts]:
    """The same from the checkpoint."""
    model = models.build_mlp()
    with open_engine(model, optimizer(model), config_of(stage), lr_scheduler=warmup) as engine:
        engine.load_checkpoint(directory)
        parts = optimizer_parts(engine)
        return train_steps(engine, 3, 6), parts


@pytest.mark.parametrize("optimizer", [JSON_LAMB, JSON_MUON], ids=str)
def test_their_state_comes_back_at_another_stage_and_world(worlds: WorldPool, optimizer: Maker, tmp_path: Path) -> None:
    wanted = worlds[2].run(save_and_go_on, optimizer, 2, str(tmp_path))
    state = join([parts for _, parts in wanted])
    kinds = {name.split()[0] for name in state}
    assert kinds >= {"exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if optimizer is JSON_MUON else set())
    for stage in (1, 2):
        found = worlds[2].run(load_and_go_on, optimizer, stage, str(tmp_path))
        for (losses, _), (their_losses, _) in zip(found, wanted, strict=True):
            assert all(map(torch.equal, losses, their_losses))
    found = worlds[3].run(load_and_go_on, optimizer, 1, str(tmp_path))
    assert not differences(join([parts for _, parts in found]), state)


@pytest.mark.parametrize("stage", [1, 2])
def test_more_ranks_than_most_units_have_matrices(world4: World, stage: int) -> None:
    recipe = RECIPES[str(maker("Lamb"))]
    world4.run(equals_reference, dataclasses.replace(recipe, accumulation=2), config_of(stage, accumulation=2))


@pytest.mark.parametrize("recipe", [*RECIPES.values(), *OF_THE_JSON.values()], ids=[*RECIPES, *OF_THE_JSON])
def test_stage_3_refuses_and_says_which_stage_does_it(world2: World, recipe: Recipe) -> None:
    for failure in world2.run_expecting_errors(
        train_with_engine, recipe, config_of(3, accumulation=recipe.accumulation), reusable=True
    ):
        assert failure is not None
        assert isinstance(failure.exception, ConfigError)
        assert isinstance(recipe.optimizer, Maker)
        assert recipe.optimizer.name in failure.message
        assert "stage 3" in failure.message
        assert "2" in failure.message
        assert len(failure.message.splitlines()) <= 6
