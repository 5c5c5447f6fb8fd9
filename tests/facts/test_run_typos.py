"""A mistyped key names the one that was meant, and all faults of one file come at once, each with its line."""

import pytest

from shardwise.config.run.file import checked_run, flag_mentions
from shardwise.config.run.yaml_text import parse_yaml
from shardwise.errors import ConfigError
from tests.facts.runs import JSON_NAME, YAML_NAME, error_of

TOP = {
    "num_proceses": "num_processes",
    "num_machine": "num_machines",
    "machine-rank": "machine_rank",
    "main_proces_ip": "main_process_ip",
    "main_port": "main_process_port",
    "mixed_precison": "mixed_precision",
    "distributed_typ": "distributed_type",
    "rdzv_backed": "rdzv_backend",
    "Use_CPU": "use_cpu",
    "deepspeed_confg": "deepspeed_config",
    "gpu_id": "gpu_ids",
}
SECTION = {
    "zero_stag": "zero_stage",
    "gradient_accumulation_step": "gradient_accumulation_steps",
    "gradient_cliping": "gradient_clipping",
    "offload_optimizer": "offload_optimizer_device",
    "offload_optimiser_device": "offload_optimizer_device",
    "offload_param_nvmepath": "offload_param_nvme_path",
    "zero3_init": "zero3_init_flag",
    "zero3_save_16bit": "zero3_save_16bit_model",
    "deepspeed_config_fil": "deepspeed_config_file",
    "deepspeed_moe_layer_names": "deepspeed_moe_layer_cls_names",
    "deepspeed_multinode_launch": "deepspeed_multinode_launcher",
}
JSON = {
    "train_batchsize": "train_batch_size",
    "train_micro_batch_size_per_cpu": "train_micro_batch_size_per_gpu",
    "gradient_acumulation_steps": "gradient_accumulation_steps",
    "zero_optimisation": "zero_optimization",
    "bf_16": "bf16",
    "steps_per_prin": "steps_per_print",
}
IN_ZERO = {
    "stages": "stage",
    "offload_params": "offload_param",
    "reduce_bucketsize": "reduce_bucket_size",
    "stage3_gather_16bit_weights_on_save": "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_params": "stage3_max_live_parameters",
}


@pytest.mark.parametrize("name", TOP)
def test_a_typo_at_the_top_level(name):
    text = error_of(f"use_cpu: no\n{name}: 2\n")
    assert text == f'{YAML_NAME} has 1 fault:\n  line 2, {name}: unknown key. Did you mean "{TOP[name]}"?'


@pytest.mark.parametrize("name", SECTION)
def test_a_typo_inside_deepspeed_config(name):
    text = error_of(f"deepspeed_config:\n  {name}: 2\n")
    row = f'line 2, deepspeed_config.{name}: unknown key. Did you mean "{SECTION[name]}"?'
    assert text == f"{YAML_NAME} has 1 fault:\n  {row}"


@pytest.mark.parametrize(
    ("name", "meant"), [*JSON.items(), *((f"zero_optimization.{a}", b) for a, b in IN_ZERO.items())]
)
def test_a_typo_in_the_json(name, meant):
    """Known before any process starts, and whether or not anybody would read the key."""
    block, _, key = name.rpartition(".")
    data = {"zero_optimization": {"stage": 1}}
    (data[block] if block else data)[key] = 2
    text = error_of(ds_config=data)
    line = 4 if block else 5
    assert text == f'{JSON_NAME} has 1 fault:\n  line {line}, {name}: unknown key. Did you mean "{meant}"?'


@pytest.mark.parametrize("name", ["zero_stage", "gradient_clipping", "deepspeed_config_file", "zero3_init_flag"])
def test_a_setting_of_the_section_at_the_top_level_is_told_its_place(name):
    assert f"line 1, {name}: unknown key here. It belongs in deepspeed_config; move it there." in error_of(
        f"{name}: 2\n"
    )


@pytest.mark.parametrize("name", ["mixed_precision", "num_processes", "gpu_ids"])
def test_a_setting_of_the_top_level_in_the_section_is_told_its_place(name):
    text = error_of(f"deepspeed_config:\n  {name}: 2\n")
    assert f"line 2, deepspeed_config.{name}: unknown key here. It belongs in the top level; move it there." in text


def test_a_key_that_is_near_none_is_said_to_be_so():
    assert "line 1, xyzzy: unknown key, and no known one is near it. Remove it." in error_of("xyzzy: 1\n")


