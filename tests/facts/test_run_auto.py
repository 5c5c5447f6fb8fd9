"""What prepare sees fills "auto" by the documented formulas; what it cannot fill is named with the ways to set it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardwise.config.load import load_config
from shardwise.config.run.auto import FILLED_FROM, Seen, fill, hidden_size_of
from shardwise.config.run.nested import get, put
from shardwise.config.run.said import Origin, Said
from shardwise.errors import ConfigError
from tests.facts.runs import resolved_of

GUIDE = Path(__file__).parent / "guide"
EIGHT = Said(8, Origin.AUTO, "auto: the loaders' batch size (8)")


def seen_of(**others):
    return Seen(
        **{
            "num_processes": 2,
            "micro_batch_size": EIGHT,
            "hidden_size": Said(768, Origin.AUTO, "auto: config.hidden_size 768"),
            "optimizer": {"lr": 5e-4, "weight_decay": 0.01},
            "scheduler": {"warmup_num_steps": 3, "total_num_steps": 101},
            **others,
        }
    )


def filled(ds_config, unused=(), **seen):
    return fill(resolved_of(ds_config=ds_config), seen_of(**seen), unused)


def test_the_guides_stage_3_json_is_filled_whole():
    config = json.loads((GUIDE / "zero_stage3_offload_config.json").read_text())
    for part in ("offload_optimizer", "offload_param"):  # of which the engine knows nothing
        del config["zero_optimization"][part]
    result = filled(config)
    assert result.ds_config["zero_optimization"]["reduce_bucket_size"] == 768 * 768
    assert result.ds_config["zero_optimization"]["stage3_prefetch_bucket_size"] == int(0.9 * 768 * 768)
    assert result.ds_config["zero_optimization"]["stage3_param_persistence_threshold"] == 10 * 768
    assert result.ds_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is False
    assert result.ds_config["optimizer"]["params"] == {"lr": 5e-4, "weight_decay": 0.01}
    assert result.ds_config["scheduler"]["params"] == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 5e-4,
        "warmup_num_steps": 3,
        "total_num_steps": 51,
    }
    assert result.ds_config["train_micro_batch_size_per_gpu"] == 8
    assert result.ds_config["train_batch_size"] == 8 * 1 * 2
    assert result.ds_config["gradient_clipping"] == 1.0
    assert "auto" not in json.dumps(result.ds_config)
    load_config(result.ds_config)
    formula = result.origins["zero_optimization", "reduce_bucket_size"].place
    assert "hidden_size * hidden_size" in formula and "768" in formula


def test_every_formula_that_the_page_promises_is_one_that_fills():
    for path in FILLED_FROM:
        config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
        if path[0] in ("optimizer", "scheduler"):
            config[path[0]] = {"type": "AdamW" if path[0] == "optimizer" else "WarmupDecayLR", "params": {}}
        put(config, path, "auto")
        value = get(filled(config).ds_config, path)
        assert isinstance(value, int | float), path


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SimpleNamespace(hidden_size=96), 96),
        (SimpleNamespace(hidden_sizes=[16, 64, 32]), 64),
        (SimpleNamespace(text_config=SimpleNamespace(hidden_size=48)), 48),
        (SimpleNamespace(text_config=SimpleNamespace(hidden_sizes=(8, 24))), 24),
        (SimpleNamespace(d_model=12), None),
        (None, None),
    ],
)
def test_the_hidden_size_of_a_model(config, size):
    found = hidden_size_of(SimpleNamespace(config=config))
    assert (None if found is None else found.value) == size
    assert hidden_size_of(object()) is None


def test_what_nobody_fills_is_named_all_at_once_with_the_ways():
    config = json.loads((GUIDE / "zero_stage2_config.json").read_text())
    with pytest.raises(ConfigError) as caught:
        fill(resolved_of(ds_config=config), Seen(num_processes=2))
    text = str(caught.value)
    for key, way in (
        ("optimizer.params.lr", "DummyOptim(lr=...)"),
        ("scheduler.params.total_num_steps", "DummyScheduler(total_num_steps=...)"),
        ("zero_optimization.reduce_bucket_size", "hidden_size"),
        ("train_micro_batch_size_per_gpu", "data loader"),
    ):
        (line,) = [line for line in text.splitlines() if key in line and f"{key}:" in line]
        assert way in line and '"auto"' in line


def test_an_unused_recipe_needs_no_answers_and_is_left_out():
    config = json.loads((GUIDE / "zero_stage2_config.json").read_text())
    result = filled(config, unused=("optimizer", "scheduler"), optimizer={}, scheduler={})
    assert "optimizer" not in result.ds_config and "scheduler" not in result.ds_config


def test_the_whole_batch_fixes_the_part():
    config = {
        "zero_optimization": {"stage": 1},
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
    }
    result = filled(config, micro_batch_size=None)
    assert result.ds_config["train_micro_batch_size_per_gpu"] == "auto"
    assert load_config(result.ds_config).resolve_batch(2).train_micro_batch_size_per_gpu == 32


def test_a_json_that_says_nothing_of_the_batch_takes_that_of_the_loaders():
    result = filled({"zero_optimization": {"stage": 3}}, gradient_accumulation_steps=4)
    assert result.ds_config["train_micro_batch_size_per_gpu"] == 8
    assert result.ds_config["gradient_accumulation_steps"] == 4


def test_steps_are_not_divided_where_ranks_share_each_batch():
    config = {
        "zero_optimization": {"stage": 1},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
    }
    total = ("scheduler", "params", "total_num_steps")
    assert get(filled(config).ds_config, total) == 51
    assert get(filled(config, split_batches=True).ds_config, total) == 101
