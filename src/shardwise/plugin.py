"""``DeepSpeedPlugin``: what a script says about ZeRO, joined with what its launcher was told."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from shardwise.config.load import open_source
from shardwise.config.messages import Path
from shardwise.config.run.auto import Seen, fill
from shardwise.config.run.file import code_mentions
from shardwise.config.run.nested import get, leaves, put
from shardwise.config.run.precedence import resolve
from shardwise.config.run.resolved import AUTO, Resolved
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.source import Source, parse
from shardwise.errors import ConfigError
from shardwise.launch.handed_over import handed_over

JsonLike = str | FilePath | Mapping[str, Any]


class HfDeepSpeedConfig:
    """A DeepSpeed JSON with questions about it: the object that scripts know under this name.

    Args:
        config_file_or_dict: a mapping, the path of a JSON file, JSON text, or a base64 string of it.
    """

    def __init__(self, config_file_or_dict: JsonLike) -> None:
        self.config: dict[str, Any] = copy.deepcopy(dict(_read(config_file_or_dict).data))

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """The value at a dotted key, or ``default`` where there is none."""
        value = get(self.config, tuple(ds_key_long.split(".")))
        return default if value is None else value

    def is_true(self, ds_key_long: str) -> bool:
        """Whether the key is set, to something true."""
        return bool(self.get_value(ds_key_long))

    def is_false(self, ds_key_long: str) -> bool:
        """Whether the key is set, to something false."""
        return self.get_value(ds_key_long) is not None and not self.is_true(ds_key_long)

    def is_auto(self, ds_key_long: str) -> bool:
        """Whether the key holds "auto"."""
        return bool(self.get_value(ds_key_long) == AUTO)

    def is_zero2(self) -> bool:
        """Whether it says ZeRO stage 2."""
        return bool(self.get_value("zero_optimization.stage", 0) == 2)

    def is_zero3(self) -> bool:
        """Whether it says ZeRO stage 3."""
        return bool(self.get_value("zero_optimization.stage", 0) == 3)

    def is_offload(self) -> bool:
        """Whether it moves a model state off the device."""
        parts = ("offload_optimizer", "offload_param")
        return any(self.get_value(f"zero_optimization.{part}.device") in ("cpu", "nvme") for part in parts)

    def del_config_sub_tree(self, ds_key_long: str, must_exist: bool = False) -> None:
        """Remove a dotted key with all that is below it; ConfigError if ``must_exist`` and it does not."""
        *parents, key = ds_key_long.split(".")
        block = get(self.config, tuple(parents)) if parents else self.config
        if isinstance(block, dict) and key in block:
            del block[key]
        elif must_exist:
            raise ConfigError(f"The DeepSpeed config has no {ds_key_long}, and it was to be removed.")


class DeepSpeedPlugin:
    """What a script says about ZeRO. None is "not said": then flags, the YAML, the JSON or the default decide.

    What a script says wins over the YAML; a flag that contradicts it is an error. ``deepspeed_config`` is the DeepSpeed
    JSON that follows, a plain dict that may still be changed before ``Accelerator.prepare`` reads it.

    Args:
        hf_ds_config: a DeepSpeed JSON: path, mapping, JSON text, base64 of it, or a ``HfDeepSpeedConfig``.
        gradient_accumulation_steps: micro-batches a step.
        gradient_clipping: the global norm that gradients are clipped to; not said and not in a JSON: no clipping.
        zero_stage: 0, 1, 2 or 3; not said anywhere: 2.
        is_train_batch_min: "auto" micro-batch is the smallest of the loaders' batch sizes, else the largest.
        offload_optimizer_device: "none", "cpu" or "nvme".
        offload_param_device: "none", "cpu" or "nvme".
        offload_optimizer_nvme_path: a directory.
        offload_param_nvme_path: a directory.
        zero3_init_flag: whether models are built in pieces under ``Accelerator.init_context``; not said: at stage 3.
        zero3_save_16bit_model: whether whole 16-bit weights are gathered on saving at stage 3.
        transformer_moe_cls_names: class names of mixture-of-experts layers, comma-separated.
        enable_msamp: fp8 by MS-AMP, which is not here.
        msamp_opt_level: read only with ``enable_msamp``.
        mixed_precision: "no", "fp16" or "bf16".
        deepspeed_config_file: another name of ``hf_ds_config``.
        deepspeed_moe_layer_cls_names: another name of ``transformer_moe_cls_names``.
        num_nodes_simulated: treat the processes as if they were on so many nodes.
        launcher_settings: ``deepspeed_hostfile`` and its kin, which matter to ``shardwise launch`` alone.

    Raises:
        ConfigError: a value cannot be, or two places contradict each other; all faults at once.
    """

    def __init__(
        self,
        hf_ds_config: JsonLike | HfDeepSpeedConfig | None = None,
        gradient_accumulation_steps: int | None = None,
        gradient_clipping: float | None = None,
        zero_stage: int | None = None,
        is_train_batch_min: bool = True,
        offload_optimizer_device: str | None = None,
        offload_param_device: str | None = None,
        offload_optimizer_nvme_path: str | None = None,
        offload_param_nvme_path: str | None = None,
        zero3_init_flag: bool | None = None,
        zero3_save_16bit_model: bool | None = None,
        transformer_moe_cls_names: str | None = None,
        enable_msamp: bool | None = None,
        msamp_opt_level: str | None = None,
        *,
        mixed_precision: str | None = None,
        deepspeed_config_file: JsonLike | None = None,
        deepspeed_moe_layer_cls_names: str | None = None,
        num_nodes_simulated: int | None = None,
        **launcher_settings: str | None,
    ) -> None:
        if enable_msamp:
            raise ConfigError("enable_msamp asks for fp8 by MS-AMP, which is not here. Use mixed_precision='bf16'.")
        del msamp_opt_level
        said = {
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "gradient_clipping": gradient_clipping,
            "zero_stage": zero_stage,
            "offload_optimizer_device": offload_optimizer_device,
            "offload_param_device": offload_param_device,
            "offload_optimizer_nvme_path": offload_optimizer_nvme_path,
            "offload_param_nvme_path": offload_param_nvme_path,
            "zero3_init_flag": zero3_init_flag,
            "zero3_save_16bit_model": zero3_save_16bit_model,
            "deepspeed_moe_layer_cls_names": transformer_moe_cls_names or deepspeed_moe_layer_cls_names,
            "mixed_precision": mixed_precision,
            "num_nodes_simulated": num_nodes_simulated,
            **launcher_settings,
        }
        mentions = code_mentions("DeepSpeedPlugin", {name: value for name, value in said.items() if value is not None})
        self.is_train_batch_min = is_train_batch_min
        self.selected = False
        self._asked = _asked_with(mentions, hf_ds_config if hf_ds_config is not None else deepspeed_config_file)
        self._resolved = resolve(self._asked)
        self.deepspeed_config: dict[str, Any] = copy.deepcopy(self._resolved.ds_config or {})
        self._zero3_init: bool | None = None  # while a zero3_init_context_manager is open

    @property
    def resolved(self) -> Resolved:
        """Every setting with the place where it was said, and the JSON as it is now."""
        origins = dict(self._resolved.origins)
        for path, value in _changes(self._resolved.ds_config or {}, self.deepspeed_config):
            origins[path] = Said(value, Origin.CODE, "the script changed deepspeed_config")
        return replace(self._resolved, ds_config=self.deepspeed_config, origins=origins)

    @property
    def hf_ds_config(self) -> HfDeepSpeedConfig:
        """The JSON as it is now, with questions about it."""
        view = HfDeepSpeedConfig({})
        view.config = self.deepspeed_config
        return view

    def set_mixed_precision(self, mixed_precision: str) -> None:
        """Join what `Accelerator(mixed_precision=...)` says; ConfigError if the JSON or a flag contradicts it."""
        changes = list(_changes(self._resolved.ds_config or {}, self.deepspeed_config))
        self._asked = self._asked.stronger(code_mentions("Accelerator", {"mixed_precision": mixed_precision}))
        self._resolved = resolve(self._asked)
        self._replace_config(copy.deepcopy(self._resolved.ds_config or {}))
        for path, value in changes:
            put(self.deepspeed_config, path, value)

    def fill(self, seen: Seen, unused: Collection[str] = ()) -> Resolved:
        """Replace every "auto" by what prepare sees, also in ``deepspeed_config`` itself, but in the blocks ``unused``.

        Raises ConfigError that names every key nobody can fill.
        """
        filled = fill(self.resolved, seen, unused)
        left = {key: value for key, value in self.deepspeed_config.items() if key in unused}
        self._replace_config({**copy.deepcopy(filled.ds_config or {}), **left})
        return filled

    def _replace_config(self, config: dict[str, Any]) -> None:
        """Scripts hold on to the dict, so it stays the same object."""
        self.deepspeed_config.clear()
        self.deepspeed_config.update(config)

    # -- one value each, under the names of the arguments

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is no attribute: the settings, by name.
        resolved = self.__dict__.get("_resolved")
        if resolved is not None and name in resolved.values:
            return resolved.values[name].value
        if name == "transformer_moe_cls_names":
            return ",".join(self.deepspeed_moe_layer_cls_names)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def is_auto(self, ds_key_long: str) -> bool:
        """Whether a dotted key of the JSON holds "auto"."""
        return self.hf_ds_config.is_auto(ds_key_long)

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """The value at a dotted key of the JSON."""
        return self.hf_ds_config.get_value(ds_key_long, default)

    def is_zero3_init_enabled(self) -> bool:
        """Whether models are to be built in shards: at stage 3, unless ``zero3_init_flag`` says no."""
        if self._zero3_init is not None:
            return self._zero3_init
        flag = self._resolved["zero3_init_flag"]
        is_stage_3 = self.get_value("zero_optimization.stage") == 3
        return is_stage_3 and flag is not False

    @contextmanager
    def zero3_init_context_manager(self, enable: bool = False) -> Iterator[None]:
        """At stage 3, models inside are built in pieces (``enable``) or whole, whatever ``zero3_init_flag`` says."""
        from shardwise.zero.construction import Init  # torch comes in with it

        if self.get_value("zero_optimization.stage") != 3:
            yield
            return
        former, self._zero3_init = self._zero3_init, enable
        try:
            with Init(enabled=enable):
                yield
        finally:
            self._zero3_init = former

    def __repr__(self) -> str:
        return f"DeepSpeedPlugin({self.deepspeed_config})"


def _asked_with(mentions: Mapping[str, Said], source: JsonLike | HfDeepSpeedConfig | None) -> Asked:
    """What the launcher was told, and what the script says before it."""
    asked = handed_over(os.environ)
    here = Said("DEEPSPEED", Origin.CODE, "DeepSpeedPlugin(...)")
    asked = asked.stronger({"distributed_type": here, **mentions})
    if source is None:
        return asked
    named = asked.said("deepspeed_config_file")
    if named is not None and named.origin is Origin.FLAG and not _same_file(named.value, source):
        raise ConfigError(
            f"deepspeed_config_file is {named}, and the script passes another DeepSpeed JSON to DeepSpeedPlugin. "
            "Leave one of them out."
        )
    read = (
        Source("DeepSpeedPlugin(hf_ds_config=...)", source.config)
        if isinstance(source, HfDeepSpeedConfig)
        else _read(source)
    )
    return replace(asked, json=read)


def _read(source: JsonLike) -> Source:
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return parse(source, "DeepSpeedPlugin(hf_ds_config=...)")
    read = open_source(source)
    if not isinstance(read.data, Mapping):
        raise ConfigError(f"{read.name} holds {json.dumps(read.data)[:60]}, expected a block {{...}} of keys.")
    return replace(read, name="DeepSpeedPlugin(hf_ds_config=...)") if isinstance(source, Mapping) else read


def _same_file(named: str, source: Any) -> bool:
    return isinstance(source, str | FilePath) and FilePath(named).resolve() == FilePath(source).resolve()


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[Path, Any]]:
    """The values that the script has written into its dict."""
    missing = object()
    old = dict(leaves(before))
    return [(path, value) for path, value in leaves(now) if old.get(path, missing) != value]
