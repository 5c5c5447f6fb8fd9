"""Whole weights on request: the state dict with its buffers, and parameters gathered for reading."""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.references import GPT, MLP
from tests.world.engine_runs import STAGES, config_of, open_engine, rank
from tests.worlds import World


def state_dict_is_the_models_own(stage: int) -> None:
    model = models.build_counting()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    with open_engine(model, MLP.optimizer(model), config_of(stage)) as engine:
        found = engine.state_dict()
        assert list(found) == list(wanted)
        for name, value in found.items():
            assert value.device.type == "cpu"
            assert value.dtype == wanted[name].dtype
            assert torch.equal(value, wanted[name]), name
        before = {name: value.clone() for name, value in found.items()}
        engine.backward(MLP.loss(engine, MLP.batch(0, rank())))
        engine.step()
        assert all(torch.equal(found[name], before[name]) for name in found), "a later step changed a state dict"
        after = engine.state_dict()
        assert after["steps_seen"].item() == 1
        assert not torch.equal(after["head.weight"], found["head.weight"])
    models.build_counting().load_state_dict(after)


def gathered_parameters_are_whole(stage: int) -> None:
    model = models.build_gpt()
    with open_engine(model, GPT.optimizer(model), config_of(stage)) as engine:
        for step in range(2):
            wanted = engine.state_dict()
            with engine.gathered_parameters():
                for name, parameter in model.named_parameters():
                    assert torch.equal(parameter, wanted[name]), name
            engine.backward(GPT.loss(engine, GPT.batch(step, rank())))
            engine.step()


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_state_dict(world: World, stage: int) -> None:
    world.run(state_dict_is_the_models_own, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_gathered_parameters(world2: World, stage: int) -> None:
    world2.run(gathered_parameters_are_whole, stage)
