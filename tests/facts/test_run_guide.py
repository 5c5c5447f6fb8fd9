"""Every YAML and JSON that Accelerate's guide to DeepSpeed prints runs unchanged, and means what the guide says.

`seed/` holds the guide's blocks, each as a file; a scenario is a folder with its two files and what the guide prints.
The references are yaml.safe_load and json.loads for values, and the guide's own output for the scenarios.
"""

import json
from pathlib import Path

import pytest
import yaml

from shardwise.config.catalog import effect_of, nested_block
from shardwise.config.effects import Unsupported
from shardwise.config.load import given_keys
from shardwise.config.messages import dotted
from shardwise.config.run.file import file_mentions, flag_mentions, read_run_file
from shardwise.config.run.gather import gather
from shardwise.config.run.precedence import resolve
from shardwise.config.run.resolved import checked_json
from shardwise.config.run.said import Origin
from shardwise.config.source import read_source
from shardwise.errors import ConfigError
from tests.facts.runs import line_of

GUIDE = Path(__file__).parent / "guide"
YAMLS = sorted(GUIDE.rglob("*.yaml"))
JSONS = sorted(GUIDE.rglob("*.json"))

SCENARIO_3_FLAGS = {
    "mixed_precision": "fp16",
    "zero_stage": 3,
    "gradient_accumulation_steps": 5,
    "gradient_clipping": 1.0,
    "offload_param_device": "cpu",
    "offload_optimizer_device": "nvme",
    "zero3_save_16bit_model": "true",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(GUIDE))


def run_of(yaml_path: Path, flags=None):
    asked, notes = gather(flags or {}, yaml_path, {})
    assert notes == ()
    return resolve(asked)


def keys_in(data, path=()):
    for key, value in data.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys_in(value, (*path, key))


def test_every_block_is_here():
    assert len(YAMLS) == 7  # six in the guide; scenario 3 keeps the YAML of scenario 2
    assert len(JSONS) == 6  # five in the guide; scenario 2 keeps the JSON of scenario 1


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_a_yaml_keeps_its_values_their_types_and_their_lines(path):
    mentions = file_mentions(read_run_file(path))
    text = path.read_text()
    data = yaml.safe_load(text)
    section = data.pop("deepspeed_config")
    expected = data | section
    assert mentions.keys() == expected.keys()
    for name, value in expected.items():
        said = mentions[name]
        assert said.value == value and type(said.value) is type(value), name
        assert said.origin is Origin.FILE
        assert said.place == f"{path}, line {line_of(text, f'{name}:')}"


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_a_yaml_sets_no_key_without_effect_that_is_worth_a_warning(path):
    assert read_run_file(path).idle == []


@pytest.mark.parametrize("path", JSONS, ids=name_of)
def test_a_json_keeps_its_values_and_their_lines(path):
    source = read_source(path)
    text = path.read_text()
    assert source.data == json.loads(text)
    keys = list(keys_in(json.loads(text)))
    assert set(source.lines) == set(keys)
    lines = text.splitlines()
    for key in keys:
        assert f'"{key[-1]}":' in lines[source.lines[key] - 1]
    assert [source.lines[key] for key in keys] == sorted({source.lines[key] for key in keys})


@pytest.mark.parametrize("path", JSONS, ids=name_of)
def test_every_key_of_a_json_is_known_and_typed(path):
    checked = checked_json(read_source(path))
    given = {key for key, _, _ in given_keys(checked.block)}
    blocks = {key for key in keys_in(json.loads(path.read_text())) if _is_block(checked.block, key)}
    arguments = {key for key in keys_in(json.loads(path.read_text())) if key[1:2] == ("params",) and len(key) == 3}
    left = set(keys_in(json.loads(path.read_text()))) - given - set(checked.findings.autos) - blocks - arguments
    assert left == set()


def _is_block(block, path):
    for part in path:
        field = type(block).model_fields.get(part) if hasattr(type(block), "model_fields") else None
        if field is None or nested_block(field) is None:
            return False
        block = getattr(block, part)
    return True


