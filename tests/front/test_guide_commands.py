"""The commands of the guide to DeepSpeed in Accelerate, with a small script, print what the guide shows."""

import ast
import shutil
from pathlib import Path

import pytest

from tests.front.command import FIXTURES, shardwise

GUIDE = Path(__file__).parents[1] / "facts" / "guide"
SCRIPT = str(FIXTURES / "print_state.py")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A working directory with the guide's files, each under the name that the guide uses."""
    for path in GUIDE.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def launch(directory: Path, *arguments: str, **extra: str) -> tuple[int, list[str], str]:
    done = shardwise("launch", *arguments, temporary=directory, cwd=directory, **extra)
    return done.returncode, done.stdout.splitlines(), done.stderr


def ds_config_of(lines: list[str]) -> dict[str, object]:
    (line,) = [line for line in lines if line.startswith("ds_config: ")]
    text = line.removeprefix("ds_config: ").replace("inf", "1e999")
    config: dict[str, object] = ast.literal_eval(text)
    return config


def test_scenario_1_is_an_error_before_any_process_starts(directory: Path) -> None:
    shutil.copy(GUIDE / "scenario1" / "ds_config.json", directory)
    default = directory / "config" / "shardwise" / "default_config.yaml"
    default.parent.mkdir(parents=True)
    shutil.copy(GUIDE / "scenario1" / "default_config.yaml", default)
    place = {"XDG_CONFIG_HOME": str(directory / "config")}
    status, lines, errors = launch(directory, SCRIPT, **place)
    assert status == 2 and lines == []
    for told in (
        f"gradient_accumulation_steps: 1 ({default}, line 5) but 10 (ds_config.json, line 18)",
        f'offload_optimizer_device: "cpu" ({default}, line 7) but "none" (ds_config.json, line 9)',
        f"gradient_clipping: 1.0 ({default}, line 6) and 1.0 (ds_config.json, line 15)",
        f"shardwise config update --config_file {default}",
    ):
        assert told in errors

    mended = shardwise("config", "update", "--config_file", str(default), temporary=directory, cwd=directory)
    assert mended.returncode == 0, mended.stderr
    status, lines, errors = launch(directory, SCRIPT, **place)
    assert status == 0, errors
    assert ds_config_of(lines)["gradient_accumulation_steps"] == 10


def test_scenario_2_prints_the_state_of_the_guide(directory: Path) -> None:
    shutil.copytree(GUIDE / "scenario2", directory, dirs_exist_ok=True)
    status, lines, errors = launch(directory, "--config_file", "ds_config_sample.yaml", SCRIPT)
    assert status == 0, errors
    assert lines[:7] == [
        "Distributed environment: DEEPSPEED  Backend: gloo",
        "Num processes: 4",
        "Process index: 0",
        "Local process index: 0",
        "Device: cpu",
        "Mixed precision type: bf16",
        "ds_config: {'bf16': {'enabled': True}, 'zero_optimization': {'stage': 3, "
        "'stage3_gather_16bit_weights_on_model_save': False, 'offload_optimizer': {'device': 'none'}, "
        "'offload_param': {'device': 'none'}}, 'gradient_clipping': 1.0, 'train_batch_size': 'auto', "
        "'train_micro_batch_size_per_gpu': 'auto', 'gradient_accumulation_steps': 10, 'steps_per_print': inf, "
        "'fp16': {'enabled': False}}",
    ]


def test_scenario_3_fills_auto_from_flags(directory: Path) -> None:
    shutil.copytree(GUIDE / "scenario3", directory, dirs_exist_ok=True)
    status, lines, errors = launch(
        directory,
        "--mixed_precision=fp16",
        "--zero_stage=3",
        "--gradient_accumulation_steps=5",
        "--gradient_clipping=1.0",
        "--offload_param_device=cpu",
        "--offload_optimizer_device=nvme",
        "--zero3_save_16bit_model=true",
        "--deepspeed_config_file=ds_config.json",
        "--num_processes=2",
        SCRIPT,
    )
    assert status == 0, errors
    assert "Mixed precision type: fp16" in lines
    assert lines[6] == (
        "ds_config: {'bf16': {'enabled': False}, 'zero_optimization': {'stage': 3, "
        "'stage3_gather_16bit_weights_on_model_save': True, 'offload_optimizer': {'device': 'nvme'}, "
        "'offload_param': {'device': 'cpu'}}, 'gradient_clipping': 1.0, 'train_batch_size': 'auto', "
        "'train_micro_batch_size_per_gpu': 'auto', 'gradient_accumulation_steps': 5, 'steps_per_print': inf, "
        "'fp16': {'enabled': True, 'auto_cast': True}}"
    )


@pytest.mark.parametrize(
    ("name", "stage"), [pytest.param("plugin_zero2.yaml", 2, marks=pytest.mark.slow), ("plugin_zero3_offload.yaml", 3)]
)
def test_the_plugin_examples_start(directory: Path, name: str, stage: int) -> None:
    # What stands behind the script is the script's own, also where the launcher has a flag of that name.
    status, lines, errors = launch(directory, "--config_file", name, SCRIPT, "--mixed_precision", "fp16")
    assert status == 0, errors
    config = ds_config_of(lines)
    assert isinstance(config["zero_optimization"], dict) and config["zero_optimization"]["stage"] == stage
    assert config["gradient_clipping"] == 1.0 and "Mixed precision type: fp16" in lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["file_zero2.yaml", "file_zero3_offload.yaml"])
def test_the_config_file_examples_start(directory: Path, name: str) -> None:
    text = (directory / name).read_text()
    # The guide's path is that of its author's home.
    text = text.replace("/home/ubuntu/accelerate/examples/configs/deepspeed_config_templates/", "")
    (directory / name).write_text(text)
    status, lines, errors = launch(directory, "--config_file", name, SCRIPT, "--output_dir", "./clm", "--with_tracking")
    assert status == 0, errors
    config = ds_config_of(lines)
    assert config["gradient_clipping"] == "auto" and config["steps_per_print"] == float("inf")
    assert "said twice, and agrees: mixed_precision" in errors and errors.count("said twice") == 1
