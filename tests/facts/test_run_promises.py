"""What Accelerate's users were promised, lost, or never told: each promise is a test of its name."""

import json
import os
import socket

import pytest

from shardwise.config import load_config
from shardwise.config.run.gather import gather
from shardwise.config.run.precedence import resolve
from shardwise.config.run.said import Origin
from shardwise.errors import ConfigError
from tests.facts.runs import JSON_NAME, YAML_NAME, error_of, resolved_of

ZERO = {"zero_optimization": {"stage": 3}}


def offloads_in(resolved):
    zero = resolved.ds_config["zero_optimization"]
    return zero["offload_optimizer"], zero["offload_param"]


def warnings_about(resolved, name):
    return [text for text in resolved.warnings if name in text]


# --- offload ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ds_config", [None, ZERO], ids=["settings alone", "beside a JSON"])
@pytest.mark.parametrize("said_by", ["flags", "yaml"])
def test_nvme_paths_reach_the_ds_config(said_by, ds_config):
    settings = {
        "zero_stage": 3,
        "offload_optimizer_device": "nvme",
        "offload_optimizer_nvme_path": "/fast/optimizer",
        "offload_param_device": "nvme",
        "offload_param_nvme_path": "/fast/param",
    }
    if ds_config is not None:
        del settings["zero_stage"]
    yaml = "deepspeed_config:\n" + "".join(f"  {name}: {value}\n" for name, value in settings.items())
    said = {"flags": settings} if said_by == "flags" else {"yaml": yaml}
    resolved = resolved_of(ds_config=ds_config, **said)
    assert offloads_in(resolved) == (
        {"device": "nvme", "nvme_path": "/fast/optimizer"},
        {"device": "nvme", "nvme_path": "/fast/param"},
    )
    assert not any("no directory is given" in text for text in resolved.warnings)


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_a_path_that_is_none_is_no_folder_of_that_name(word):
    yaml = f"deepspeed_config:\n  offload_optimizer_device: nvme\n  offload_optimizer_nvme_path: {word}\n"
    resolved = resolved_of(yaml)
    assert offloads_in(resolved)[0] == {"device": "nvme", "nvme_path": None}
    (warning,) = [text for text in resolved.warnings if "no directory is given" in text]
    assert f'offload_optimizer_device is "nvme" ({YAML_NAME}, line 2)' in warning


def test_a_path_that_is_none_does_not_contradict_the_json():
    """Accelerate's own files hold `offload_param_nvme_path: none` whether or not anybody chose it."""
    ds_config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/fast"}}}
    resolved = resolved_of("deepspeed_config:\n  offload_param_nvme_path: none\n", ds_config)
    assert resolved["offload_param_nvme_path"] == "/fast"
    assert offloads_in_json(resolved) == {"device": "nvme", "nvme_path": "/fast"}


def offloads_in_json(resolved):
    return resolved.ds_config["zero_optimization"]["offload_param"]


@pytest.mark.parametrize("device", ["none", None])
def test_no_device_in_two_spellings_is_no_contradiction(device):
    ds_config = {"zero_optimization": {"stage": 3, "offload_param": {"device": device}}}
    resolved = resolved_of("deepspeed_config:\n  offload_param_device: none\n", ds_config)
    assert offloads_in_json(resolved) == {"device": device}
    assert len(warnings_about(resolved, "said twice")) == 1


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {"flags": {"zero_stage": 2}},
        {"flags": {"zero_stage": 2, "gradient_clipping": None}},
        {"flags": {"zero_stage": 2, "gradient_clipping": 0}},
        {"yaml": "distributed_type: DEEPSPEED\n"},
        {"yaml": "distributed_type: DEEPSPEED\ndeepspeed_config:\n  gradient_clipping: null\n"},
        {"yaml": "distributed_type: DEEPSPEED\ndeepspeed_config:\n  gradient_clipping: 0.0\n"},
    ],
    ids=str,
)
def test_no_to_clipping_is_no_clipping(said):
    """Not "auto", which somebody later would fill with a norm that nobody chose."""
    assert resolved_of(**said).ds_config["gradient_clipping"] == 0.0


