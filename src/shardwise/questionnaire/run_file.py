"""From answers to the config file, in the layout that Accelerate's files have, so that Accelerate reads it, too."""

import json
from pathlib import Path
from typing import Any

import yaml

from shardwise.config.run.file import default_of
from shardwise.config.run.schema import PluginConfig, RunConfig
from shardwise.config.run.yaml_text import read_scalar
from shardwise.questionnaire.question import Answers

_SECTION = "deepspeed_config"
_ONLY_OURS = ("max_restarts", "monitor_interval")  # Accelerate refuses a file with them, so a default is left out


class _Dumper(yaml.SafeDumper):
    """The safe dumper; it also quotes the words that only YAML 1.2 takes for numbers, such as 1e8."""


def _quoted_where_needed(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if read_scalar(text) == text else "'")


_Dumper.add_representer(str, _quoted_where_needed)


def as_run(answers: Answers) -> dict[str, Any]:
    """The content of the config file; answers that are still missing are left out or stand at their default."""
    zero = answers.get("use_deepspeed") is True
    kind = answers.get("machine_type", "NO")
    run: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "DEEPSPEED" if zero else kind,
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "num_machines": 1,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": kind == "MULTI_CPU",
    }
    if kind == "NO":
        run["num_processes"] = 1
    run |= {name: value for name, value in answers.items() if name in RunConfig.model_fields}
    run = {name: value for name, value in run.items() if name not in _ONLY_OURS or value != default_of(name)}
    section = {name: value for name, value in answers.items() if name in PluginConfig.model_fields}
    if "zero_stage" in section:
        section = {"offload_optimizer_device": "none", "offload_param_device": "none"} | section
    return run | {_SECTION: section} if section else run


def as_text(run: dict[str, Any], path: Path) -> str:
    """The text of the file: JSON where the name ends so, else YAML."""
    if path.suffix == ".json":
        return json.dumps(run, indent=2, sort_keys=True) + "\n"
    return yaml.dump(run, Dumper=_Dumper, sort_keys=True, allow_unicode=True)
