"""From a script's objects to engines, loaders and what goes with them: the work of ``Accelerator.prepare``.

The phases: sort the objects; shard the loaders; fill what the config left to "auto"; build an engine for each model,
with the optimizer that holds its parameters; wrap the optimizers and schedulers; hand everything back in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from shardwise.config.load import load_silently
from shardwise.config.run.auto import Seen, hidden_size_of
from shardwise.config.run.said import Origin, Said
from shardwise.config.schema import EngineConfig
from shardwise.config.source import Source
from shardwise.dummies import DummyOptim, DummyScheduler
from shardwise.errors import ConfigError
from shardwise.optimizer import AcceleratedOptimizer
from shardwise.plugin import DeepSpeedPlugin
from shardwise.scheduler import AcceleratedScheduler, EngineScheduler
from shardwise.zero.engine import Engine
from shardwise.zero.init import initialize

Prepared = (Engine, AcceleratedOptimizer, AcceleratedScheduler)
ADVICE = "Pass a model, its optimizer and its schedulers to one prepare()."


@dataclass
class Belongings:
    """A model and what was passed for it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | DummyOptim | None = None
    schedulers: list[Any] = field(default_factory=list)

    @property
    def dummy_scheduler(self) -> DummyScheduler | None:
        """The stand-in for a scheduler, if one was passed."""
        return next((item for item in self.schedulers if isinstance(item, DummyScheduler)), None)


@dataclass(frozen=True)
class RunFacts:
    """What preparing needs to know of the run."""

    plugin: DeepSpeedPlugin | None
    plain_config: Mapping[str, Any]  # the engine's, in a run without ZeRO
    device: torch.device
    num_processes: int
    gradient_accumulation_steps: int | None
    split_batches: bool
    step_scheduler_with_optimizer: bool
    wrap: Callable[[DataLoader[Any]], DataLoader[Any]]
    loaders: Sequence[Any]  # prepared so far
    engines: Sequence[Engine]  # prepared so far

    @property
    def described(self) -> Mapping[str, Any]:
        """The DeepSpeed JSON as it stands; empty in a run without ZeRO."""
        return {} if self.plugin is None else self.plugin.deepspeed_config


def prepare(objects: Sequence[Any], facts: RunFacts) -> tuple[list[Any], EngineConfig | None]:
    """The objects, each in its place, ready for training; and the engine's config, if a model was among them.

    Raises ConfigError: objects do not belong together, or the config cannot be completed from them.
    """
    _refuse_prepared(objects)
    ready: dict[int, Any] = {}
    loaders = [item for item in objects if isinstance(item, DataLoader)]
    for loader in loaders:
        ready[id(loader)] = facts.wrap(loader)
    groups, later = _sorted(objects, facts)
    config = None
    if groups:
        for group in groups:
            _check_recipes(group, facts.described)
        seen = _seen(groups, [*facts.loaders, *(ready[id(loader)] for loader in loaders)], facts)
        config = _config(groups, seen, facts)
        _refuse_inference_below_stage_3(groups, loaders, config)
        for group in groups:
            ready |= _engine_of(group, config, facts)
    for optimizer, engine in later:
        ready[id(optimizer)] = _attached(optimizer, engine)
    _wrap_left_schedulers(objects, ready, facts)
    return [ready.get(id(item), item) for item in objects], config


def _refuse_prepared(objects: Sequence[Any]) -> None:
    for item in objects:
        if isinstance(item, Prepared):
            raise ConfigError(f"prepare() got a {type(item).__name__}, which was prepared already. Pass it once.")
        if isinstance(item, nn.Module) and getattr(item, "hf_device_map", None) and _spread(item):
            raise ConfigError(
                "prepare() got a model that was loaded with a device_map over several devices. Load it without one: "
                "the engine places parameters."
            )


def _spread(model: Any) -> bool:
    return len(set(model.hf_device_map.values())) > 1


# --- what belongs to what ---------------------------------------------------------------------------------------------


def _sorted(
    objects: Sequence[Any], facts: RunFacts
) -> tuple[list[Belongings], list[tuple[torch.optim.Optimizer, Engine]]]:
    """Models with their optimizers and schedulers, and optimizers of models that were prepared before."""
    groups = [Belongings(item) for item in objects if isinstance(item, nn.Module)]
    if len({id(group.model) for group in groups}) != len(groups):
        raise ConfigError("prepare() got one model twice. Pass each once.")
    later = []
    for item in objects:
        if not isinstance(item, torch.optim.Optimizer | DummyOptim):
            continue
        owner = _owner(item, groups)
        if owner is not None:
            if owner.optimizer is not None:
                raise ConfigError(
                    "prepare() got two optimizers over one model. Expected one with several parameter groups."
                )
            owner.optimizer = item
        else:
            later.append((_real(item), _engine_with(item, facts.engines)))
    for item in objects:
        if _is_scheduler(item):
            for group in groups:
                if item.optimizer is group.optimizer or _same_dummy(item.optimizer, group.optimizer):
                    group.schedulers.append(item)
    return groups, later


