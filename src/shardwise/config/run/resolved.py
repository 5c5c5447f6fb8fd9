"""The outcome of precedence, and the few rules that both ways to it share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardwise.config.load import Checked, check
from shardwise.config.messages import Fault, Path, dotted
from shardwise.config.rules import broken_rules
from shardwise.config.run.nested import leaves
from shardwise.config.run.said import Origin, Said
from shardwise.config.schema import EngineConfig
from shardwise.config.source import Source

AUTO = "auto"

# Settings that say what a key of the JSON says, and that key.
IN_JSON: Mapping[str, tuple[str, ...]] = {
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("gradient_clipping",),
    "zero_stage": ("zero_optimization", "stage"),
    "offload_optimizer_device": ("zero_optimization", "offload_optimizer", "device"),
    "offload_optimizer_nvme_path": ("zero_optimization", "offload_optimizer", "nvme_path"),
    "offload_param_device": ("zero_optimization", "offload_param", "device"),
    "offload_param_nvme_path": ("zero_optimization", "offload_param", "nvme_path"),
    "zero3_save_16bit_model": ("zero_optimization", "stage3_gather_16bit_weights_on_model_save"),
    "deepspeed_moe_layer_cls_names": ("zero_optimization", "leaf_module", "classes"),
    "num_nodes_simulated": ("shardwise", "simulated_nodes"),
}
PRECISIONS = ("fp16", "bf16")
# The front-end's scripts print their own progress, so the engine prints none (Accelerate says the same to DeepSpeed).
NO_PROGRESS = Said(float("inf"), Origin.DEFAULT, "the script prints its own progress")

_FILLED_BY_PREPARE = frozenset(
    {
        ("train_batch_size",),
        ("train_micro_batch_size_per_gpu",),
        ("zero_optimization", "reduce_bucket_size"),
        ("zero_optimization", "stage3_prefetch_bucket_size"),
        ("zero_optimization", "stage3_param_persistence_threshold"),
    }
)


@dataclass(frozen=True)
class Resolved:
    """Every setting with the mention that won, and the DeepSpeed JSON that follows from them."""

    values: Mapping[str, Said]
    ds_config: dict[str, Any] | None = None  # None in a run without ZeRO; may hold "auto" for prepare to fill
    origins: Mapping[Path, Said] = field(default_factory=dict)  # of every value in ds_config
    warnings: tuple[str, ...] = ()
    json_name: str = "The DeepSpeed config"  # how messages call the JSON

    def __getitem__(self, name: str) -> Any:
        """The value of a setting."""
        return self.values[name].value


def fillable(path: Path) -> bool:
    """Whether "auto" at this key of the JSON is filled by the front-end: from a setting, or from what prepare sees."""
    return (
        path in _FILLED_BY_PREPARE
        or path in IN_JSON.values()
        or path in {(dtype, "enabled") for dtype in PRECISIONS}
        or path[:2] in {("optimizer", "params"), ("scheduler", "params")}
    )


def checked_json(source: Source) -> Checked[EngineConfig]:
    """Check a DeepSpeed JSON before any process starts; ConfigError with all its faults."""
    checked = check(source, EngineConfig, broken_rules, fillable)
    checked.raise_faults([*checked.faults, *(fault for fault in checked.refused if not _is_late(fault))])
    return checked


def late_refusals(checked: Checked[EngineConfig]) -> Iterator[str]:
    """Warnings of what prepare will refuse."""
    for fault in checked.refused:
        if _is_late(fault):
            yield f"prepare will refuse {dotted(fault.path)}: {fault.text}"


def _is_late(fault: Fault) -> bool:
    """What this block asks for beyond the engine matters first to prepare; a script may come without a model."""
    return fault.path[:1] == ("zero_optimization",)


def section_of(dtype: str, enabled: bool) -> dict[str, bool]:
    """The block of a compute dtype, where the JSON has none."""
    return {"enabled": True, "auto_cast": True} if enabled and dtype == "fp16" else {"enabled": enabled}


def idle_settings(values: Mapping[str, Said]) -> Iterator[str]:
    """Warnings of settings that do less than they say."""
    for part in ("optimizer", "param"):
        device, path = values[f"offload_{part}_device"], values[f"offload_{part}_nvme_path"]
        if device.value == "nvme" and path.value is None:
            yield (
                f"offload_{part}_device is {device}, but no directory is given: "
                f"set offload_{part}_nvme_path before anything is prepared."
            )


def origins_of(
    config: Mapping[str, Any], known: Mapping[Path, Said], elsewhere: Said, lines: Mapping[Path, int] | None = None
) -> dict[Path, Said]:
    """Where every value of `config` comes from: `known`, a line of the JSON, or else `elsewhere`."""
    origins = {}
    for path, value in leaves(config):
        if path in known:
            origins[path] = replace(known[path], value=value)
        elif lines and path in lines:
            origins[path] = Said(value, Origin.JSON, f"{elsewhere.place}, line {lines[path]}")
        else:
            origins[path] = replace(elsewhere, value=value)
    return origins
