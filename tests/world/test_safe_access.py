"""What one sees of a parameter while debugging is what training has, at every stage; what one sets there is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import ConfigError, StateError
from shardwise.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from tests import pieces as built
from tests.grids import grid
from tests.references import adamw_in_two_groups
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, world_size
from tests.worlds import World

KINDS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "loss_scale": 8}}}
States = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def full(parameter: Tensor) -> States:
    gradient = safe_get_full_grad(parameter)
    moments = [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
    return safe_get_full_fp32_param(parameter), gradient, moments[0], moments[1]


def local(parameter: Tensor) -> States:
    gradient = safe_get_local_grad(parameter)
    moments = [safe_get_local_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
    return safe_get_local_fp32_param(parameter), gradient, moments[0], moments[1]


def forward_backward(engine: Any, index: int) -> None:
    engine.backward(built.loss_of_tokens(engine, built.batch_of_tokens(index, rank())))


def seen(stage: int, kind: str, looks: bool) -> tuple[list[dict[str, States]], dict[str, Tensor]]:
    """Everything at four moments of two steps of two micro-batches; without looking, the same training."""
    model: Any = built.build_rows()
    found: list[dict[str, States]] = []
    config = config_of(stage, accumulation=2, **KINDS[kind])

    def look() -> None:
        if looks:
            found.append({name: full(parameter) for name, parameter in model.named_parameters()})

    with open_engine(model, adamw_in_two_groups(model), config) as engine:
        for index in range(4):
            forward_backward(engine, index)
            look()
            if looks and index % 2:
                assert_local_is_a_part(model, found[-1])
            engine.step()
        look()
        return found, engine.state_dict()


def assert_local_is_a_part(model: nn.Module, found: dict[str, States]) -> None:
    """The ranks' parts, put behind each other, are the whole."""
    for name, parameter in model.named_parameters():
        parts: list[Any] = [None] * world_size()
        if world_size() > 1:
            torch.distributed.all_gather_object(parts, local(parameter))
        else:
            parts = [local(parameter)]
        for number, whole in enumerate(found[name]):
            pieces = [part[number] for part in parts if part[number] is not None]
            if whole is not None and pieces:
                assert torch.equal(torch.cat(pieces), whole.reshape(-1)), (name, number)
        assert all(part[0] is not None for part in parts)


def same_at_all_stages(kind: str) -> None:
    wanted, _ = seen(0, kind, looks=True)
    first = wanted[0]["blocks.0.up.weight"]
    assert first[1] is not None and first[2] is None, "a gradient, and no moments before the first step"
    assert wanted[-1]["blocks.0.up.weight"][1] is None, "the gradient is gone after the step"
    assert wanted[0]["blocks.1.up.weight"][1] is None, "a frozen parameter has none"
    # Stages 2 and 3 average each micro-batch by itself: their last bits differ from those of stages 0 and 1.
    every_pass: list[dict[str, States]] = []
    for stage in STAGES:
        found, after = seen(stage, kind, looks=True)
        built.assert_same_state(after, seen(stage, kind, looks=False)[1])
        assert_equal(found[:1], wanted[:1], stage)
        every_pass = found if stage == 2 else every_pass
        assert_equal(found, wanted if stage < 2 else every_pass, stage)


def assert_equal(found: list[dict[str, States]], wanted: list[dict[str, States]], stage: int) -> None:
    for here, there in zip(found, wanted, strict=True):
        for name, states in here.items():
            for ours, theirs in zip(states, there[name], strict=True):
                assert (ours is None) == (theirs is None), (stage, name)
                assert ours is None or theirs is None or torch.equal(ours, theirs), (stage, name)


WORLDS_AND_KINDS = grid([1, 2, 3], KINDS, quick=[(1, "fp16"), (2, "bf16")])


@pytest.mark.parametrize(("world", "kind"), WORLDS_AND_KINDS, indirect=["world"])
def test_all_stages_show_the_same_and_looking_changes_nothing(world: World, kind: str) -> None:
    world.run(same_at_all_stages, kind)