def test_no_to_clipping_fills_an_auto_of_the_json():
    yaml = "deepspeed_config:\n  gradient_clipping: null\n"
    resolved = resolved_of(yaml, ZERO | {"gradient_clipping": "auto"})
    assert resolved.ds_config["gradient_clipping"] == 0.0
    assert resolved.origins["gradient_clipping",].place == f"{YAML_NAME}, line 2"
    assert resolved_of(None, ZERO | {"gradient_clipping": "auto"}).ds_config["gradient_clipping"] == "auto"


def test_no_to_clipping_beside_a_json_that_clips_is_an_error():
    yaml = "deepspeed_config:\n  gradient_clipping: null\n"
    assert f"gradient_clipping: 0.0 ({YAML_NAME}, line 2) but 1.0 ({JSON_NAME}" in error_of(
        yaml, ZERO | {"gradient_clipping": 1.0}
    )
    resolved = resolved_of(yaml, ZERO | {"gradient_clipping": 0})
    assert len(warnings_about(resolved, "said twice")) == 1


def test_a_json_without_gradient_clipping_does_not_clip():
    resolved = resolved_of(None, ZERO)
    assert "gradient_clipping" not in resolved.ds_config
    assert resolved["gradient_clipping"] == 0.0
    assert resolved.values["gradient_clipping"].origin is Origin.DEFAULT
    assert load_config(resolved.ds_config).gradient_clipping == 0.0


def test_clipping_that_is_asked_for_clips():
    assert resolved_of(flags={"zero_stage": 1, "gradient_clipping": 0.5}).ds_config["gradient_clipping"] == 0.5


# --- accumulation -----------------------------------------------------------------------------------------------------


def test_null_accumulation_steps_leave_the_json_its_word():
    yaml = "deepspeed_config:\n  gradient_accumulation_steps: null\n"
    resolved = resolved_of(yaml, ZERO | {"gradient_accumulation_steps": 10})
    assert resolved.ds_config["gradient_accumulation_steps"] == resolved["gradient_accumulation_steps"] == 10
    assert resolved.warnings == ()
    left = resolved_of(yaml, ZERO | {"gradient_accumulation_steps": "auto"})
    assert left.ds_config["gradient_accumulation_steps"] == "auto"


