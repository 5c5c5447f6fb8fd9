"""Who wins: code, then flags, then the YAML, then the default; and the DeepSpeed JSON has the only word on its own.

What the JSON says concretely, nobody may contradict: a second mention that agrees is one warning, one that differs is
an error (`merge.py`). What it leaves to "auto", and what it does not say at all, is filled from the others.
"""

from collections.abc import Mapping
from typing import Any

from shardwise.config.messages import Path
from shardwise.config.run.contradictions import code_against_flags, misfits
from shardwise.config.run.file import default_of, setting_names
from shardwise.config.run.merge import Merge
from shardwise.config.run.nested import get, put
from shardwise.config.run.resolved import (
    AUTO,
    IN_JSON,
    NO_PROGRESS,
    PRECISIONS,
    Resolved,
    checked_json,
    idle_settings,
    late_refusals,
    origins_of,
    section_of,
)
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.run.schema import PluginConfig
from shardwise.config.source import Source
from shardwise.errors import ConfigError

# They mean the same in a run without ZeRO, so they alone do not ask for it.
_NOT_OF_ZERO = ("gradient_accumulation_steps", "gradient_clipping")
_NOBODY = Said(None, Origin.DEFAULT, "default")


def resolve(asked: Asked) -> Resolved:
    """Decide every setting of a run.

    Raises ConfigError: with all faults of the JSON, or with all contradictions, each with both values and both places.
    """
    values = {name: asked.said(name) or Said(default_of(name), Origin.DEFAULT, "default") for name in setting_names()}
    contradictions = [f"  {pair}" for pair in code_against_flags(asked)]
    if contradictions:
        lines = ["The command line and the script contradict each other:", *contradictions]
        raise ConfigError("\n".join([*lines, "Leave the flag out, or change the script."]))
    if unfit := list(misfits(values)):
        raise ConfigError("\n".join(unfit))
    if not wants_zero(asked):
        return Resolved(values)
    if asked.json is None:
        return _from_settings(values)
    return Merge(asked, values, asked.json).resolved()


def wants_zero(asked: Asked) -> bool:
    """Whether anybody asked for ZeRO: by the type of the run, by a setting of it, or by a DeepSpeed JSON.

    A flag of ZeRO counts even where the YAML names another type: flags are stronger.
    """
    if asked.json is not None:
        return True
    kind = asked.said("distributed_type")
    if kind is not None and kind.value == "DEEPSPEED":
        return True
    names = [name for name in PluginConfig.model_fields if name not in _NOT_OF_ZERO]
    spoken = [said for name in names for said in asked.mentions.get(name, ())]
    if any(said.origin is not Origin.FILE for said in spoken):
        return True
    return kind is None and bool(spoken)


def _from_settings(values: Mapping[str, Said]) -> Resolved:
    """The DeepSpeed JSON that the settings alone describe."""

    def value(name: str) -> Any:
        return values[name].value

    steps = value("gradient_accumulation_steps")
    config: dict[str, Any] = {
        "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO if steps is None else steps,
        "gradient_clipping": value("gradient_clipping") or 0.0,  # nobody asked for clipping: there is none
        "zero_optimization": {
            "stage": value("zero_stage"),
            "offload_optimizer": {
                "device": value("offload_optimizer_device"),
                "nvme_path": value("offload_optimizer_nvme_path"),
            },
            "offload_param": {"device": value("offload_param_device"), "nvme_path": value("offload_param_nvme_path")},
            "stage3_gather_16bit_weights_on_model_save": value("zero3_save_16bit_model"),
        },
        "steps_per_print": NO_PROGRESS.value,
    }
    if value("deepspeed_moe_layer_cls_names"):
        put(config, IN_JSON["deepspeed_moe_layer_cls_names"], list(value("deepspeed_moe_layer_cls_names")))
    if value("num_nodes_simulated") is not None:
        put(config, IN_JSON["num_nodes_simulated"], value("num_nodes_simulated"))
    precision = values["mixed_precision"]
    config |= {dtype: section_of(dtype, precision.value == dtype) for dtype in PRECISIONS}

    known: dict[Path, Said] = {path: values[name] for name, path in IN_JSON.items() if get(config, path) != AUTO}
    known |= {(dtype, "enabled"): precision for dtype in PRECISIONS} | {("steps_per_print",): NO_PROGRESS}
    checked = checked_json(Source("The settings", config))
    warnings = (*idle_settings(values), *late_refusals(checked))
    return Resolved(values, config, origins_of(config, known, _NOBODY), warnings)