def gradients_of_one_process() -> None:
    """Before a step of one micro-batch: the mean over ranks, to the last bit."""
    gradients = []
    for number in range(world_size()):
        model = built.build_rows()
        built.loss_of_tokens(model, built.batch_of_tokens(0, number)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for stage in STAGES:
        model = built.build_rows()
        with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
            forward_backward(engine, 0)
            for name, parameter in model.named_parameters():
                got = safe_get_full_grad(parameter)
                if gradients[0][name] is None:
                    assert got is None
                    continue
                total = gradients[0][name]
                for other in gradients[1:]:
                    total = total + other[name]
                assert got is not None and torch.equal(got, total * (1.0 / world_size())), (stage, name)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_gradients_are_those_of_one_process(world: World) -> None:
    world.run(gradients_of_one_process)


def set_everything(stage: int, kind: str, locally: bool) -> None:
    model: Any = built.build_rows()
    with open_engine(model, adamw_in_two_groups(model), config_of(stage, **KINDS[kind])) as engine:
        forward_backward(engine, 0)
        engine.step()
        forward_backward(engine, 1)
        for name in ("wte.weight", "blocks.2.up.bias"):
            parameter = model.get_parameter(name)
            value = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
            if rank() and not locally:
                value = value + rank()  # rank 0's counts
            wanted = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
            if locally:
                part = place_of_my_part(parameter)
                safe_set_local_fp32_param(parameter, value.view(-1)[part])
                safe_set_local_grad(parameter, value.view(-1)[part] * 2)
                safe_set_local_optimizer_state(parameter, value.view(-1)[part] * 3, "exp_avg")
            else:
                safe_set_full_fp32_param(parameter, value)
                safe_set_full_grad(parameter, value * 2)
                safe_set_full_optimizer_state(parameter, value * 3, "exp_avg")
            assert torch.equal(safe_get_full_fp32_param(parameter), wanted)
            got = safe_get_full_grad(parameter)
            assert got is not None and torch.equal(got, wanted * 2)
            got = safe_get_full_optimizer_state(parameter, "exp_avg")
            assert got is not None and torch.equal(got, wanted * 3)
            second = safe_get_full_optimizer_state(parameter, "exp_avg_sq")
            assert second is not None and second.any(), "the other state is as it was"
        engine.clip_grad_norm_(1e9)
        engine.step()
        group = next(g for g in adamw_in_two_groups(built.build_rows()).param_groups)
        beta = group["betas"][0]
        moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        assert moment is not None
        torch.testing.assert_close(moment, wanted * 3 * beta + wanted * 2 * (1 - beta))
        assert not torch.equal(engine.state_dict()["wte.weight"].float(), wanted)


def place_of_my_part(parameter: Tensor) -> slice:
    """Where this rank's part begins and ends in the flattened parameter."""
    sizes: list[Any] = [None] * world_size()
    mine = safe_get_local_fp32_param(parameter).numel()
    if world_size() == 1:
        return slice(0, mine)
    torch.distributed.all_gather_object(sizes, mine)
    begin = sum(sizes[: rank()])
    return slice(begin, begin + mine)


@pytest.mark.parametrize(("world", "kind"), WORLDS_AND_KINDS, indirect=["world"])
def test_what_is_set_is_trained(world: World, kind: str) -> None:
    for stage in STAGES:
        world.run(set_everything, stage, kind, locally=False)
    world.run(set_everything, 3, kind, locally=True)


def refused(stage: int) -> None:
    model: Any = built.build_rows()
    weight = model.blocks[0].up.weight
    with pytest.raises(ConfigError, match="no open engine holds"):
        safe_get_full_fp32_param(weight)
    with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
        with pytest.raises(ConfigError, match=r"got shape \(3,\). Expected a tensor of shape \(97, 61\)"):
            safe_set_full_fp32_param(weight, torch.zeros(3))
        with pytest.raises(StateError, match="keeps no 'exp_avg'"):
            safe_set_full_optimizer_state(weight, torch.zeros(97, 61), "exp_avg")
        with pytest.raises(StateError, match="there is none"):
            safe_set_full_grad(weight, torch.zeros(97, 61))
        forward_backward(engine, 0)
        engine.step()
        assert safe_get_full_optimizer_state(weight, "momentum_buffer") is None
        if stage < 3:
            part = safe_get_local_fp32_param(weight)
            with pytest.raises(ConfigError, match="whole on every rank"):
                safe_set_local_fp32_param(weight, part)
        if stage == 0:
            with pytest.raises(ConfigError, match="every rank keeps all of it"):
                safe_set_local_optimizer_state(weight, part, "exp_avg")
    with pytest.raises(ConfigError, match="no open engine holds"):
        safe_get_full_grad(weight)


@pytest.mark.parametrize("stage", [0, 3])
def test_what_cannot_be_is_refused(world2: World, stage: int) -> None:
    world2.run(refused, stage)