def _owner(optimizer: Any, groups: Sequence[Belongings]) -> Belongings | None:
    mine = {id(parameter) for parameter in _parameters(optimizer)}
    owners = [group for group in groups if mine & {id(parameter) for parameter in group.model.parameters()}]
    if not owners:
        return None
    foreign = mine - {id(parameter) for parameter in owners[0].model.parameters()}
    if foreign:
        where = "of several models" if len(owners) > 1 else "of another model, or of none that is prepared with it"
        raise ConfigError(
            f"prepare() got a {type(optimizer).__name__} over parameters {where}. Expected an optimizer for each model."
        )
    return owners[0]


def _engine_with(optimizer: Any, engines: Sequence[Engine]) -> Engine:
    mine = {id(parameter) for parameter in _parameters(optimizer)}
    for engine in engines:
        if mine <= {id(parameter) for parameter in engine.module.parameters()}:
            return engine
    raise ConfigError(
        f"prepare() got a {type(optimizer).__name__} whose parameters are of no model that is prepared with it or was "
        f"before. {ADVICE}"
    )


def _real(optimizer: Any) -> torch.optim.Optimizer:
    if isinstance(optimizer, DummyOptim):
        raise ConfigError(f"prepare() got a DummyOptim without its model. {ADVICE}")
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _parameters(optimizer: Any) -> Iterator[nn.Parameter]:
    entries = optimizer.params if isinstance(optimizer, DummyOptim) else optimizer.param_groups
    for entry in entries:
        yield from entry["params"] if isinstance(entry, dict) else [entry]


def _is_scheduler(item: Any) -> bool:
    if isinstance(item, nn.Module | torch.optim.Optimizer | DummyOptim | DataLoader):
        return False
    return isinstance(item, DummyScheduler) or (
        callable(getattr(item, "step", None)) and hasattr(item, "state_dict") and hasattr(item, "optimizer")
    )


def _same_dummy(one: Any, other: Any) -> bool:
    return isinstance(one, DummyOptim) and one is other


# --- the config -------------------------------------------------------------------------------------------------------


def _seen(groups: Sequence[Belongings], loaders: Sequence[Any], facts: RunFacts) -> Seen:
    """What "auto" may be filled from; of several models the first that trains speaks."""
    speaker = next((group for group in groups if group.optimizer is not None), groups[0])
    dummy = speaker.dummy_scheduler
    schedule = {} if dummy is None else {
        "total_num_steps": dummy.total_num_steps, "warmup_num_steps": dummy.warmup_num_steps, **dummy.kwargs
    }  # fmt: skip
    return Seen(
        num_processes=facts.num_processes,
        micro_batch_size=_micro_batch_size(loaders, facts),
        gradient_accumulation_steps=facts.gradient_accumulation_steps,
        hidden_size=next((size for group in groups if (size := hidden_size_of(group.model)) is not None), None),
        optimizer=_arguments(speaker.optimizer),
        scheduler=schedule,
        split_batches=facts.split_batches,
    )


def _arguments(optimizer: Any) -> Mapping[str, Any]:
    if isinstance(optimizer, DummyOptim):
        return {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay, **optimizer.kwargs}
    return dict(optimizer.defaults) if optimizer is not None else {}


