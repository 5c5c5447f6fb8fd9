"""Models of `transformers` train under the front-end as plain data parallelism trains them, to the last bit in fp32.

The reference plays both ranks in one process with bare torch. It makes no views and moves nothing, so a difference is
the engine's doing: a weight that was read while it was away, a gradient that was lost, counted twice or added up in
another order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed (the extra 'demo')")

from shardwise.plugin import DeepSpeedPlugin
from tests import real_models as real
from tests.accelerators import accelerator_of
from tests.grids import grid
from tests.real_models import json_of
from tests.references import Recipe, Record, assert_near, assert_same
from tests.world.engine_runs import Config, rank, reference_of
from tests.worlds import World


@contextmanager
def prepared(recipe: Recipe, config: Config | None, **arguments: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Accelerator, model and optimizer, as a script has them after ``prepare``."""
    with accelerator_of(config, **arguments) as accelerator:
        model = recipe.model()
        yield accelerator, *accelerator.prepare(model, recipe.optimizer(model))


def trained(recipe: Recipe, config: Config, **arguments: Any) -> Record:
    with prepared(recipe, config, **arguments) as (accelerator, model, optimizer):
        return real.train(recipe, accelerator, model, optimizer)


def without(record: Record, *words: str) -> Record:
    """The record without the weights that have one of the words in their names."""
    weights = {name: value for name, value in record.weights.items() if not any(word in name for word in words)}
    return dataclasses.replace(record, weights=weights)


def equals_data_parallelism(recipe: Recipe, configs: list[Config]) -> None:
    wanted = reference_of(recipe, "once")
    for config in configs:
        assert_same(trained(recipe, config), wanted, f"{config['zero_optimization']} against one process")


FAMILIES = {
    "gpt2": (real.GPT2, (0, 1, 2, 3)),
    "bert": (real.BERT, (2, 3)),
    "llama": (real.LLAMA, (2, 3)),
    "t5": (real.T5, (0, 1, 2, 3)),
    "mixtral": (real.MIXTRAL, (2, 3)),
    "switch": (real.SWITCH, (2, 3)),
    "vit": (real.VIT, (2, 3)),
    "gpt2 with more tokens": (dataclasses.replace(real.GPT2, model=real.build_gpt2_with_more_tokens), (2, 3)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_as_data_parallelism(world2: World, family: str) -> None:
    recipe, stages = FAMILIES[family]
    world2.run(equals_data_parallelism, recipe, [json_of(stage) for stage in stages])


def test_parameters_below_the_threshold_stay_whole(world2: World) -> None:
    world2.run(equals_data_parallelism, real.T5, [json_of(3, {"stage3_param_persistence_threshold": 500})])


def test_gathers_as_messages(world2: World) -> None:
    world2.run(equals_data_parallelism, real.T5, [json_of(3, shardwise={"transport": "process_group"})])


# --- batch norms: each rank has running statistics of its own ---------------------------------------------------------

STATISTICS = ("running_", "num_batches_tracked")


def batch_norms() -> None:
    wanted = reference_of(real.RESNET, "once")
    second, third = (trained(real.RESNET, json_of(stage)) for stage in (2, 3))
    assert_same(without(third, *STATISTICS), without(wanted, *STATISTICS), "stage 3 against one process")
    assert_same(third, second, "stage 3 against stage 2")
    counts = [value for name, value in third.weights.items() if "num_batches_tracked" in name]
    assert counts and all(count == real.STEPS for count in counts), "a rank counts its own batches"


def test_a_net_with_batch_norms(world2: World) -> None:
    world2.run(batch_norms)


# --- mixtures of experts ----------------------------------------------------------------------------------------------


def some_expert_idles() -> list[int]:
    """Experts of the first layer of experts that get a token of this rank's first batch."""
    model: Any = real.build_switch()
    model(**real.SWITCH.batch(0, rank())).loss.backward()
    experts = model.encoder.block[1].layer[1].mlp.experts
    return [number for number, expert in enumerate(experts.values()) if expert.wi.weight.grad is not None]


def test_the_ranks_use_different_experts(world2: World) -> None:
    here, there = world2.run(some_expert_idles)
    assert here != there and 0 < len(here) < 11


@pytest.mark.parametrize(
    ("recipe", "leaf"),
    [
        (real.MIXTRAL, "MixtralSparseMoeBlock"),
        (real.SWITCH, "SwitchTransformersSparseMLP"),
        (real.SWITCH, "SwitchTransformersExperts"),  # a ModuleDict, but one that is called
    ],
)
def test_experts_as_leaf_modules(world2: World, recipe: Recipe, leaf: str) -> None:
    world2.run(equals_data_parallelism, recipe, [json_of(3, {"leaf_module": {"classes": [leaf]}})])


def leaves_of_the_plugin() -> None:
    wanted = reference_of(real.MIXTRAL, "once")
    plugin = DeepSpeedPlugin(
        hf_ds_config=json_of(3, shardwise={"transport": "process_group"}),
        deepspeed_moe_layer_cls_names="MixtralSparseMoeBlock",
    )
    with accelerator_of(deepspeed_plugin=plugin) as accelerator:
        model = real.MIXTRAL.model()
        engine, optimizer = accelerator.prepare(model, real.MIXTRAL.optimizer(model))
        assert "model.layers.1.mlp" in {unit.name for unit in engine._units}
        record = real.train(real.MIXTRAL, accelerator, engine, optimizer)
    assert_same(record, wanted, "leaf modules of the plugin against one process")


def test_leaf_modules_by_the_plugin(world2: World) -> None:
    world2.run(leaves_of_the_plugin)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "reentrant"),
    [*grid([real.LLAMA, real.GPT2], [False, True], quick=[(real.LLAMA, False), (real.GPT2, True)]), (real.T5, False)],
)
def test_gradient_checkpointing(world2: World, recipe: Recipe, reentrant: bool) -> None:
    model = functools.partial(real.recomputing, recipe.model, reentrant)
    world2.run(equals_data_parallelism, dataclasses.replace(recipe, model=model), [json_of(2), json_of(3)])


