"""A user's mistake is one error of a few lines: what was found, what was expected, what to do. No assert, no hang."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from shardwise.errors import ConfigError, StateError
from tests import models
from tests.models import Mlp
from tests.references import MLP, adamw_in_two_groups
from tests.world.engine_runs import config_of, rank, world_size
from tests.worlds import World


@dataclasses.dataclass(frozen=True)
class Mistake:
    """Something wrong, the words that the error must hold, and the error's kind."""

    make: Any
    words: tuple[str, ...]
    kind: type[Exception] = ConfigError


def initialize(model: nn.Module | None = None, optimizer: Any = None, config: Any = None, **arguments: Any) -> Any:
    model = model or MLP.model()
    optimizer = optimizer or adamw_in_two_groups(model)
    return shardwise.initialize(model=model, optimizer=optimizer, config=config or config_of(3), **arguments)


def batch_arithmetic() -> None:
    initialize(config={**config_of(3), "train_batch_size": 3 * world_size() + 1})


def no_batch_size() -> None:
    initialize(config={"zero_optimization": {"stage": 1}})


def stage_four() -> None:
    initialize(config=config_of(4))


def unknown_key() -> None:
    initialize(config={**config_of(3), "gradient_cliping": 1.0})


def unknown_key_in_the_block() -> None:
    initialize(config=config_of(3, zero={"stage3_prefetch_bucket": 5}))


def both_halves() -> None:
    initialize(config=config_of(3, fp16={"enabled": True}, bf16={"enabled": True}))


def no_config_file() -> None:
    initialize(config="/nowhere/ds_config.json")


def foreign_optimizer() -> None:
    initialize(optimizer=torch.optim.AdamW(models.build_wide().parameters()))


def partly_foreign_optimizer() -> None:
    model = MLP.model()
    initialize(model, torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.zeros(3))]))


def foreign_parameters() -> None:
    model = MLP.model()
    initialize(model, torch.optim.AdamW, model_parameters=[nn.Parameter(torch.zeros(3))])


def foreign_group_later() -> None:
    engine, optimizer, _, _ = initialize()
    with engine:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        engine.backward(MLP.loss(engine, MLP.batch(0, rank())))
        engine.step()


def cuda_where_there_is_none() -> None:
    shardwise.init_distributed(device="cuda")
    initialize(device="cuda")


def unknown_optimizer() -> None:
    model = MLP.model()
    config = config_of(3, optimizer={"type": "AdamV", "params": {}})
    shardwise.initialize(model=model, config=config)


def unknown_unit_class() -> None:
    initialize(config=config_of(3, shardwise={"unit_classes": ["Blok"]}))


def optimizer_that_needs_a_closure() -> None:
    model = MLP.model()
    initialize(model, torch.optim.LBFGS(model.parameters()))


def model_is_missing() -> None:
    shardwise.initialize(model=None, config=config_of(3))  # type: ignore[arg-type]


def after_close() -> None:
    engine, _, _, _ = initialize()
    engine.close()
    engine(models.vectors(0, 0)[0])


ALIKE_ON_ALL_RANKS = {
    mistake.make.__name__: mistake
    for mistake in (
        Mistake(batch_arithmetic, ("train_batch_size", "train_micro_batch_size_per_gpu", "7")),
        Mistake(no_batch_size, ("train_batch_size", "train_micro_batch_size_per_gpu")),
        Mistake(stage_four, ("stage", "4")),
        Mistake(unknown_key, ("gradient_cliping", "gradient_clipping")),
        Mistake(unknown_key_in_the_block, ("stage3_prefetch_bucket", "stage3_prefetch_bucket_size")),
        Mistake(both_halves, ("fp16", "bf16")),
        Mistake(no_config_file, ("/nowhere/ds_config.json",)),
        Mistake(foreign_optimizer, ("optimizer", "model")),
        Mistake(partly_foreign_optimizer, ("optimizer", "model")),
        Mistake(foreign_parameters, ("not in the model", "(3,)")),
        Mistake(foreign_group_later, ("not in the model", "(3,)")),
        Mistake(unknown_optimizer, ("AdamV",)),
        Mistake(unknown_unit_class, ("Blok", "Block")),
        Mistake(optimizer_that_needs_a_closure, ("LBFGS", "closure")),
        Mistake(model_is_missing, ("model",)),
        Mistake(after_close, ("close",), StateError),
    )
}


