"""What fills the "auto" that `Accelerator.prepare` is left with: the formulas, and whom to ask for each key.

The formulas are those that Accelerate documents
(huggingface.co/docs/accelerate/usage_guides/deepspeed, "Things to note when using DeepSpeed Config File").
"""

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardwise.config.load import check
from shardwise.config.messages import Fault, Path, report
from shardwise.config.rules import broken_rules
from shardwise.config.run.nested import get, put
from shardwise.config.run.resolved import AUTO, Resolved, fillable
from shardwise.config.run.said import Origin, Said
from shardwise.config.schema import EngineConfig
from shardwise.config.source import Source
from shardwise.errors import ConfigError

_ZERO = "zero_optimization"

# Who fills each key, for people who read `explain` or an error.
FILLED_FROM: Mapping[Path, str] = {
    ("train_micro_batch_size_per_gpu",): "the batch size of the data loaders that prepare gets",
    ("train_batch_size",): "micro-batch x accumulation steps x ranks",
    ("gradient_accumulation_steps",): "Accelerator(gradient_accumulation_steps=...), else 1",
    ("gradient_clipping",): "1.0",
    (_ZERO, "reduce_bucket_size"): "hidden_size * hidden_size",
    (_ZERO, "stage3_prefetch_bucket_size"): "int(0.9 * hidden_size * hidden_size)",
    (_ZERO, "stage3_param_persistence_threshold"): "10 * hidden_size",
    ("optimizer", "params", "lr"): "DummyOptim(lr=...)",
    ("optimizer", "params", "weight_decay"): "DummyOptim(weight_decay=...)",
    ("scheduler", "params", "warmup_min_lr"): "0",
    ("scheduler", "params", "warmup_max_lr"): "the optimizer's lr",
    ("scheduler", "params", "warmup_num_steps"): "DummyScheduler(warmup_num_steps=...)",
    ("scheduler", "params", "total_num_steps"): "DummyScheduler(total_num_steps=...), over ranks",
}
_BATCH = {"train_batch_size", "train_micro_batch_size_per_gpu"}
_FROM_HIDDEN_SIZE = [path for path, formula in FILLED_FROM.items() if "hidden_size" in formula]


@dataclass(frozen=True)
class Seen:
    """What prepare sees of a script, as far as "auto" asks for it. None: there is no such thing to see."""

    num_processes: int
    micro_batch_size: Said | None = None  # samples of one forward on one rank
    gradient_accumulation_steps: int | None = None  # Accelerator's argument
    hidden_size: Said | None = None
    optimizer: Mapping[str, Any] = field(default_factory=dict)  # arguments of DummyOptim, or the defaults of a real one
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # arguments of DummyScheduler
    split_batches: bool = False  # the script counted its steps with loaders that ranks share

    def answer(self, path: Path, config: Mapping[str, Any]) -> Said | None:
        """The value for one key of the JSON, or None where nothing seen gives it."""
        *block, key = path
        match tuple(block), key:
            case (), "train_micro_batch_size_per_gpu":
                return self.micro_batch_size
            case (), "train_batch_size":
                return self._whole_batch(config)
            case (), "gradient_accumulation_steps":
                steps = self.gradient_accumulation_steps
                return _computed(1, "1") if steps is None else _computed(steps, str(FILLED_FROM[path]))
            case (), "gradient_clipping":
                return _computed(1.0, "1.0")
            case ("zero_optimization",), _ if self.hidden_size is not None and path in _FROM_HIDDEN_SIZE:
                return _from_hidden_size(path, self.hidden_size)
            case ("optimizer", "params"), _ if self.optimizer.get(str(key)) is not None:
                return _computed(self.optimizer[str(key)], f"the script's optimizer({key}=...)")
            case ("scheduler", "params"), _:
                return self._schedule(str(key), config)
        return None

    def _whole_batch(self, config: Mapping[str, Any]) -> Said | None:
        micro, steps = config.get("train_micro_batch_size_per_gpu"), config.get("gradient_accumulation_steps", 1)
        if not isinstance(micro, int) or not isinstance(steps, int):
            return None
        return _computed(micro * steps * self.num_processes, f"{micro} x {steps} x {self.num_processes} ranks")

    def _schedule(self, key: str, config: Mapping[str, Any]) -> Said | None:
        given = self.scheduler.get(key)
        if key == "total_num_steps" and given is not None:
            ranks = 1 if self.split_batches else self.num_processes
            return _computed(math.ceil(given / ranks), f"ceil(total_num_steps {given} / {ranks} ranks)")
        if given is not None:
            return _computed(given, f"DummyScheduler({key}={given})")
        if key == "warmup_min_lr":
            return _computed(0.0, "0")
        if key == "warmup_max_lr":
            lr = get(config, ("optimizer", "params", "lr"))
            lr = self.optimizer.get("lr") if lr is None or lr == AUTO else lr
            return None if lr is None else _computed(lr, "the optimizer's lr")
        return None


