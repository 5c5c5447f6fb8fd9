"""The JSON Schema and `load_config` say the same of every key and every kind of value."""

import json
import logging
import math

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config import EngineConfig, load_config
from shardwise.config.catalog import keys_of, sections_of
from shardwise.config.effects import Unsupported
from shardwise.config.json_schema import config_schema
from shardwise.errors import ConfigError

SCHEMA = config_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

VALUES = [
    None, True, False, 0, 1, 2, -1, -2, 3.0, 2e8, 2.5, -0.5, 127, 128, 2**63 - 1, 2**63, "", "auto", "none", "cpu",
    "fp32", "bf16", "mean", "native", [], ["a"], ["a", 1], [""], {}, {"enabled": False}, {"enabled": True},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, logger="shardwise.config")


def loads(config):
    try:
        load_config(config)
    except ConfigError:
        return False
    return True


AT_STAGE_3 = {"stage": 3}
COMPANIONS = {
    ("zero_optimization", "zero_hpz_partition_size"): AT_STAGE_3,
    ("zero_optimization", "zero_quantized_weights"): AT_STAGE_3,
    ("zero_optimization", "zero_quantized_gradients"): AT_STAGE_3,
    ("zero_optimization", "zero_quantized_nontrainable_weights"): AT_STAGE_3,
    ("zero_optimization", "mics_shard_size"): AT_STAGE_3,
    ("zero_optimization", "mics_hierarchical_params_gather"): {"stage": 3, "mics_shard_size": 2},
    ("shardwise", "frozen_weights"): AT_STAGE_3,
    ("shardwise", "step_in_backward"): {"offload_optimizer": {"device": "cpu"}},
    ("shardwise", "error_feedback"): AT_STAGE_3 | {"zero_quantized_gradients": True},
}
"""Of zero_optimization, for keys that a rule binds to others, which no schema can say: each is judged where it fits."""


def nested(path, value):
    companions = COMPANIONS.get(tuple(path), {})
    for part in reversed(path):
        value = {part: value}
    if companions:
        value.setdefault("zero_optimization", {}).update(companions)
    block = path[0]
    if block in ("optimizer", "scheduler") and len(path) > 1 and path[1] != "type":
        value[block]["type"] = "Adam"
    return value


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_it_agrees_with_the_loader_on_every_key(value):
    for key in keys_of(EngineConfig):
        for name in (key.path[-1], *key.aliases):
            config = nested((*key.path[:-1], name), value)
            valid = VALIDATOR.is_valid(config)
            if isinstance(key.effect, Unsupported):
                assert valid or not loads(config), config  # which values ask for nothing no schema can say
            else:
                assert valid == loads(config), config


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_it_agrees_with_the_loader_on_every_block(value):
    for section in sections_of(EngineConfig):
        for name in (*section.path[-1:], *section.aliases):
            config = nested((*section.path[:-1], name), value)
            if loads(config):
                assert VALIDATOR.is_valid(config), config
            elif not isinstance(value, dict):
                assert not VALIDATOR.is_valid(config), config


def test_unsupported_keys_are_marked_with_the_reason():
    amp = SCHEMA["properties"]["amp"]
    assert amp["deprecated"] is True
    assert "does not exist here" in amp["description"]
    assert "deprecated" not in SCHEMA["properties"]["gradient_clipping"]


RIGHT = [
    {},
    {"$schema": "deepspeed-config.schema.json"},
    {"train_batch_size": "auto", "gradient_accumulation_steps": 2.0, "gradient_clipping": 1},
    {"bfloat16": {"enabled": True}, "zero_optimization": True},
    {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 5e7, "stage3_max_live_parameters": "auto"}},
    {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "offload_param": None}},
    {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}}},
    {"shardwise": {"reduction": "auto", "unit_classes": ["Block"]}, "amp": {"enabled": False, "opt_level": "O1"}},
]

WRONG = [
    {"zero_optimizaton": {}},
    {"zero_optimization": {"stage": 4}},
    {"zero_optimization": {"stage": True}},
    {"zero_optimization": {"stage": "auto"}},
    {"zero_optimization": {"reduce_bucket_size": 1.5}},
    {"zero_optimization": {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 1}},
    {"train_batch_size": "8"},
    {"train_batch_size": 0},
    {"train_batch_size": True},
    {"gradient_clipping": -1},
    {"bf16": {"enabled": 1}},
    {"bf16": {}, "bfloat16": {}},
    {"optimizer": {"params": {}}},
    {"optimizer": {"type": "Adam", "params": {"lr": "auto"}}},
    {"communication_data_type": "fp8"},
    {"zero_optimization": {"leaf_module": {"classes": ["A", 1]}}},
    {"fp16": 1},
    [1],
]


@pytest.mark.parametrize("config", RIGHT, ids=json.dumps)
def test_right_configs_are_valid(config):
    assert VALIDATOR.is_valid(config)
    assert loads(config)


@pytest.mark.parametrize("config", WRONG, ids=json.dumps)
def test_wrong_configs_are_not(config):
    assert not VALIDATOR.is_valid(config)
    assert not loads(config)


def test_a_front_end_may_say_where_it_replaces_auto():
    config = {"gradient_clipping": "auto", "optimizer": {"type": "Adam", "params": {"lr": "auto"}}}
    schema = config_schema(also_auto=["gradient_clipping", "optimizer.params.lr"])
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(config)
    assert validator.is_valid({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}})
    assert not validator.is_valid({"optimizer": {"type": "Adam", "params": {"eps": "auto"}}})
    assert not VALIDATOR.is_valid(config)


_keys = list(keys_of(EngineConfig))


@st.composite
def _configs(draw):
    """Configs of several keys, most of them right: a default, or a value of any kind."""
    config = {}
    for key in draw(st.lists(st.sampled_from(_keys), max_size=6, unique_by=lambda key: key.dotted)):
        value = config
        for part in key.path[:-1]:
            value = value.setdefault(part, {"type": "Adam"} if part in ("optimizer", "scheduler") else {})
        name = draw(st.sampled_from([key.path[-1], *key.aliases]))
        value[name] = draw(st.just(key.default) | st.sampled_from(VALUES) | st.integers(0, 3))
    return config


@given(_configs())
def test_what_loads_is_valid(config):
    plain = json.loads(json.dumps(config))
    if loads(config):
        assert VALIDATOR.is_valid(plain)


def test_what_only_the_reader_takes_is_left_to_it():
    endless = {"steps_per_print": math.inf}  # "Infinity" is not JSON, so an editor meets no such document
    assert loads(endless)