def test_numbers_of_a_json_become_what_their_keys_hold():
    stage2 = checked_json(read_source(GUIDE / "zero_stage2_config.json")).block
    bucket = stage2.zero_optimization.allgather_bucket_size
    assert (bucket, type(bucket)) == (200_000_000, int)
    assert stage2.fp16.loss_scale == 0.0
    assert stage2.optimizer.params == {"torch_adam": True, "adam_w_mode": True}  # "auto" is not a value
    assert stage2.steps_per_print == 2000
    stage3 = checked_json(read_source(GUIDE / "zero_stage3_offload_config.json")).block
    assert stage3.zero_optimization.offload_optimizer.device == "cpu"
    assert stage3.zero_optimization.sub_group_size == 1_000_000_000
    plus_plus = checked_json(read_source(GUIDE / "zero_plus_plus.json")).block
    assert plus_plus.zero_optimization.zero_hpz_partition_size == 8
    assert plus_plus.zero_optimization.zero_quantized_weights is True


# --- the plugin's way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage", "device", "gathers"),
    [("plugin_zero2.yaml", 2, "none", False), ("plugin_zero3_offload.yaml", 3, "cpu", True)],
)
def test_a_plugin_yaml_describes_a_whole_json(name, stage, device, gathers):
    resolved = run_of(GUIDE / name, {"mixed_precision": "fp16"})
    assert resolved.ds_config == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": stage,
            "offload_optimizer": {"device": device, "nvme_path": None},
            "offload_param": {"device": device, "nvme_path": None},
            "stage3_gather_16bit_weights_on_model_save": gathers,
        },
        "steps_per_print": float("inf"),
        "fp16": {"enabled": True, "auto_cast": True},
        "bf16": {"enabled": False},
    }
    assert resolved["num_processes"] == 2
    assert resolved["distributed_type"] == "DEEPSPEED"
    assert resolved.origins["fp16", "enabled"].place == "--mixed_precision"
    stage_line = line_of((GUIDE / name).read_text(), "zero_stage:")
    assert resolved.origins["zero_optimization", "stage"].place == f"{GUIDE / name}, line {stage_line}"


# --- the JSON's way ---------------------------------------------------------------------------------------------------

PAIRS = {"file_zero2.yaml": "zero_stage2_config.json", "file_zero3_offload.yaml": "zero_stage3_offload_config.json"}


@pytest.mark.parametrize("name", PAIRS)
def test_a_json_that_is_not_there_is_an_error_with_its_line(name):
    with pytest.raises(ConfigError) as caught:
        gather({}, GUIDE / name, {})
    assert PAIRS[name] in str(caught.value)
    assert f"{GUIDE / name}, line 3" in str(caught.value)
    assert "there is no file" in str(caught.value)


