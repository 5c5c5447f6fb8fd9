"""A config loads as a typed object, or one ConfigError lists every fault of it."""

import base64
import json
import logging

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardwise.config import EngineConfig, load_config
from shardwise.config.catalog import keys_of
from shardwise.config.effects import Acts, NoEffect, Unsupported
from shardwise.errors import ConfigError


def faults_of(source):
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value)


# --- what loads -------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_schema():
    config = load_config(None)
    assert config == EngineConfig() == load_config({})
    assert config.zero_optimization.stage == 0
    assert config.gradient_clipping == 0.0
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.fp16.initial_scale_power == 16
    assert config.auto_keys == ()


def test_values_keep_their_meaning_and_type():
    config = load_config(
        {
            "train_batch_size": 16,
            "gradient_clipping": 1,
            "steps_per_print": float("inf"),
            "bfloat16": {"enabled": True},
            "zero_optimization": {
                "stage": 3.0,
                "allgather_bucket_size": 2e8,
                "prefetch_bucket_size": 5e7,
                "stage3_max_live_parameters": 1e9,
                "zero_leaf_modules": ["Experts"],
                "leaf_module": {"classes": ["Router", "Experts"]},
            },
        }
    )
    zero = config.zero_optimization
    assert (zero.stage, type(zero.stage)) == (3, int)
    assert (zero.allgather_bucket_size, type(zero.allgather_bucket_size)) == (200_000_000, int)
    assert zero.stage3_prefetch_bucket_size == 50_000_000
    assert zero.leaf_classes == ("Experts", "Router")
    assert (config.gradient_clipping, type(config.gradient_clipping)) == (1.0, float)
    assert config.steps_per_print is None
    assert config.compute_dtype == "bf16"
    assert config.gradient_communication_dtype == "bf16"


@pytest.mark.parametrize(("shorthand", "stage"), [(True, 1), (False, 0)])
def test_zero_as_a_bool_is_a_stage(shorthand, stage):
    assert load_config({"zero_optimization": shorthand}).zero_optimization.stage == stage


def test_a_config_survives_its_own_dump():
    config = load_config({"train_batch_size": 8, "zero_optimization": {"stage": 2, "leaf_module": {"names": ["a.b"]}}})
    assert load_config(config.model_dump()) == config
    assert load_config(json.loads(config.model_dump_json())) == config


def test_a_config_shares_nothing_with_its_source_and_is_frozen():
    source = {"optimizer": {"type": "Adam", "params": {"lr": 0.1, "betas": [0.9, 0.99]}}}
    config = load_config(source)
    source["optimizer"]["params"]["betas"][0] = 0.5
    assert config.optimizer.params["betas"] == [0.9, 0.99]
    with pytest.raises(ValueError, match="frozen"):
        config.gradient_clipping = 2.0


def test_auto_is_the_engines_choice_and_is_recorded():
    config = load_config(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": "auto"},
            "shardwise": {"reduction": "auto"},  # a value like others, not a choice that was left open
        }
    )
    assert config.train_batch_size is None
    assert config.zero_optimization.stage3_prefetch_bucket_size is None
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.shardwise.reduction == "auto"
    assert config.auto_keys == (
        "train_batch_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.reduce_bucket_size",
    )


def test_switches_that_ask_for_nothing_are_accepted_in_silence(caplog):
    with caplog.at_level(logging.WARNING):
        load_config(
            {
                "wall_clock_breakdown": False,
                "prescale_gradients": False,
                "amp": {"enabled": False, "opt_level": "O1"},
                "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
                "zero_optimization": {
                    "offload_optimizer": {"device": "none", "nvme_path": None},
                    "offload_param": {"device": None, "pin_memory": True},
                    "zero_hpz_partition_size": 1,
                    "mics_shard_size": 0,
                    "cpu_offload": False,
                },
            }
        )
    assert caplog.records == []