def hidden_size_of(model: Any) -> Said | None:
    """The hidden size of a transformers-like model: `config.hidden_size`, the largest of `config.hidden_sizes`, or
    that of the text model's config in a multimodal one.
    """
    config = getattr(model, "config", None)
    for where, candidate in (("config", config), ("config.text_config", getattr(config, "text_config", None))):
        size = getattr(candidate, "hidden_size", None)
        if isinstance(size, int):
            return _computed(size, f"{where}.hidden_size {size}")
        sizes = getattr(candidate, "hidden_sizes", None)
        if sizes:
            return _computed(max(sizes), f"max({where}.hidden_sizes) {max(sizes)}")
    return None


def fill(resolved: Resolved, seen: Seen, unused: Collection[str] = ()) -> Resolved:
    """Replace every "auto" of `resolved.ds_config` that is not the engine's own to choose.

    The blocks `unused`, such as an optimizer that the script does not ask for, are left out of the result. Raises
    ConfigError that names every key nobody can fill, with the ways to set it.
    """
    assert resolved.ds_config is not None, "only a run with ZeRO has a DeepSpeed config to fill"
    config = {key: copy.deepcopy(value) for key, value in resolved.ds_config.items() if key not in unused}
    origins = dict(resolved.origins)
    if _BATCH.isdisjoint(config):  # nothing is said about the batch, so the loaders say it
        config["train_micro_batch_size_per_gpu"] = AUTO
    if "gradient_accumulation_steps" not in config and seen.gradient_accumulation_steps is not None:
        config["gradient_accumulation_steps"] = AUTO
    checked = check(Source(resolved.json_name, config), EngineConfig, broken_rules, fillable)
    checked.raise_faults([*checked.faults, *checked.refused])
    faults = []
    last = ("train_batch_size",)  # it follows from others
    for path, written in sorted(checked.findings.autos.items(), key=lambda item: item[0] == last):
        if not fillable(path):
            continue  # the engine's own choice
        answer = seen.answer(path, config)
        if answer is not None:
            put(config, written, answer.value)
            origins[written] = answer
        elif not _engine_derives(path, config):
            faults.append(Fault(written, _nobody(path)))
    if faults:
        raise ConfigError(report(resolved.json_name, faults, {}))
    return replace(resolved, ds_config=config, origins=origins)


def _from_hidden_size(path: Path, hidden: Said) -> Said:
    size = hidden.value
    values = {
        "reduce_bucket_size": size * size,
        "stage3_prefetch_bucket_size": int(0.9 * size * size),
        "stage3_param_persistence_threshold": 10 * size,
    }
    return _computed(values[str(path[-1])], f"{FILLED_FROM[path]}, {hidden.place}")


def _engine_derives(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether the batch of a whole step fixes that of one forward."""
    return path == ("train_micro_batch_size_per_gpu",) and config.get("train_batch_size", AUTO) != AUTO


def _nobody(path: Path) -> str:
    if path[-1] in _BATCH:
        way = "pass a data loader with a batch_size to prepare"
    elif path in _FROM_HIDDEN_SIZE:
        way = "give the model a config with hidden_size (or hidden_sizes)"
    elif path in FILLED_FROM:
        way = f"give {FILLED_FROM[path]}"
    else:
        way = "give it to DummyOptim or DummyScheduler"
    return f'found "auto", and nothing in the script fills it. Write the value here, or {way}.'


def _computed(value: Any, formula: str) -> Said:
    return Said(value, Origin.AUTO, f"auto: {formula}")
