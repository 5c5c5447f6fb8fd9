"""A script's DeepSpeedPlugin and the state of the run tell one story, whatever was said where."""

import base64
import json
import logging
import subprocess
import sys

import pytest
import torch

from shardwise.config.run.handover import pack
from shardwise.errors import ConfigError, StateError
from shardwise.launch.environment import RUN_VARIABLE
from shardwise.plugin import DeepSpeedPlugin, HfDeepSpeedConfig
from shardwise.state import AcceleratorState, get_active_deepspeed_plugin
from tests.accelerators import accelerator_of, fresh_state
from tests.facts.runs import asked_of

STAGE_2 = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}


@pytest.fixture(autouse=True)
def _fresh():
    with fresh_state():
        yield


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Hands over what a launcher was asked."""

    def hand_over(**asked):
        path = tmp_path / "asked.json"
        path.write_text(pack(asked_of(**asked)))
        monkeypatch.setenv(RUN_VARIABLE, str(path))

    return hand_over


# --- the plugin -------------------------------------------------------------------------------------------------------


def test_the_fields_of_a_plugin_are_those_of_the_guide():
    plugin = DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=2, offload_param_device="cpu")
    assert (plugin.zero_stage, plugin.gradient_accumulation_steps, plugin.offload_param_device) == (3, 2, "cpu")
    assert (plugin.gradient_clipping, plugin.offload_optimizer_device) == (None, "none")
    assert (plugin.zero3_save_16bit_model, plugin.deepspeed_multinode_launcher) == (False, None)
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 3
    with pytest.raises(AttributeError):
        _ = plugin.no_such_field


def test_all_faults_of_a_plugin_come_at_once():
    with pytest.raises(ConfigError) as caught:
        DeepSpeedPlugin(zero_stage=7, offload_param_device="disk", gradient_clipping=-1.0)
    for name in ("zero_stage", "offload_param_device", "gradient_clipping"):
        assert f"DeepSpeedPlugin({name}=...)" in str(caught.value)
    with pytest.raises(ConfigError, match="zero_stag"):
        DeepSpeedPlugin(zero_stag=2)


@pytest.mark.parametrize("form", ["dict", "path", "text", "base64", "object"])
def test_a_plugin_takes_a_json_in_every_form(form, tmp_path):
    text = json.dumps(STAGE_2)
    (tmp_path / "ds.json").write_text(text)
    source = {
        "dict": STAGE_2,
        "path": str(tmp_path / "ds.json"),
        "text": text,
        "base64": base64.urlsafe_b64encode(text.encode()).decode(),
        "object": HfDeepSpeedConfig(STAGE_2),
    }[form]
    plugin = DeepSpeedPlugin(hf_ds_config=source)
    assert plugin.zero_stage == 2 and plugin.is_auto("gradient_clipping")


def test_a_script_may_change_the_json_and_a_later_precision_keeps_the_change():
    plugin = DeepSpeedPlugin(hf_ds_config=STAGE_2)
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 4
    plugin.set_mixed_precision("bf16")
    assert plugin.deepspeed_config is config
    assert config["train_micro_batch_size_per_gpu"] == 4 and config["bf16"] == {"enabled": True}
    assert plugin.resolved.origins["train_micro_batch_size_per_gpu",].place == "the script changed deepspeed_config"


def test_the_scripts_word_is_stronger_than_the_yaml_but_a_flag_is_never_dropped(launched):
    launched(yaml="distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}")
    assert DeepSpeedPlugin(zero_stage=3).zero_stage == 3
    launched(flags={"zero_stage": 1})
    with pytest.raises(
        ConfigError, match=r"zero_stage: 1 \(--zero_stage\) but 3 \(DeepSpeedPlugin\(zero_stage=...\)\)"
    ):
        DeepSpeedPlugin(zero_stage=3)
    assert DeepSpeedPlugin(zero_stage=1).zero_stage == 1


def test_another_json_than_the_one_somebody_typed_is_an_error(launched, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(STAGE_2))
    launched(flags={"deepspeed_config_file": str(tmp_path / "ds.json")}, ds_config=STAGE_2)
    with pytest.raises(ConfigError, match="another DeepSpeed JSON"):
        DeepSpeedPlugin(hf_ds_config=STAGE_2)
    assert DeepSpeedPlugin(hf_ds_config=str(tmp_path / "ds.json")).zero_stage == 2


def test_zero3_init_flag_false_means_no_sharded_construction():
    assert DeepSpeedPlugin(zero_stage=3).is_zero3_init_enabled() is True
    plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=False)
    assert plugin.is_zero3_init_enabled() is False
    assert DeepSpeedPlugin(zero_stage=2, zero3_init_flag=True).is_zero3_init_enabled() is False
    with accelerator_of(None, deepspeed_plugin=plugin):
        assert torch.nn.Linear(3, 5).weight.shape == (5, 3)


def test_the_questions_that_scripts_ask_of_a_json():
    config = HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "dump_state": False}
    )
    assert config.is_zero3() and not config.is_zero2() and config.is_offload()
    assert config.is_false("dump_state") and not config.is_true("dump_state") and not config.is_false("absent")
    assert config.get_value("zero_optimization.offload_param.device") == "cpu"
    assert config.get_value("absent.key", 7) == 7
    config.del_config_sub_tree("zero_optimization.offload_param")
    assert not config.is_offload()
    with pytest.raises(ConfigError, match="absent"):
        config.del_config_sub_tree("zero_optimization.absent", must_exist=True)


# --- the state --------------------------------------------------------------------------------------------------------


def test_the_state_prints_a_run_without_zero():
    with accelerator_of():
        text = str(AcceleratorState())
        assert text.splitlines() == [
            "Distributed environment: NO",
            "Num processes: 1",
            "Process index: 0",
            "Local process index: 0",
            "Device: cpu",
            "Mixed precision type: no",
        ]
        assert AcceleratorState().deepspeed_plugin is None
        with pytest.raises(ConfigError, match="no deepspeed_plugin"):
            get_active_deepspeed_plugin(AcceleratorState())


def test_the_state_prints_the_json_of_a_run_with_zero():
    with accelerator_of(STAGE_2, mixed_precision="fp16") as accelerator:
        lines = str(AcceleratorState()).splitlines()
        assert lines[0] == "Distributed environment: DEEPSPEED" and lines[5] == "Mixed precision type: fp16"
        assert lines[6].startswith("ds_config: {'zero_optimization': {'stage': 2}, 'gradient_clipping': 'auto'")
        assert accelerator.distributed_type == "DEEPSPEED"
        assert get_active_deepspeed_plugin(accelerator.state) is accelerator.deepspeed_plugin


def test_the_json_has_the_word_on_precision():
    with accelerator_of({**STAGE_2, "bf16": {"enabled": True}}) as accelerator:
        assert accelerator.mixed_precision == "bf16"
    with (
        pytest.raises(ConfigError, match=r"mixed_precision.*fp16.*bf16"),
        accelerator_of({**STAGE_2, "bf16": {"enabled": True}}, mixed_precision="fp16"),
    ):
        pass


def test_several_plugins_are_selected_by_name():
    plugins = {name: DeepSpeedPlugin(zero_stage=stage) for name, stage in (("student", 2), ("teacher", 3))}
    with accelerator_of(None, deepspeed_plugins=plugins) as accelerator:
        assert accelerator.deepspeed_plugin is plugins["student"]
        accelerator.state.select_deepspeed_plugin("teacher")
        assert accelerator.deepspeed_plugin is plugins["teacher"]
        with pytest.raises(ConfigError, match=r"'pupil'.*student, teacher"):
            accelerator.state.select_deepspeed_plugin("pupil")


def test_a_later_accelerator_may_not_ask_for_something_else():
    with accelerator_of(STAGE_2):
        from shardwise.accelerator import Accelerator

        assert Accelerator().deepspeed_plugin is not None
        with pytest.raises(ConfigError, match="first Accelerator"):
            Accelerator(mixed_precision="bf16")
        with pytest.raises(ConfigError, match="has its plugins already"):
            Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=1))


def test_a_state_that_was_forgotten_says_so():
    with accelerator_of():
        state = AcceleratorState()
    with pytest.raises(StateError, match="reset"):
        _ = state.num_processes


def test_what_the_launcher_has_said_is_not_said_again(launched, caplog):
    idle = {**STAGE_2, "zero_allow_untested_optimizer": True}
    with caplog.at_level(logging.WARNING, logger="shardwise"):
        with accelerator_of(idle):
            pass
        assert sum("zero_allow_untested_optimizer" in record.getMessage() for record in caplog.records) == 1
        caplog.clear()
        launched(flags={"deepspeed_config_file": "ds.json"}, ds_config=idle)
        with accelerator_of():
            assert AcceleratorState().deepspeed_plugin is not None
        assert caplog.records == []


def test_no_run_needs_transformers_unless_it_uses_it():
    code = """
import sys
sys.modules["transformers"] = None  # importing it would raise
import torch
from shardwise import Accelerator, DeepSpeedPlugin
accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
model = torch.nn.Linear(3, 5)
loader = torch.utils.data.DataLoader(torch.randn(4, 3), batch_size=2)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
for batch in loader:
    accelerator.backward(model(batch).sum())
    optimizer.step()
print("trained")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "trained\n", done.stderr