def _micro_batch_size(loaders: Sequence[Any], facts: RunFacts) -> Said | None:
    sizes = []
    for loader in loaders:
        size = getattr(loader, "total_batch_size", None)
        if size:
            sizes.append(size // facts.num_processes)
    if not sizes:
        return None
    is_min = facts.plugin is None or facts.plugin.is_train_batch_min
    size = min(sizes) if is_min else max(sizes)
    return Said(max(1, size), Origin.AUTO, f"auto: the loaders' batch size ({size})")


def _config(groups: Sequence[Belongings], seen: Seen, facts: RunFacts) -> EngineConfig:
    if facts.plugin is None:
        micro = seen.micro_batch_size
        plain = {"train_micro_batch_size_per_gpu": 1 if micro is None else micro.value, **facts.plain_config}
        return load_silently(Source("The run's config", plain))[0]
    unused = [
        *(() if any(isinstance(group.optimizer, DummyOptim) for group in groups) else ("optimizer",)),
        *(() if any(group.dummy_scheduler is not None for group in groups) else ("scheduler",)),
    ]
    filled = facts.plugin.fill(seen, unused)
    # What has no effect was said when the plugin was made.
    return load_silently(Source(filled.json_name, filled.ds_config))[0]


def _refuse_inference_below_stage_3(groups: Sequence[Belongings], loaders: Sequence[Any], config: EngineConfig) -> None:
    """A model with a loader and without an optimizer is for inference, where stages 1 and 2 have nothing to shard."""
    stage = config.zero_optimization.stage
    if loaders and stage in (1, 2) and all(group.optimizer is None for group in groups):
        raise ConfigError(
            f"prepare() got a model and a loader without an optimizer at ZeRO stage {stage}, which shards optimizer "
            "state and gradients only: there is nothing of either. For inference set the stage to 3, which shards "
            "parameters, or to 0; for training pass the optimizer in the same prepare()."
        )


# --- engines ----------------------------------------------------------------------------------------------------------


def _engine_of(group: Belongings, config: EngineConfig, facts: RunFacts) -> dict[int, Any]:
    """What takes the place of a model, its optimizer and its schedulers, by the ids of these."""
    own = config.model_copy(update=_without_recipes(group))
    optimizer, dummy = group.optimizer, group.dummy_scheduler
    engine, raw, _, scheduler = initialize(
        model=group.model,
        optimizer=optimizer if isinstance(optimizer, torch.optim.Optimizer) else None,
        model_parameters=optimizer.params if isinstance(optimizer, DummyOptim) else None,
        lr_scheduler=None if dummy is None else dummy.lr_scheduler_callable,
        config=own,
        device=facts.device,
    )
    ready: dict[int, Any] = {id(group.model): engine}
    if optimizer is None or raw is None:
        return ready
    wrapped = AcceleratedOptimizer(engine, raw.optimizer)
    ready[id(optimizer)] = wrapped
    if dummy is not None:
        ready[id(dummy)] = EngineScheduler(scheduler, wrapped)
    return ready


def _without_recipes(group: Belongings) -> dict[str, Any]:
    """The JSON's optimizer and scheduler are built only where the script left them to it."""
    update: dict[str, Any] = {}
    if not isinstance(group.optimizer, DummyOptim):
        update["optimizer"] = None
    if group.dummy_scheduler is None:
        update["scheduler"] = None
    return update


def _check_recipes(group: Belongings, described: Mapping[str, Any]) -> None:
    """The four cases of who brings the optimizer and who the scheduler; ``described`` is the JSON."""
    in_json = {key: _type_of(described[key]) for key in ("optimizer", "scheduler") if described.get(key) is not None}
    dummy, real = group.dummy_scheduler, [item for item in group.schedulers if not isinstance(item, DummyScheduler)]
    if isinstance(group.optimizer, DummyOptim):
        if "optimizer" not in in_json:
            raise ConfigError(
                "prepare() got a DummyOptim, but the DeepSpeed config has no optimizer for it to stand for. Add an "
                '"optimizer" to the JSON, or pass a torch optimizer.'
            )
        if real:
            raise ConfigError(
                f"prepare() got a DummyOptim and a {type(real[0]).__name__} over it. With an optimizer of the JSON the "
                "scheduler is a DummyScheduler: of the JSON, or with lr_scheduler_callable=."
            )
    elif group.optimizer is not None and "optimizer" in in_json:
        raise ConfigError(
            f"prepare() got a {type(group.optimizer).__name__}, and the DeepSpeed config has an optimizer "
            f"({in_json['optimizer']}) of its own. Pass DummyOptim(...) for the JSON's, or take it out of the JSON."
        )
    if dummy is not None and "scheduler" not in in_json and dummy.lr_scheduler_callable is None:
        raise ConfigError(
            "prepare() got a DummyScheduler, but the DeepSpeed config has no scheduler for it to stand for. Add a "
            '"scheduler" to the JSON, or pass DummyScheduler(..., lr_scheduler_callable=...).'
        )
    if real and "scheduler" in in_json:
        raise ConfigError(
            f"prepare() got a {type(real[0]).__name__}, and the DeepSpeed config has a scheduler "
            f"({in_json['scheduler']}) of its own. Pass DummyScheduler(...) for the JSON's, or take it out of the JSON."
        )


def _type_of(recipe: Any) -> str:
    return str(recipe.get("type")) if isinstance(recipe, dict) else str(recipe)


def _attached(optimizer: torch.optim.Optimizer, engine: Engine) -> AcceleratedOptimizer:
    return AcceleratedOptimizer(engine, engine.attach_optimizer(optimizer).optimizer)


def _wrap_left_schedulers(objects: Sequence[Any], ready: dict[int, Any], facts: RunFacts) -> None:
    """The script's own schedulers, over optimizers of this prepare or of an earlier one."""
    for item in objects:
        if not _is_scheduler(item) or id(item) in ready:
            continue
        wrapped = ready.get(id(item.optimizer))
        if isinstance(item.optimizer, AcceleratedOptimizer):
            wrapped = item.optimizer
        if not isinstance(wrapped, AcceleratedOptimizer):
            raise ConfigError(
                f"prepare() got a {type(item).__name__} whose optimizer is not prepared with it. {ADVICE}"
            )
        ready[id(item)] = AcceleratedScheduler(
            item, wrapped, facts.step_scheduler_with_optimizer, facts.split_batches, facts.num_processes
        )