def test_keys_without_effect_are_named_in_one_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="shardwise.config"):
        load_config(
            {
                "graph_harvesting": True,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"module_granularity_threshold": 7, "round_robin_gradients": True},
            }
        )
    (record,) = caplog.records
    text = record.getMessage()
    for name in (
        "graph_harvesting",
        "zero_allow_untested_optimizer",
        "zero_optimization.module_granularity_threshold",
        "zero_optimization.round_robin_gradients",
    ):
        assert f"\n  {name}: " in text
    assert "any optimizer is accepted" in text


# --- what does not ----------------------------------------------------------------------------------------------------

TYPOS = {
    ("train_batchsize",): "train_batch_size",
    ("gradient_acumulation_steps",): "gradient_accumulation_steps",
    ("gradient_cliping",): "gradient_clipping",
    ("zero_optimizaton",): "zero_optimization",
    ("optimiser",): "optimizer",
    ("Scheduler",): "scheduler",
    ("zero_optimization", "reduce_bucketsize"): "reduce_bucket_size",
    ("zero_optimization", "stage3_prefetch_bucket"): "stage3_prefetch_bucket_size",
    ("zero_optimization", "offload_optimiser"): "offload_optimizer",
    ("fp16", "loss_scale_windows"): "loss_scale_window",
    ("fp16", "hysterisis"): "hysteresis",
    ("optimizer", "parms"): "params",
}


@pytest.mark.parametrize("path", TYPOS, ids=".".join)
def test_a_typo_is_told_its_neighbour(path):
    source = value = {}
    for part in path[:-1]:
        source[part] = {"type": "Adam"} if part == "optimizer" else {}
        value = source[part]
    value[path[-1]] = 1
    text = faults_of(source)
    assert text.count("\n") == 1, "one fault, one line"
    assert f'{".".join(path)}: unknown key. Did you mean "{TYPOS[path]}"?' in text


def test_a_key_in_the_wrong_block_is_told_its_place():
    assert "stage: unknown key here. It belongs in zero_optimization;" in faults_of({"stage": 3})
    assert "gradient_clipping: unknown key here. It belongs in the top level;" in faults_of(
        {"fp16": {"gradient_clipping": 1.0}}
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"train_batch_size": True}, "train_batch_size: found true, expected a whole number"),
        ({"train_batch_size": "2"}, 'train_batch_size: found "2", expected a whole number'),
        ({"train_batch_size": 2.5}, "train_batch_size: found 2.5, expected a whole number"),
        ({"train_batch_size": 0}, "train_batch_size: found 0, expected a number at least 1"),
        ({"gradient_clipping": False}, "gradient_clipping: found false, expected a number"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping: found NaN, expected a finite number"),
        ({"gradient_clipping": -1}, "gradient_clipping: found -1, expected a number at least 0"),
        ({"fp16": {"enabled": 1}}, "fp16.enabled: found 1, expected true or false"),
        ({"fp16": 1}, "fp16: found 1, expected a block"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: found 4, expected one of 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: found true, expected one of 0, 1, 2 or 3"),
        ({"communication_data_type": "fp8"}, 'found "fp8", expected one of "fp32", "fp16" or "bf16"'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'found "bf16", expected one of "fp32"'),
        ({"optimizer": {"params": {}}}, "optimizer.type: missing"),
        ({"zero_optimization": {"leaf_module": {"classes": ["A", 1, 2]}}}, "leaf_module.classes[2]: found 2"),
        ({3: 1}, "found the key 3, expected a string"),
        ([1], "expected a block"),
    ],
    ids=str,
)
def test_a_wrong_value_is_shown_beside_what_was_expected(source, expected):
    assert expected in faults_of(source)


@pytest.mark.parametrize(
    "path",
    ["zero_optimization.stage", "gradient_clipping", "fp16.enabled", "optimizer.params.lr", "prescale_gradients"],
)
def test_auto_that_nobody_can_fill_names_the_key(path):
    *blocks, name = path.split(".")
    source = value = {"optimizer": {"type": "Adam", "params": {}}}
    for block in blocks:
        value = value.setdefault(block, {})
    value[name] = "auto"
    assert f'{path}: found "auto"' in faults_of(source)