# --- contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "held"),
    [
        ("zero_stage", 2, ZERO),
        ("gradient_clipping", 0.5, ZERO | {"gradient_clipping": 1.0}),
        ("gradient_accumulation_steps", 2, ZERO | {"gradient_accumulation_steps": 4}),
        ("offload_param_device", "cpu", {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}),
        ("mixed_precision", "fp16", ZERO | {"bf16": {"enabled": True}}),
        ("mixed_precision", "fp16", ZERO | {"fp16": {"enabled": False}}),
        ("mixed_precision", "bf16", ZERO | {"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}),
    ],
    ids=lambda value: json.dumps(value),
)
def test_a_flag_that_contradicts_the_json_is_an_error(flag, value, held):
    text = error_of(ds_config=held, flags={flag: value})
    assert f"{flag}: {json.dumps(value)} (--{flag}) but " in text
    assert f"({JSON_NAME}, line " in text
    assert "To mend it, leave them out beside the JSON." in text
    assert "config update" not in text, "there is no file to mend"


def test_a_flag_that_agrees_with_the_yaml_but_not_with_the_json_names_all_three():
    text = error_of("deepspeed_config:\n  zero_stage: 2\n", ZERO, {"zero_stage": 2})
    assert f"zero_stage: 2 (--zero_stage) but 3 ({JSON_NAME}, line 3)" in text
    assert f"zero_stage: 2 ({YAML_NAME}, line 2) but 3 ({JSON_NAME}, line 3)" in text
    assert f"shardwise config update --config_file {YAML_NAME}" in text


# --- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_mixed_precision_beside_a_json_that_agrees_is_one_warning(dtype):
    ds_config = ZERO | {dtype: {"enabled": True}}
    resolved = resolved_of(f"mixed_precision: {dtype}\n", ds_config, {"mixed_precision": dtype})
    (warning,) = resolved.warnings
    assert f'"{dtype}" ({YAML_NAME}, line 1) and "{dtype}" ({JSON_NAME}' in warning
    assert f'"{dtype}" (--mixed_precision) and "{dtype}" ({JSON_NAME}' in warning
    assert resolved["mixed_precision"] == dtype


def test_mixed_precision_no_in_a_file_gives_way_to_the_json():
    resolved = resolved_of("use_cpu: no\nmixed_precision: no\n", ZERO | {"bf16": {"enabled": True}})
    (warning,) = resolved.warnings
    assert f'mixed_precision: "no" ({YAML_NAME}, line 2) gives way to "bf16" ({JSON_NAME}, line ' in warning
    assert resolved["mixed_precision"] == "bf16"
    assert resolved.ds_config["bf16"] == {"enabled": True}
    assert resolved.ds_config["fp16"] == {"enabled": False}


@pytest.mark.parametrize("said", [{"flags": {"mixed_precision": "no"}}, {"code": {"mixed_precision": "no"}}], ids=str)
def test_mixed_precision_no_that_somebody_typed_is_an_error(said):
    text = error_of(ds_config=ZERO | {"bf16": {"enabled": True}}, **said)
    assert 'mixed_precision: "no" (' in text
    assert f'but "bf16" ({JSON_NAME}, line ' in text


def test_the_old_fp16_switch_is_mixed_precision():
    resolved = resolved_of("distributed_type: DEEPSPEED\nfp16: true\n")
    assert resolved["mixed_precision"] == "fp16"
    assert resolved.values["mixed_precision"].place == f"{YAML_NAME}, line 2"
    assert resolved.ds_config["fp16"]["enabled"] is True
    assert resolved_of("fp16: false\n")["mixed_precision"] == "no"
    assert resolved_of("fp16: true\nmixed_precision: fp16\n")["mixed_precision"] == "fp16"
    assert 'line 1, fp16: found true, and mixed_precision is "bf16"' in error_of("fp16: yes\nmixed_precision: bf16\n")


# --- what asks for ZeRO -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("yaml", [None, "distributed_type: MULTI_GPU\n", "distributed_type: NO\n"])
def test_a_zero_stage_flag_makes_a_zero_run(yaml):
    """No other flag has to say that ZeRO is meant."""
    resolved = resolved_of(yaml, flags={"zero_stage": 1})
    assert resolved.ds_config["zero_optimization"]["stage"] == 1


def test_accumulation_and_clipping_alone_are_no_zero_run():
    flags = {"gradient_accumulation_steps": 4, "gradient_clipping": 1.0}
    resolved = resolved_of(flags=flags)
    assert resolved.ds_config is None
    assert {name: resolved[name] for name in flags} == flags
    assert resolved_of().ds_config is None


def test_zero_settings_that_a_yaml_leaves_unread_are_an_error():
    text = error_of("distributed_type: MULTI_GPU\ndeepspeed_config:\n  zero_stage: 2\n")
    assert "line 2, deepspeed_config: holds zero_stage, which distributed_type: MULTI_GPU leaves unread" in text
    assert resolved_of("distributed_type: MULTI_GPU\ndeepspeed_config: {}\n").ds_config is None


def test_a_json_without_a_stage_is_an_error_that_says_so():
    text = error_of(ds_config={"train_batch_size": 8})
    assert f"{JSON_NAME} has no zero_optimization, so the ZeRO stage is unknown" in text
    assert resolved_of(ds_config={"train_batch_size": 8}, flags={"zero_stage": 1})["zero_stage"] == 1


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("ds_config", [None, ZERO], ids=["settings alone", "beside a JSON"])
def test_zero3_init_flag_is_carried_as_said(said, ds_config):
    flags = {} if said is None else {"zero3_init_flag": "true" if said else "false"}
    resolved = resolved_of("distributed_type: DEEPSPEED\n", ds_config, flags)
    assert resolved["zero3_init_flag"] is said
    assert resolved.values["zero3_init_flag"].origin is (Origin.DEFAULT if said is None else Origin.FLAG)


# --- machines ---------------------------------------------------------------------------------------------------------


def test_a_flag_and_the_yaml_share_out_the_machines():
    resolved = resolved_of("num_machines: 2\nnum_processes: 4\n", flags={"machine_rank": 1})
    assert (resolved["num_machines"], resolved["machine_rank"]) == (2, 1)
    assert resolved_of("machine_rank: 1\n", flags={"num_machines": 2})["machine_rank"] == 1


def test_machines_that_do_not_fit_are_an_error_with_their_places():
    text = error_of("use_cpu: no\nnum_machines: 2\n", flags={"num_processes": 3})
    assert (
        f"num_processes is 3 (--num_processes), expected a multiple of num_machines, which is 2 ({YAML_NAME}," in text
    )
    text = error_of("num_machines: 2\nnum_processes: 3\n", flags={"machine_rank": 2})
    assert "machine_rank is 2 (--machine_rank), expected less than num_machines" in text
    assert len(text.splitlines()) == 2, "both at once"
    assert "machine_rank is 1 (--machine_rank), expected less than num_machines, which is 1 (default)" in error_of(
        flags={"machine_rank": 1}
    )


# --- where files lie --------------------------------------------------------------------------------------------------


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """Places of default files that hold nothing yet."""
    monkeypatch.chdir(tmp_path)
    ours = tmp_path / "config" / "shardwise" / "default_config.yaml"
    accelerates = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    for path in (ours, accelerates):
        path.parent.mkdir(parents=True)
    environ = {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    return ours, accelerates, environ


def test_accelerates_default_file_is_read_where_ours_is_absent(homes):
    ours, accelerates, environ = homes
    assert gather({}, None, environ) == (gather({}, None, {"HOME": "/nowhere"})[0], ())
    accelerates.write_text("num_processes: 3\n")
    asked, notes = gather({}, None, environ)
    assert asked.said("num_processes").place == f"{accelerates}, line 1"
    (note,) = notes
    assert str(accelerates) in note
    ours.write_text("num_processes: 5\n")
    asked, notes = gather({}, None, environ)
    assert (asked.said("num_processes").value, asked.file, notes) == (5, str(ours), ())
    named = ours.parent / "other.yaml"
    named.write_text("num_processes: 7\n")
    assert gather({}, named, environ)[0].said("num_processes").value == 7


def test_a_broken_default_file_of_accelerate_is_left_aside_but_ours_is_not(homes):
    ours, accelerates, environ = homes
    accelerates.write_text("num_proceses: 3\n")
    asked, (note,) = gather({"num_processes": 2}, None, environ)
    assert resolve(asked)["num_processes"] == 2
    assert "is left aside" in note and 'Did you mean "num_processes"?' in note
    ours.write_text("num_proceses: 3\n")
    with pytest.raises(ConfigError, match="num_proceses"):
        gather({}, None, environ)


def test_a_json_is_looked_for_here_and_beside_the_yaml_that_names_it(homes, tmp_path):
    ours, _, environ = homes
    ours.write_text("deepspeed_config:\n  deepspeed_config_file: ds.json\n")
    with pytest.raises(ConfigError) as caught:
        gather({}, None, environ)
    assert f"there is no file {tmp_path / 'ds.json'} nor {ours.parent / 'ds.json'}" in str(caught.value)
    (ours.parent / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert resolve(gather({}, None, environ)[0])["zero_stage"] == 1
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert resolve(gather({}, None, environ)[0])["zero_stage"] == 3
    (tmp_path / "ds.json").unlink()
    with pytest.raises(ConfigError, match="there is no file"):
        gather({"deepspeed_config_file": "ds.json"}, None, environ)  # a flag is not beside the YAML


@pytest.mark.parametrize("name", ["", ".", "x" * 300, "a\0b", "~nobody-of-this-name/ds.json", "missing/ds.json"])
def test_a_json_that_cannot_be_there_is_an_error(homes, name):
    with pytest.raises(ConfigError, match="deepspeed_config_file"):
        gather({"deepspeed_config_file": name}, None, homes[2])


def test_a_json_that_is_no_file_of_text_is_an_error(homes, tmp_path):
    _, _, environ = homes
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not UTF-8"):
        gather({"deepspeed_config_file": "ds.json"}, None, environ)
    (tmp_path / "ds.json").write_text("zero_optimization: 3")
    with pytest.raises(ConfigError, match=r"ds\.json is not JSON: line 1, column 1"):
        gather({"deepspeed_config_file": "ds.json"}, None, environ)
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as endpoint, pytest.raises(ConfigError, match="there is no file"):
        endpoint.bind("socket")
        gather({"deepspeed_config_file": "socket"}, None, environ)
    with pytest.raises(ConfigError, match="there is no file"):
        gather({"deepspeed_config_file": "pipe"}, None, environ)