# --- adapters ---------------------------------------------------------------------------------------------------------


def frozen_base(recipe: Recipe) -> None:
    equals_data_parallelism(recipe, [json_of(2), json_of(3)])
    start = recipe.model().state_dict()
    moved = {
        name for name, value in reference_of(recipe, "once").weights.items() if not torch.equal(value, start[name])
    }
    assert moved == {name for name in start if "lora_" in name}


def test_adapters_on_a_frozen_base(world2: World) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    world2.run(frozen_base, dataclasses.replace(real.GPT2, model=real.build_gpt2_with_lora))


# --- 16 bits ----------------------------------------------------------------------------------------------------------


def in_bf16(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, steps=4)
    config: Config = {"bf16": {"enabled": True}}
    second, third = (trained(recipe, json_of(stage, **config), mixed_precision="bf16") for stage in (2, 3))
    assert_same(third, second, "stage 3 against stage 2")
    wanted = reference_of(recipe, "once")
    losses = [dataclasses.replace(record, weights={}) for record in (third, wanted)]
    losses = [dataclasses.replace(record, losses=[loss.float() for loss in record.losses]) for record in losses]
    assert_near(*losses, "bf16 against fp32", rtol=0.05, atol=0.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5", "mixtral", "vit"])
def test_bf16_is_near_fp32_and_alike_at_both_stages(world2: World, family: str) -> None:
    world2.run(in_bf16, FAMILIES[family][0])


def keeps_outputs(recipe: Recipe, config: Config | None, mixed_precision: str) -> None:
    """The model's own output object comes out, its cache and all, though tensors in it are scaled or widened."""
    with prepared(recipe, config, mixed_precision=mixed_precision) as (_, model, _):
        output = model(**recipe.batch(0, rank()))
        plain: Any = recipe.model()(**recipe.batch(0, rank()))
    assert type(output) is type(plain) and list(output) == list(plain)
    assert type(output.past_key_values) is type(plain.past_key_values)
    torch.testing.assert_close(output.loss.float(), plain.loss, rtol=0.02, atol=0.0)


@pytest.mark.parametrize(("stage", "mixed_precision"), [(None, "bf16"), (None, "fp16"), (3, "fp16")])
def test_the_output_object_comes_through(world2: World, stage: int | None, mixed_precision: str) -> None:
    config = None if stage is None else json_of(stage, fp16={"initial_scale_power": 8})
    world2.run(keeps_outputs, real.T5, config, mixed_precision)


# --- text -------------------------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [{}, {"use_cache": False}, {"num_beams": 2}]


def texts(model: Any, prompt: Tensor) -> list[list[list[int]]]:
    model.eval()
    return [model.generate(prompt, max_new_tokens=6, do_sample=False, **settings).tolist() for settings in SETTINGS]


def generates(recipe: Recipe, transport: str) -> None:
    """On weights that have moved since ``prepare``. Over shared memory the ranks need not go together."""
    recipe = dataclasses.replace(recipe, steps=2)
    with prepared(recipe, json_of(3, shardwise={"transport": transport})) as (accelerator, model, optimizer):
        record = real.train(recipe, accelerator, model, optimizer)
        alone: Any = recipe.model()
        alone.load_state_dict(record.weights)
        own = rank() if transport == "auto" else 0
        prompt = recipe.batch(0, own)["input_ids"]
        wanted = texts(alone, prompt)
        assert texts(model, prompt) == wanted, "the prepared model"
        assert texts(accelerator.unwrap_model(model), prompt) == wanted, "the unwrapped model"
        with model.gathered_parameters():
            assert texts(accelerator.unwrap_model(model), prompt) == wanted, "weights gathered once"
        model.train()
        real.train(recipe, accelerator, model, optimizer)


@pytest.mark.parametrize("transport", ["auto", "process_group"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_it_generates_between_steps(world2: World, family: str, transport: str) -> None:
    world2.run(generates, FAMILIES[family][0], transport)


def generates_together(recipe: Recipe) -> None:
    """Ranks that are done go on running the model for those that are not, as `synced_gpus` says."""
    with prepared(recipe, json_of(3, shardwise={"transport": "process_group"})) as (_, model, _):
        settings = {"max_new_tokens": 3 + 3 * rank(), "do_sample": False}
        prompt = recipe.batch(0, rank())["input_ids"]
        alone: Any = recipe.model().eval()
        found = model.eval().generate(prompt, synced_gpus=True, **settings)
        assert torch.equal(found, alone.generate(prompt, **settings))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_texts_of_unequal_length_over_messages(world2: World, family: str) -> None:
    world2.run(generates_together, FAMILIES[family][0])


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluates_unevenly(recipe: Recipe) -> None:
    """Between steps each rank looks at as many batches as it likes; training does not notice."""
    wanted = reference_of(recipe, "once")
    half = dataclasses.replace(recipe, steps=recipe.steps // 2)
    later = dataclasses.replace(half, batch=functools.partial(_batch_after, recipe, half.steps))
    with prepared(recipe, json_of(3)) as (accelerator, model, optimizer):
        first = real.train(half, accelerator, model, optimizer)
        alone = recipe.model()
        alone.load_state_dict(first.weights)
        model.eval()
        alone.eval()
        for index in range(2 + 3 * rank()):
            with torch.no_grad():
                found, expected = (recipe.loss(each, recipe.batch(50 + index, rank())) for each in (model, alone))
            assert torch.equal(found, expected)
        model.train()
        second = real.train(later, accelerator, model, optimizer)
    assert_same(Record(first.losses + second.losses, [], second.weights), wanted, "with evaluation between steps")


def _batch_after(recipe: Recipe, start: int, index: int, rank: int) -> Any:
    return recipe.batch(start + index, rank)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_evaluation_of_uneven_length(world2: World, family: str) -> None:
    world2.run(evaluates_unevenly, FAMILIES[family][0])


# --- files ------------------------------------------------------------------------------------------------------------


def saves(recipe: Recipe, stage: int, directory: str) -> None:
    """As Accelerate's examples write it: on every rank."""
    recipe = dataclasses.replace(recipe, steps=2)
    with prepared(recipe, json_of(stage)) as (accelerator, model, optimizer):
        record = real.train(recipe, accelerator, model, optimizer)
        accelerator.wait_for_everyone()
        accelerator.unwrap_model(model).save_pretrained(
            directory,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
        )
        accelerator.wait_for_everyone()
        loaded = type(accelerator.unwrap_model(model)).from_pretrained(directory)
    assert_same(Record([], [], loaded.state_dict()), Record([], [], record.weights), "what was loaded")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_what_was_saved_is_loaded(world2: World, tmp_path: Path, family: str, stage: int) -> None:
    world2.run(saves, FAMILIES[family][0], stage, str(tmp_path))