def assert_told(failure: Any, mistake: Mistake) -> None:
    assert failure is not None, "no error at all"
    assert isinstance(failure.exception, mistake.kind), failure.traceback
    for word in mistake.words:
        assert word in failure.message, f"{word!r} is not in: {failure.message}"
    assert len(failure.message.splitlines()) <= 8, failure.message


@pytest.mark.parametrize("mistake", ALIKE_ON_ALL_RANKS.values(), ids=ALIKE_ON_ALL_RANKS)
def test_mistakes_alike_on_all_ranks(world2: World, mistake: Mistake) -> None:
    for failure in world2.run_expecting_errors(mistake.make, reusable=True):
        assert_told(failure, mistake)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA, so asking for it is no mistake")
def test_cuda_where_there_is_none(world1: World) -> None:
    mistake = Mistake(cuda_where_there_is_none, ("cuda",))
    for failure in world1.run_expecting_errors(cuda_where_there_is_none, reusable=True):
        assert_told(failure, mistake)


# -- ranks that do not agree


def model_of(difference: str) -> nn.Module:
    torch.manual_seed(5)
    if rank() == 0:
        return Mlp()
    if difference == "width":
        return Mlp(width=38)
    if difference == "depth":
        return Mlp(depth=4)
    model = Mlp()
    if difference == "dtype":
        model.head.to(torch.bfloat16)
    elif difference == "frozen":
        model.head.requires_grad_(False)
    elif difference == "name":
        model.tail = model.head
        del model.head
    return model


def start_and_close(*arguments: Any, **settings: Any) -> None:
    """Nothing but a missing error should come out of this."""
    engine, _, _, _ = initialize(*arguments, **settings)
    engine.close()


def different_models(difference: str) -> None:
    start_and_close(model_of(difference))


def different_stages() -> None:
    start_and_close(config=config_of(2 + rank()))


def different_clipping() -> None:
    start_and_close(config=config_of(3, gradient_clipping=float(rank())))


def different_optimizers() -> None:
    model = MLP.model()
    make = torch.optim.AdamW if rank() == 0 else torch.optim.SGD
    start_and_close(model, make(model.parameters(), lr=1e-3))


def different_rates() -> None:
    model = MLP.model()
    start_and_close(model, torch.optim.AdamW(model.parameters(), lr=1e-3 * (1 + rank())))


def different_groups() -> None:
    model = MLP.model()
    parameters = list(model.parameters())
    groups = [{"params": parameters}] if rank() == 0 else [{"params": parameters[:3]}, {"params": parameters[3:]}]
    start_and_close(model, torch.optim.AdamW(groups))


DIFFERENCES = {
    "width": ("stem.weight", "37", "38"),
    "depth": ("blocks.3",),
    "dtype": ("head", "bfloat16"),
    "frozen": ("head",),
    "name": ("head", "tail"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_ranks_with_different_models(world2: World, difference: str) -> None:
    mistake = Mistake(different_models, (*DIFFERENCES[difference], "rank 0", "rank 1"))
    for failure in world2.run_expecting_errors(different_models, difference, reusable=True):
        assert_told(failure, mistake)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (different_stages, "stage"),
        (different_clipping, "gradient_clipping"),
        (different_optimizers, "SGD"),
        (different_rates, "lr"),
        (different_groups, "group"),
    ],
)
def test_ranks_with_different_settings(world2: World, make: Any, word: str) -> None:
    for failure in world2.run_expecting_errors(make, reusable=True):
        assert_told(failure, Mistake(make, (word, "rank 0", "rank 1")))