@pytest.mark.parametrize(
    ("name", "word", "expected"),
    [
        ("zero_stage", "4", "found 4, expected one of 0, 1, 2 or 3"),
        ("zero_stage", "true", "found true, expected one of 0, 1, 2 or 3"),
        ("zero_stage", "'2'", 'found "2", expected one of 0, 1, 2 or 3'),
        ("zero_stage", "auto", 'found "auto"'),
        ("gradient_clipping", "-1", "found -1, expected a number at least 0"),
        ("gradient_clipping", ".inf", "found Infinity, expected a finite number"),
        ("gradient_clipping", "no", 'found "no", expected a number'),
        ("gradient_accumulation_steps", "0", "found 0, expected a number at least 1"),
        ("gradient_accumulation_steps", "2.5", "found 2.5, expected a whole number"),
        ("gradient_accumulation_steps", "1" + "0" * 30, "expected a number at most 9223372036854775807"),
        ("offload_param_device", "gpu", 'found "gpu", expected one of "none", "cpu" or "nvme"'),
        ("offload_param_device", "[cpu]", 'found ["cpu"], expected one of "none", "cpu" or "nvme"'),
        ("zero3_save_16bit_model", "maybe", 'found "maybe", expected true or false'),
        ("deepspeed_moe_layer_cls_names", "{a: b}", 'found {"a": "b"}, expected a list'),
        ("deepspeed_multinode_launcher", "slurmm", 'found "slurmm", expected one of "pdsh", "standard"'),
        ("deepspeed_config_file", "3", "found 3, expected a string"),
    ],
)
def test_a_wrong_value_is_shown_beside_what_was_expected(name, word, expected):
    text = error_of(f"deepspeed_config:\n  {name}: {word}\n")
    assert text.startswith(f"{YAML_NAME} has 1 fault:\n  line 2, deepspeed_config.{name}")
    assert expected in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("FSDP", "not supported: distributed_type: DEEPSPEED with zero_stage: 3"),
        ("TPU", "there is no TPU support"),
        ("deepspeed", 'did you mean "DEEPSPEED"?'),
        ("MULTI_GPUS", 'did you mean "MULTI_GPU"?'),
        ("zzz", "expected one of NO, MULTI_CPU, MULTI_GPU, DEEPSPEED."),
    ],
)
def test_a_type_of_run_that_is_not_here(kind, words):
    assert words in error_of(f"distributed_type: {kind}\n")


@pytest.mark.parametrize(
    "line",
    [
        "fsdp_config: {fsdp_sharding_strategy: 1}",
        "megatron_lm_config: {tp: 2}",
        "tpu_name: t",
        "dynamo_backend: INDUCTOR",
    ],
)
def test_what_is_not_supported_is_refused_with_its_line(line):
    text = error_of(f"use_cpu: no\n{line}\n")
    assert f"line 2, {line.partition(':')[0]}: found " in text
    assert "which is not supported: " in text


def test_all_faults_of_a_yaml_come_at_once_with_their_lines():
    text = """\
num_processes: "2"
mixed_precision: fp8        # not here

use_cpu: maybe
deepspeed_config:
  zero_stage: 5
  zero_stag: 3
  gradient_clipping: 1.0
  gradient_clipping: 2.0
  offload_param_device:
    - cpu
megatron_lm_config: {tp: 2}
3: x
distributed_type: FSDP
"""
    with pytest.raises(ConfigError) as caught:
        checked_run(parse_yaml(text, YAML_NAME))
    head, *rows = str(caught.value).split("\n")
    assert head == f"{YAML_NAME} has 10 faults:"
    assert [row.partition(": ")[0].strip() for row in rows] == [
        "line 1, num_processes",
        "line 2, mixed_precision",
        "line 4, use_cpu",
        "line 6, deepspeed_config.zero_stage",
        "line 7, deepspeed_config.zero_stag",
        "line 9, deepspeed_config.gradient_clipping",
        "line 10, deepspeed_config.offload_param_device",
        "line 12, megatron_lm_config",
        "line 13, 3",
        "line 14, distributed_type",
    ]


def test_all_faults_of_a_json_come_at_once_with_their_lines():
    text = """\
{
  "train_batch_size": "8",
  "bf16": {"enabled": true},
  "fp16": {
    "enabled": true, // two dtypes
    "loss_scale_windows": 2
  },
  "zero_optimization": {
    "stage": 7,
    "stage": 3,
    "overlap_comm": "yes",
    "offload_param": "cpu"
  },
  "gradient_clipping": [],
  "sparse_gradients": "auto"
}"""
    head, *rows = error_of(ds_config=text).split("\n")
    assert head == f"{JSON_NAME} has 8 faults:"
    assert [row.partition(": ")[0].strip() for row in rows] == [
        "line 2, train_batch_size",
        "line 3, bf16.enabled",
        "line 6, fp16.loss_scale_windows",
        "line 10, zero_optimization.stage",
        "line 11, zero_optimization.overlap_comm",
        "line 12, zero_optimization.offload_param",
        "line 14, gradient_clipping",
        "line 15, sparse_gradients",
    ]


def test_all_faults_of_a_command_line_come_at_once_in_its_spelling():
    flags = {"zero_stage": 7, "mixed_precision": "fp8", "num_proceses": 2, "deepspeed_moe_layer_cls_names": ["A", 3]}
    with pytest.raises(ConfigError) as caught:
        flag_mentions(flags)
    head, *rows = str(caught.value).split("\n")
    assert head == "The command line has 4 faults:"
    assert sorted(row.partition(": ")[0].strip() for row in rows) == [
        "--deepspeed_moe_layer_cls_names",
        "--mixed_precision",
        "--num_proceses",
        "--zero_stage",
    ]