@pytest.mark.parametrize("name", PAIRS)
def test_a_config_file_yaml_and_its_json_run_together(name):
    """The guide keeps `mixed_precision: fp16` beside a JSON that says so itself: they agree, and that is a warning."""
    path = GUIDE / PAIRS[name]
    resolved = run_of(GUIDE / name, {"deepspeed_config_file": str(path)})
    expected = json.loads(path.read_text()) | {"steps_per_print": float("inf"), "bf16": {"enabled": False}}
    if "stage3" in PAIRS[name]:
        expected["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False  # nobody asked for it
    assert resolved.ds_config == expected
    assert list(resolved.ds_config) == list(expected)
    assert resolved["mixed_precision"] == "fp16"
    twice = [text for text in resolved.warnings if text.startswith("said twice")]
    assert len(twice) == 1
    assert f'mixed_precision: "fp16" ({GUIDE / name}, line 11) and "fp16" ({path}, line 3)' in twice[0]


@pytest.mark.parametrize("path", JSONS, ids=name_of)
def test_what_a_json_asks_for_in_vain_is_said_before_anything_starts(path):
    asked, _ = gather({"deepspeed_config_file": str(path), "num_processes": 2}, None, {"HOME": "/nowhere"})
    warnings = resolve(asked).warnings
    for key, value, field in given_keys(checked_json(read_source(path)).block):
        effect = effect_of(field)
        if isinstance(effect, Unsupported) and value != field.default and not effect.neutral(value):
            assert any(f"prepare will refuse {dotted(key)}:" in text for text in warnings), key


# --- the scenarios ----------------------------------------------------------------------------------------------------


def test_scenario_1_every_ambiguous_setting_is_named_with_both_values_and_both_places():
    folder = GUIDE / "scenario1"
    run, ds = folder / "default_config.yaml", folder / "ds_config.json"
    with pytest.raises(ConfigError) as caught:
        run_of(run)
    text = str(caught.value)
    for row in (
        f"gradient_accumulation_steps: 1 ({run}, line 5) but 10 ({ds}, line 18)",
        f"gradient_clipping: 1.0 ({run}, line 6) and 1.0 ({ds}, line 15)",
        f'offload_optimizer_device: "cpu" ({run}, line 7) but "none" ({ds}, line 9)',
        f'offload_param_device: "cpu" ({run}, line 8) but "none" ({ds}, line 12)',
        f"zero3_save_16bit_model: true ({run}, line 10) but false ({ds}, line 7)",
        f"zero_stage: 3 ({run}, line 11) and 3 ({ds}, line 6)",
    ):
        assert f"\n  {row}\n" in text
    # The guide's own list of what may not stand beside a JSON.
    for name in (
        "gradient_accumulation_steps",
        "gradient_clipping",
        "zero_stage",
        "offload_optimizer_device",
        "offload_param_device",
        "zero3_save_16bit_model",
        "mixed_precision",
    ):
        assert name in text
    assert f"shardwise config update --config_file {run}" in text


@pytest.mark.parametrize(("scenario", "flags"), [(2, {}), (3, SCENARIO_3_FLAGS)])
def test_scenarios_2_and_3_give_the_printed_ds_config(scenario, flags):
    folder = GUIDE / f"scenario{scenario}"
    resolved = run_of(folder / "ds_config_sample.yaml", flags)
    # As text, so that the order of keys, the types and the spelling of infinity are compared as well.
    assert str(resolved.ds_config) == (folder / "printed_ds_config.txt").read_text().strip()
    assert resolved["num_processes"] == 4
    assert resolved["mixed_precision"] == ("bf16" if scenario == 2 else "fp16")
    assert not any(text.startswith("said twice") for text in resolved.warnings)


def test_scenario_3_each_value_comes_from_its_flag():
    resolved = run_of(GUIDE / "scenario3" / "ds_config_sample.yaml", SCENARIO_3_FLAGS)
    places = {path: said.place for path, said in resolved.origins.items()}
    ds = GUIDE / "scenario3" / "ds_config.json"
    assert places == {
        ("bf16", "enabled"): "--mixed_precision",
        ("zero_optimization", "stage"): "--zero_stage",
        ("zero_optimization", "stage3_gather_16bit_weights_on_model_save"): "--zero3_save_16bit_model",
        ("zero_optimization", "offload_optimizer", "device"): "--offload_optimizer_device",
        ("zero_optimization", "offload_param", "device"): "--offload_param_device",
        ("gradient_clipping",): "--gradient_clipping",
        ("train_batch_size",): f"{ds}, line 16",
        ("train_micro_batch_size_per_gpu",): f"{ds}, line 17",
        ("gradient_accumulation_steps",): "--gradient_accumulation_steps",
        ("steps_per_print",): "the script prints its own progress",
        ("fp16", "enabled"): "--mixed_precision",
        ("fp16", "auto_cast"): "--mixed_precision",
    }


def test_scenario_3_without_its_flags_is_the_defaults_of_the_settings():
    """A plain "auto" that nobody fills is what a run without a JSON would be, but for what prepare still sees."""
    resolved = run_of(GUIDE / "scenario3" / "ds_config_sample.yaml")
    assert resolved.ds_config["zero_optimization"] == {
        "stage": 2,
        "stage3_gather_16bit_weights_on_model_save": False,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"},
    }
    assert resolved.ds_config["gradient_accumulation_steps"] == "auto"
    assert resolved.ds_config["gradient_clipping"] == "auto"
    assert resolved.ds_config["bf16"] == resolved.ds_config["fp16"] == {"enabled": False}


def test_the_flags_of_scenario_3_are_read_with_their_types():
    mentions = flag_mentions(SCENARIO_3_FLAGS)
    assert {name: said.value for name, said in mentions.items()} == SCENARIO_3_FLAGS | {"zero3_save_16bit_model": True}
    assert all(said.origin is Origin.FLAG and said.place == f"--{name}" for name, said in mentions.items())
