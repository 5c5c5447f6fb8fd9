"""Inside ``GatheredParameters`` parameters are whole; what one rank changes there is everybody's, masters included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shardwise
from shardwise.errors import ConfigError
from shardwise.zero import GatheredParameters
from shardwise.zero.guard import is_guard
from tests import pieces as built
from tests.references import MLP, adamw_in_two_groups, assert_same
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, run_steps, train_with_engine, world_size
from tests.worlds import World

NARROW = {"bf16": {"enabled": True}}


def step(engine: Any, index: int = 0) -> None:
    engine.backward(built.loss_of_tokens(engine, built.batch_of_tokens(index, rank())))
    engine.step()


def is_whole(parameter: Tensor) -> bool:
    return not is_guard(parameter.detach())


def of_engines(narrow: bool) -> None:
    for stage in STAGES:
        of_an_engine(stage, narrow)


def of_an_engine(stage: int, narrow: bool) -> None:
    config = config_of(stage, **(NARROW if narrow else {}))
    sharded = stage == 3 and world_size() > 1
    last = world_size() - 1
    model: Any = built.build_rows()
    with open_engine(model, adamw_in_two_groups(model), config) as engine:
        step(engine)
        before = engine.state_dict()
        assert before["wte.weight"].dtype == (torch.bfloat16 if narrow else torch.float32)
        masters = {p: shardwise.utils.safe_get_full_fp32_param(p) for p in model.parameters()}
        tied, frozen, trained = model.wte.weight, model.blocks[1].up.weight, model.blocks[0].up.weight

        with GatheredParameters(model.parameters()):  # only read
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name]), name
        assert is_whole(trained) == (not sharded)

        with GatheredParameters([tied, frozen, trained, trained], modifier_rank=last):
            with GatheredParameters(trained):  # shares the unit, and ends before
                pass
            with GatheredParameters(iter([tied, model.blocks[2].up.weight])):
                assert is_whole(tied) and is_whole(trained)
            if rank() == last:
                with torch.no_grad():
                    tied[3, 5] = 2.5
                    frozen.mul_(2)
                trained.data = torch.full_like(trained, 0.25)
        assert is_whole(trained) == (not sharded)
        after = engine.state_dict()
        wanted = {name: value.clone() for name, value in before.items()}
        wanted["wte.weight"][3, 5] = wanted["head.weight"][3, 5] = 2.5
        wanted["blocks.1.up.weight"] *= 2
        wanted["blocks.0.up.weight"][:] = 0.25
        built.assert_same_state(after, wanted)
        # Masters have the new value where there is one, and every bit of the old one elsewhere.
        wanted_masters = dict(masters)
        wanted_masters[tied] = masters[tied].clone()
        wanted_masters[tied][3, 5] = 2.5
        wanted_masters[frozen] = wanted["blocks.1.up.weight"].float()
        rounds_to_it = masters[trained].to(trained.dtype) == 0.25
        wanted_masters[trained] = torch.where(rounds_to_it, masters[trained], 0.25)
        for parameter, value in wanted_masters.items():
            assert torch.equal(shardwise.utils.safe_get_full_fp32_param(parameter), value)
        step(engine, 1)  # and they are trained from there
        assert not torch.equal(engine.state_dict()["blocks.0.up.weight"], after["blocks.0.up.weight"])

        if sharded:  # nothing is kept of what nobody may change
            with GatheredParameters(trained), torch.no_grad():
                before_change = trained.clone()
                trained.zero_()
            with GatheredParameters(trained):
                assert torch.equal(trained, before_change)
        with pytest.raises(KeyError, match="of the script"), GatheredParameters(trained, modifier_rank=0):
            if sharded:
                trained.data.zero_()
            raise KeyError("of the script")
        with GatheredParameters(trained):
            assert trained.any()
        with GatheredParameters([]), GatheredParameters(trained, enabled=False):
            assert is_whole(trained) == (not sharded)
        with pytest.raises(ConfigError, match="modifier_rank=9"):
            GatheredParameters(trained, modifier_rank=9)
        step(engine, 2)


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_parameters_of_an_engine(world: World, narrow: bool) -> None:
    world.run(of_engines, narrow)


def between_construction_and_engine() -> None:
    wanted = built.build_rows().state_dict()
    model: Any = built.in_pieces(built.build_rows)
    tied, other = model.wte.weight, model.blocks[0].up.weight
    with GatheredParameters([tied, other], modifier_rank=1):
        with GatheredParameters(other):
            assert torch.equal(other, wanted["blocks.0.up.weight"])
        assert is_whole(other)
        if rank() == 1:
            other.data = torch.full_like(other, 4.0)
            with torch.no_grad():
                tied[7] = 1
    assert not is_whole(tied) and not is_whole(other)
    wanted["wte.weight"][7] = 1  # the head is the same tensor
    wanted["blocks.0.up.weight"][:] = 4
    built.assert_same_state(built.whole_state(model), wanted)
    with pytest.raises(KeyError), GatheredParameters(model.parameters(), modifier_rank=0):
        raise KeyError
    with open_engine(model, None, config_of(3)) as engine:
        built.assert_same_state(engine.state_dict(), wanted)


def under_construction() -> None:
    with shardwise.zero.Init(**built.TINY):
        model: Any = built.build_rows()
        weights = [block.up.weight for block in model.blocks] + [model.wte.weight]
        with GatheredParameters(weights, modifier_rank=1):
            model.blocks[0].down.weight.sum(), model.blocks[1].down.weight.sum()
            if rank() == 1:
                for number, weight in enumerate(weights):
                    weight.data.fill_(number)
        model.blocks[2].down.weight.sum()
    wanted = built.build_rows().state_dict()
    for number, name in enumerate(["blocks.0.up", "blocks.1.up", "blocks.2.up", "wte"]):
        wanted[f"{name}.weight"].fill_(number)
    built.assert_same_state(built.whole_state(model), wanted)


def test_parameters_of_no_engine(world2: World) -> None:
    world2.run(between_construction_and_engine)
    world2.run(under_construction)


def disagreeing(how: str) -> None:
    model: Any = built.build_rows()
    with open_engine(model, None, config_of(3)):
        first, second = model.blocks[0].up.weight, model.blocks[2].up.weight
        if how == "other parameters":
            with GatheredParameters(first if rank() == 0 else second):
                pass
        elif how == "one rank alone" and rank() == 0:
            with GatheredParameters(first):
                pass
        elif how == "another shape":
            with GatheredParameters(first, modifier_rank=1):
                if rank() == 1:
                    first.data = torch.zeros(3, 4)
        if how == "one rank alone":
            shardwise.utils.safe_get_full_fp32_param(second)


@pytest.mark.parametrize("how", ["other parameters", "one rank alone", "another shape"])
def test_ranks_that_disagree_are_named(own_world: Callable[..., World], how: str) -> None:
    failures = own_world(2).run_expecting_errors(disagreeing, how)
    assert any("GatheredParameters" in str(failure) or "blocks.0.up.weight" in str(failure) for failure in failures)


def test_only_parameters_are_gathered() -> None:
    with pytest.raises(ConfigError, match="got a str"):
        GatheredParameters(["weight"])  # type: ignore[list-item]


def lends_memory_to_numpy() -> None:
    """An array that was made of a whole parameter keeps its values, and training goes on as without it."""
    plain = train_with_engine(MLP, config_of(3))
    model = MLP.model()
    with open_engine(model, MLP.optimizer(model), config_of(3)) as engine:
        with engine.gathered_parameters():
            arrays = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
            values = {name: array.copy() for name, array in arrays.items()}
        record = run_steps(MLP, engine)
        assert all((array == values[name]).all() for name, array in arrays.items())
    assert_same(record, plain, "arrays were made against none")


def test_numpy_may_keep_what_it_was_shown(world2: World) -> None:
    world2.run(lends_memory_to_numpy)
