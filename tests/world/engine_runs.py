"""Training with the engine, and the comparisons that the tests of this directory are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import shardwise
from tests import models
from tests.references import Cadence, Recipe, Record, assert_near, assert_same, losses_of, train_alone

STAGES = (0, 1, 2, 3)
TIMEOUT = timedelta(seconds=30)
Config = dict[str, Any]


def config_of(stage: int, *, accumulation: int = 1, zero: Config | None = None, **others: Any) -> Config:
    """A config of the JSON's shape; `zero` adds to its block zero_optimization."""
    return {
        "train_micro_batch_size_per_gpu": models.MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **others,
    }


def stage_of(config: Config) -> int:
    """The ZeRO stage that a config asks for."""
    return int(config["zero_optimization"]["stage"])


def cadence_of(config: Config) -> Cadence:
    """When the engine reduces: stages 2 and 3 hold no whole gradients, so they do after every backward."""
    return "every" if stage_of(config) >= 2 else "once"


def rank() -> int:
    """This process's rank; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def open_engine(model: nn.Module, optimizer: Any, config: Config, **arguments: Any) -> Iterator[Any]:
    """The engine of `shardwise.initialize`, closed at the end. A rank that waits in vain ends with an error, not a
    hang."""
    arguments.setdefault("timeout", TIMEOUT)
    engine, _, _, _ = shardwise.initialize(model=model, optimizer=optimizer, config=config, **arguments)
    with engine:
        yield engine


def train_with_engine(recipe: Recipe, config: Config) -> Record:
    """The loop of a script: forward, backward and step for every micro-batch."""
    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), config) as engine:
        return run_steps(recipe, engine)


def run_steps(recipe: Recipe, engine: Any) -> Record:
    """Run the recipe's steps on an open engine and take the whole weights."""
    record = Record()
    for step in range(recipe.steps):
        for index in recipe.micro_batches(step):
            losses = losses_of(recipe, engine, index, rank())
            record.add_losses(losses)
            if len(losses) == 1:
                engine.backward(losses[0])
            else:
                for number, loss in enumerate(losses, start=1):
                    (loss / recipe.accumulation).backward(retain_graph=number < len(losses))
            engine.step()
        record.norms.append(engine.get_global_grad_norm())
    assert engine.global_steps == recipe.steps, f"{engine.global_steps} steps counted, {recipe.steps} made"
    record.weights = engine.state_dict()
    return record


@functools.lru_cache(maxsize=4)
def reference_of(recipe: Recipe, cadence: Cadence, group_size: int | None = None) -> Record:
    """This rank's Record of the run in one process. Collective: rank 0 computes it, the others receive it."""
    if world_size() == 1:
        return train_alone(recipe, 1, cadence)[0]
    box = [train_alone(recipe, world_size(), cadence, group_size) if rank() == 0 else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0][rank()]


# -- cases: what a test hands to world.run


def equals_reference(recipe: Recipe, config: Config, cadence: Cadence | None = None) -> None:
    """The engine gives the bits of the run in one process: every loss of this rank and all weights."""
    reference = reference_of(recipe, cadence or cadence_of(config))
    assert_same(train_with_engine(recipe, config), reference, f"stage {stage_of(config)} against one process")


def stages_agree(recipe: Recipe, make_config: Callable[..., Config] = config_of, **settings: Any) -> None:
    """All stages give the same losses, weights and skipped steps as stage 0, and the same norm but for rounding."""
    first = train_with_engine(recipe, make_config(0, **settings))
    assert all(torch.isfinite(value).all() for value in first.weights.values())
    for stage in STAGES[1:]:
        other = train_with_engine(recipe, make_config(stage, **settings))
        assert_same(other, first, f"stage {stage} against stage 0")


def near_reference(recipe: Recipe, config: Config, rtol: float, atol: float) -> None:
    """The engine gives the losses, weights and norms of the run in one process, within a tolerance."""
    reference = reference_of(recipe, cadence_of(config))
    record = train_with_engine(recipe, config)
    assert_near(record, reference, f"stage {stage_of(config)} against one process", rtol=rtol, atol=atol)
    torch.testing.assert_close(torch.tensor(record.norms), torch.tensor(reference.norms), rtol=rtol, atol=0.0)
