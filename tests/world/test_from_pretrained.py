"""``from_pretrained`` of ``transformers`` under ``zero.Init``: the model that it gives without, read by ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (the extra 'demo')")

import transformers as hf

import shardwise
from tests import pieces as built
from tests import real_models as real
from tests.accelerators import accelerator_of
from tests.world.engine_runs import config_of, open_engine
from tests.world.test_load_pretrained import counted_bytes
from tests.worlds import World

FAMILIES = {
    "gpt2": (real.build_gpt2, hf.GPT2LMHeadModel),
    "llama": (real.build_llama, hf.LlamaForCausalLM),
    "t5": (real.build_t5, hf.T5ForConditionalGeneration),
    "vit": (real.build_vit, hf.ViTForImageClassification),
    "mixtral": (real.build_mixtral, hf.MixtralForCausalLM),
}
SMALL: Any = {"max_whole_bytes": 1 << 15, "small_bytes": 256}


def loaded(family: str, path: str) -> tuple[int, int]:
    kind = FAMILIES[family][1]
    for arguments in ({}, {"dtype": torch.bfloat16}):
        torch.manual_seed(0)
        wanted = kind.from_pretrained(path, **arguments)
        torch.manual_seed(0)
        with shardwise.zero.Init(**SMALL), counted_bytes() as read:
            model, info = kind.from_pretrained(path, output_loading_info=True, **arguments)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.to_dict() == wanted.config.to_dict()
        assert not model.training
        built.assert_same_state(built.whole_state(model), wanted.state_dict())
        in_pieces = [p for p in model.parameters() if p.nbytes >= 256]
        assert built.number_in_pieces(model) == len(in_pieces)
        assert dict(model.named_buffers()).keys() == dict(wanted.named_buffers()).keys()
        for name, buffer in wanted.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
    with open_engine(model, None, config_of(3)) as engine:
        built.assert_same_state(engine.state_dict(), wanted.state_dict())
    return read[0], sum(p.nbytes for p in wanted.parameters()) * 2  # the file is fp32


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_model(world2: World, family: str, tmp_path: Path) -> None:
    FAMILIES[family][0]().save_pretrained(tmp_path, max_shard_size="60KB")
    for read, total in world2.run(loaded, family, str(tmp_path)):
        if family != "mixtral":  # its experts are fused on the way: read whole, one after the other
            assert read < 0.52 * total + 20_000, (read, total)


def other_heads(path: str) -> None:
    """A base model's file into a model with a new head, whose weights are drawn; and a file of torch's."""
    torch.manual_seed(0)
    wanted = hf.GPT2ForSequenceClassification.from_pretrained(path, num_labels=70)
    torch.manual_seed(0)
    with shardwise.zero.Init(**SMALL):
        model = hf.GPT2ForSequenceClassification.from_pretrained(path, num_labels=70)
    assert built.number_in_pieces(model) > 5
    built.assert_same_state(built.whole_state(model), wanted.state_dict())
    with torch.device("meta"):
        empty: Any = hf.LlamaForCausalLM(real.build_llama().config)
    shardwise.load_pretrained(empty, f"{path}/llama")
    filled = hf.LlamaForCausalLM.from_pretrained(f"{path}/llama")
    built.assert_same_state(built.whole_state(empty), filled.state_dict())
    for name, buffer in filled.named_buffers():
        assert torch.equal(empty.get_buffer(name), buffer), name


def test_missing_weights_are_drawn_and_meta_models_are_filled(world2: World, tmp_path: Path) -> None:
    real.build_gpt2().save_pretrained(tmp_path)
    real.build_llama().save_pretrained(tmp_path / "llama")
    world2.run(other_heads, str(tmp_path))


def by_accelerator(path: str, flag: bool | None, stage: int) -> int:
    from shardwise.plugin import DeepSpeedPlugin

    with accelerator_of(None, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage, zero3_init_flag=flag)) as accelerator:
        with accelerator.init_context(**SMALL):
            model = hf.AutoModelForCausalLM.from_pretrained(path)
        number = built.number_in_pieces(model)
        plugin = accelerator.deepspeed_plugin
        assert plugin is not None and plugin.is_zero3_init_enabled() == (number > 0)
        with plugin.zero3_init_context_manager(enable=True):
            assert plugin.is_zero3_init_enabled() == (stage == 3)
            other = hf.AutoModelForCausalLM.from_config(model.config)
        assert (built.number_in_pieces(other) > 0) == (stage == 3)
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
        prepared = accelerator.prepare(model)
        built.assert_same_state(prepared.state_dict(), hf.AutoModelForCausalLM.from_pretrained(path).state_dict())
    return number


def test_the_flag_acts(world2: World, tmp_path: Path) -> None:
    real.build_gpt2().save_pretrained(tmp_path)
    assert min(world2.run(by_accelerator, str(tmp_path), None, 3)) > 5, "on by default at stage 3"
    assert min(world2.run(by_accelerator, str(tmp_path), True, 3)) > 5
    assert world2.run(by_accelerator, str(tmp_path), False, 3) == [0, 0]
    assert world2.run(by_accelerator, str(tmp_path), None, 2) == [0, 0]