@pytest.mark.parametrize(
    "source",
    [
        {"zero_optimization": {"cpu_offload": True}},
        {"zero_optimization": {"ignore_unused_parameters": False}},
        {"sparse_gradients": True},
        {"amp": {"enabled": True}},
        {"sequence_parallel_size": 2},
        {"elasticity": {"enabled": True}},
        {"compile": {"deepcompile": True}},
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(source):
    text = faults_of(source)
    assert text.count("\n") == 1
    assert "which is not supported: " in text


def test_two_compute_dtypes_are_refused():
    assert "bf16.enabled: found true, and fp16.enabled is true" in faults_of(
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    )


@pytest.mark.parametrize(
    ("zero", "own", "words"),
    [
        ({"zero_quantized_weights": True, "stage": 2}, {}, ["zero_quantized_weights", "stage 2", "Set stage to 3"]),
        ({"zero_quantized_gradients": True, "stage": 1}, {}, ["zero_quantized_gradients", "stage 1"]),
        ({"zero_hpz_partition_size": 2}, {}, ["zero_hpz_partition_size", "stage 0"]),
        ({"zero_quantized_nontrainable_weights": True}, {}, ["zero_quantized_nontrainable_weights", "stage 0"]),
        ({"stage": 2}, {"frozen_weights": "int4"}, ["shardwise.frozen_weights", "stage 2", "Set stage to 3"]),
        ({"stage": 3}, {"quantization_block": 100}, ["quantization_block", "found 100", "a multiple of 32"]),
        ({"stage": 3}, {"quantization_block": 8192}, ["quantization_block", "found 8192", "at most 4096"]),
        (
            {"stage": 3, "zero_quantized_weights": True},
            {"transport": "shared_memory"},
            ["zero_quantized_weights", "shared_memory", "process_group"],
        ),
        (
            {"stage": 3, "zero_quantized_gradients": True, "reduce_scatter": False},
            {},
            ["zero_quantized_gradients", "reduce_scatter", "all-reduce"],
        ),
        ({"stage": 3}, {"error_feedback": True}, ["error_feedback", "zero_quantized_gradients"]),
    ],
)
def test_zeropp_that_cannot_work_is_told(zero, own, words):
    text = faults_of({"zero_optimization": zero, "shardwise": own})
    assert all(word in text for word in words), text


def test_errors_are_not_fed_back_over_a_change_of_the_loss_scale():
    source = {
        "zero_optimization": {"stage": 3, "zero_quantized_gradients": True},
        "shardwise": {"error_feedback": True},
    }
    load_config(source)
    assert "error_feedback: found true with fp16" in faults_of({**source, "fp16": {"enabled": True}})


def test_a_sum_has_no_division_to_move():
    source = {"prescale_gradients": True, "gradient_allreduce_op": "sum"}
    assert 'prescale_gradients: found true, and gradient_allreduce_op is "sum"' in faults_of(source)


def test_a_loss_scale_must_start_above_its_floor():
    fp16 = {"initial_scale_power": 3, "min_loss_scale": 16}
    assert "fp16.min_loss_scale: found 16, expected at most" in faults_of({"fp16": {"enabled": True, **fp16}})
    load_config({"fp16": {"enabled": False, **fp16}})
    load_config({"fp16": {"enabled": True, "loss_scale": 128, **fp16}})


def test_two_names_of_one_key_are_refused():
    text = faults_of({"bf16": {"enabled": True}, "bfloat16": {"enabled": False}})
    assert 'bfloat16: means the same as "bf16", and both are set' in text


def test_all_faults_come_at_once_in_the_order_of_lines(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        """{
  // batch
  "train_batch_size": "8",        # a string
  "zero_optimizaton": {},
  "bf16": {
    "enabled": true},
  "fp16": {"initial_scale_power": 300,
    "enabled": true, "enabled": true},

  "zero_optimization": {
    "stage": 7,
    "stage": "auto",
    "cpu_offload": true,
    "reduce_bucket_size": 1.5,
  },
}"""
    )
    first, *rows = faults_of(path).split("\n")
    assert first == f"{path} has 9 faults:"
    assert [row.split(": ")[0].strip() for row in rows] == [
        "line 3, train_batch_size",
        "line 4, zero_optimizaton",
        "line 6, bf16.enabled",
        "line 7, fp16.initial_scale_power",
        "line 8, fp16.enabled",
        "line 12, zero_optimization.stage",
        "line 12, zero_optimization.stage",
        "line 13, zero_optimization.cpu_offload",
        "line 14, zero_optimization.reduce_bucket_size",
    ]
    assert "found twice, on lines 11 and 12" in rows[5] + rows[6]


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_file_with_comments_and_trailing_commas(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        '\ufeff# one\n{"train_batch_size": 4, /* two\n */ "zero_optimization": {"stage": 2,}, // three\n}\n'
    )
    config = load_config(str(path))
    assert (config.train_batch_size, config.zero_optimization.stage) == (4, 2)


@pytest.mark.parametrize("padding", ["", " " * 9000], ids=["short", "longer than a file name may be"])
def test_base64_of_json(padding):
    encoded = base64.urlsafe_b64encode(('{"train_batch_size": 4}' + padding).encode()).decode()
    assert load_config(encoded).train_batch_size == 4


def test_a_source_that_is_no_config_is_named(tmp_path):
    assert "does not exist" in faults_of(str(tmp_path / "none.json"))
    assert "is a directory" in faults_of(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    assert "is not UTF-8 text" in faults_of(tmp_path / "latin.json")
    assert "cannot be read: File name too long" in faults_of("x" * 5000)


# --- properties -------------------------------------------------------------------------------------------------------

_names = sorted({name for key in keys_of(EngineConfig) for name in (*key.path, *key.aliases)})
_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["auto", "none", "cpu", "fp32", 10**400])
)
_keys = st.sampled_from(_names) | st.text(max_size=5) | st.integers()
_json_like = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(_keys, _json_like, max_size=6))
@example({"optimizer": {"type": "Adam", "params": {3: "auto"}}})
@example({"zero_optimization": {"leaf_module": {"classes": [1, 2, 3]}}, "autotuning": {0: 0, "a": {1: 1}}})
def test_any_mapping_loads_or_raises_exactly_config_error(source):
    try:
        config = load_config(source)
    except ConfigError as error:
        assert type(error) is ConfigError
        assert " fault" in str(error)
    else:
        assert load_config(config.model_dump()).model_dump() == config.model_dump()


@given(st.data())
def test_every_key_is_known_under_all_its_names(data):
    key = data.draw(st.sampled_from(list(keys_of(EngineConfig))))
    for name in (key.path[-1], *key.aliases):
        source = value = {}
        for block in key.path[:-1]:
            value[block] = {}
            value = value[block]
        value[name] = object()
        assert "unknown key" not in faults_of(source)


def test_every_key_carries_one_mark_with_words():
    keys = list(keys_of(EngineConfig))
    assert len({key.dotted for key in keys}) == len(keys) > 150
    for key in keys:
        words = key.effect.meaning if isinstance(key.effect, Acts) else key.effect.reason
        assert words and not words.endswith("."), key.dotted
        assert isinstance(key.effect, Acts | NoEffect | Unsupported)


def test_every_default_is_accepted_and_acts_as_if_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        for key in keys_of(EngineConfig):
            if key.path[0] in ("optimizer", "scheduler"):
                continue  # these blocks need a type, which has no default
            source = value = {}
            for block in key.path[:-1]:
                value[block] = {}
                value = value[block]
            value[key.path[-1]] = key.default
            assert load_config(source) == EngineConfig(), key.dotted
    assert caplog.records == []
