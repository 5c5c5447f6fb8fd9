"""The fear: a mended config file that means something else, or that is mended again and again."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwise.config.run.gather import gather
from shardwise.config.run.precedence import resolve
from shardwise.errors import ConfigError
from shardwise.questionnaire.run_file import as_text
from shardwise.questionnaire.update import updated

# A file that people wrote by hand beside a JSON; both say the same settings.
BY_HAND = """
command_file: null
commands: null
compute_environment: LOCAL_MACHINE
deepspeed_config:
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
  offload_optimizer_device: 'cpu'
  offload_param_device: 'cpu'
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
  deepspeed_config_file: 'ds_config.json'
distributed_type: DEEPSPEED
downcast_bf16: 'no'
dynamo_backend: 'NO'
fsdp_config: {}
gpu_ids: null
machine_rank: 0
main_process_ip: null
main_process_port: null
main_training_function: main
megatron_lm_config: {}
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_name: null
tpu_zone: null
use_cpu: false
"""
JSON = """{
    "bf16": {"enabled": true},
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": false,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"}
    },
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 10
}"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("ds_config.json").write_text(JSON)
    return tmp_path


def written(text: str, name: str = "run.yaml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def mended(path: Path) -> dict[str, Any]:
    """The file after its update, which a second update leaves alone."""
    update = updated(path)
    path.write_text(as_text(update.run, path))
    assert updated(path).changes == ()
    return yaml.safe_load(path.read_text())


def launched(path: Path) -> Any:
    asked, _ = gather({}, path, {"HOME": str(path.parent)})
    return resolve(asked)


def test_a_file_that_contradicts_its_json_launches_after_the_update(folder: Path) -> None:
    path = written(BY_HAND)
    with pytest.raises(ConfigError, match="shardwise config update"):
        launched(path)
    assert mended(path) == {
        "compute_environment": "LOCAL_MACHINE",
        "deepspeed_config": {"deepspeed_config_file": "ds_config.json", "zero3_init_flag": True},
        "distributed_type": "DEEPSPEED",
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "num_machines": 1,
        "num_processes": 2,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    resolved = launched(path)
    assert resolved["gradient_accumulation_steps"] == 10  # the JSON's
    assert resolved["offload_optimizer_device"] == "none"
    assert resolved["mixed_precision"] == "bf16"


def test_what_the_json_leaves_open_stays(folder: Path) -> None:
    opened = JSON.replace('"gradient_accumulation_steps": 10', '"gradient_accumulation_steps": "auto"')
    Path("ds_config.json").write_text(opened.replace('"offload_optimizer": {"device": "none"},', ""))
    section = mended(written(BY_HAND))["deepspeed_config"]
    assert section["gradient_accumulation_steps"] == 1
    assert section["offload_optimizer_device"] == "cpu"
    assert "zero_stage" not in section


@pytest.mark.parametrize(
    ("json", "before", "after"),
    [
        ('"bf16": {"enabled": true}', "fp16", None),
        ('"bf16": {"enabled": true}', "bf16", None),
        ('"bf16": {"enabled": true}', "no", None),
        ('"bf16": {"enabled": "auto"}', "bf16", "bf16"),
        ('"fp16": {"enabled": false}', "bf16", "bf16"),
        ('"fp16": {"enabled": false}', "fp16", None),
    ],
)
def test_the_precision_is_one_setting_with_the_json(folder: Path, json: str, before: str, after: str | None) -> None:
    Path("ds_config.json").write_text(JSON.replace('"bf16": {"enabled": true}', json))
    path = written(
        f"distributed_type: DEEPSPEED\nmixed_precision: '{before}'\n"
        "deepspeed_config:\n  deepspeed_config_file: ds_config.json\n"
    )
    assert mended(path).get("mixed_precision") == after
    launched(path)


def test_a_json_beside_the_file_is_found_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text(JSON)
    path = tmp_path / "run.yaml"
    path.write_text(BY_HAND)
    assert list(mended(path)["deepspeed_config"]) == ["deepspeed_config_file", "zero3_init_flag"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fp16: true", {"mixed_precision": "fp16"}),
        ("fp16: false", {}),
        ("fp16: true\nmixed_precision: fp16", {"mixed_precision": "fp16"}),
        ("dynamo_backend: 'NO'\nfsdp_config: {}", {}),
        (
            "deepspeed_config:\n  zero_stage: 3",
            {"deepspeed_config": {"zero_stage": 3}, "distributed_type": "DEEPSPEED"},
        ),
        # Null is "no clipping" where a JSON says "auto", so it is no empty word.
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  gradient_clipping: null",
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_clipping": None}},
        ),
    ],
)
def test_old_forms_become_present_ones_with_the_same_meaning(folder: Path, old: str, new: dict[str, Any]) -> None:
    path = written(old)
    before = launched(path)
    assert mended(path) == new
    after = launched(path)
    assert after.ds_config == before.ds_config
    assert after["mixed_precision"] == before["mixed_precision"]


def test_a_file_in_the_present_form_is_left_alone_with_its_comments(folder: Path) -> None:
    text = "# mine\ndistributed_type: MULTI_CPU\nnum_processes: 2  # cores\n"
    assert updated(written(text)).changes == ()


def test_a_file_with_faults_is_not_mended_over_them(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 2, deepspeed_config\.zero_stag: unknown key"):
        updated(written("deepspeed_config:\n  zero_stag: 3\n"))
