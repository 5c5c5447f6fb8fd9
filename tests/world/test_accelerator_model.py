"""The fear: the prepared model hides the script's own, or a copy of the model takes the engine along."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.errors import StateError
from tests.accelerators import IN, accelerator_of, loader_of, loss_of, model_of
from tests.world.engine_runs import world_size
from tests.worlds import World

BATCH = 4


class Net(nn.Module):
    """A model with what scripts look for on one: a config, a method of its own, a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"width": IN}
        self.body = model_of()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.body(inputs)
        return found

    def generate(self, inputs: torch.Tensor) -> torch.Tensor:
        """Runs the model through its own call, as generation does."""
        return self(inputs).argmax(-1)  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def config_of(stage: int | None) -> dict[str, Any] | None:
    if stage is None:
        return None
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": BATCH,
        "shardwise": {"unit_classes": ["Linear"]},
    }


def reach_through(stage: int | None) -> None:
    with accelerator_of(config_of(stage)) as accelerator:
        net = Net()
        names = [name for name, _ in net.named_parameters()]
        shapes = [parameter.shape for parameter in net.parameters()]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        model, optimizer, batches = accelerator.prepare(net, optimizer, loader_of(BATCH))
        inputs, _ = next(iter(batches))
        unwrapped = accelerator.unwrap_model(model)
        assert unwrapped is net and model.module is net and isinstance(unwrapped, Net)
        assert accelerator.unwrap_model(net) is net
        assert model.config is net.config and model.dtype == torch.float32
        assert str(model.device) == "cpu" and not hasattr(model, "no_such_name")
        assert [name for name, _ in unwrapped.named_parameters()] == names
        assert [parameter.shape for parameter in model.parameters()] == shapes
        assert [id(parameter) for parameter in model.parameters()] == [id(p) for p in net.parameters()]
        assert not model.eval().training and not net.body.training and model.train().training and net.body.training
        with torch.no_grad():
            assert torch.equal(model.generate(inputs), model(inputs).argmax(-1))
            assert torch.equal(unwrapped.generate(inputs), unwrapped(inputs).argmax(-1))
        assert set(model.state_dict()) == set(names)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("stage", [None, 1, 3])
def test_the_scripts_model_is_reached_through_the_prepared_one(world: World, stage: int | None) -> None:
    world.run(reach_through, stage)


def copies(stage: int | None) -> None:
    """An average of weights beside training, as scripts for diffusion models keep one."""
    with accelerator_of(config_of(stage)) as accelerator:
        net = Net()
        start = copy.deepcopy(net.state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        model, optimizer, batches = accelerator.prepare(net, optimizer, loader_of(BATCH))
        batch = next(iter(batches))
        shards = stage == 3 and world_size() > 1
        if shards:
            for copied in (copy.deepcopy, pickle.dumps, lambda it: torch.save(it, io.BytesIO())):
                with pytest.raises(StateError, match=r"sharded.*gathered_parameters"):
                    copied(accelerator.unwrap_model(model))  # type: ignore[no-untyped-call]
            with pytest.raises(StateError, match=r"sharded.*gathered_parameters"):
                copy.deepcopy(net.body[0])
        with model.gathered_parameters():
            average = copy.deepcopy(accelerator.unwrap_model(model))
            file = io.BytesIO()
            torch.save(accelerator.unwrap_model(model), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (average, loaded):
            assert type(other) is Net and all(
                torch.equal(value, start[name]) for name, value in other.state_dict().items()
            )
            loss_of(other, batch).backward()  # nothing of the engine comes along, and nothing of it moves
            assert all(parameter.grad is not None for parameter in other.parameters())
        assert len(pickle.dumps(average)) < 4 * sum(value.nbytes for value in start.values())
        expected = loss_of(model, batch)
        torch.testing.assert_close(loss_of(average, batch), expected)
        accelerator.backward(expected)
        optimizer.step()
        assert all(torch.equal(value, start[name]) for name, value in average.state_dict().items())
        found = model.state_dict()
        assert not torch.equal(found["body.0.weight"], start["body.0.weight"])


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_a_copy_of_the_model_is_whole_and_free_of_the_engine(world: World, stage: int | None) -> None:
    world.run(copies, stage)


def transformers_model(stage: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with accelerator_of(config_of(stage) | {"shardwise": {}}) as accelerator:  # type: ignore[operator]
        torch.manual_seed(0)
        settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        gpt = GPT2LMHeadModel(
            GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=2, attn_pdrop=0.0, **settings)
        ).eval()
        tokens = torch.tensor([[1, 2, 3]])
        expected = gpt.generate(tokens, max_new_tokens=4, do_sample=False)
        optimizer = torch.optim.SGD(gpt.parameters(), lr=0.1)
        model, _ = accelerator.prepare(gpt, optimizer)
        assert model.config is gpt.config and model.num_parameters() == gpt.num_parameters()
        assert (model.dtype, gpt.dtype, gpt.device) == (torch.float32, torch.float32, torch.device("cpu"))
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), expected)
        assert torch.equal(
            accelerator.unwrap_model(model).generate(tokens, max_new_tokens=4, do_sample=False), expected
        )
        assert model.get_input_embeddings() is gpt.get_input_embeddings()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_of_transformers_generates_when_it_is_prepared(world2: World, stage: int) -> None:
    pytest.importorskip("transformers")
    world2.run(transformers_model, stage)
