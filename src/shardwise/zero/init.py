"""``initialize``: from a model and a configuration to an engine."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from shardwise.comm.base import Communicator
from shardwise.config import BatchSizes, EngineConfig
from shardwise.config.load import load_silently, open_source, warn
from shardwise.config.messages import dotted
from shardwise.config.rules import faults_of_offload
from shardwise.errors import ConfigError
from shardwise.mesh import DEFAULT_TIMEOUT, init_distributed
from shardwise.monitor.printing import make_audible, set_log_level
from shardwise.monitor.writers import check_packages
from shardwise.optim.json_optimizers import build_optimizer
from shardwise.optim.probe import OptimizerTraits
from shardwise.optim.schedulers import build_scheduler
from shardwise.precision import Precision
from shardwise.zero.assembly import (
    Blueprint,
    alignment_of,
    build_units,
    check_same_model,
    choose_loss_scaler,
    choose_precision,
    configuration_text,
    describe_optimizer,
    measure_optimizer,
    optimizer_groups,
    plan_blueprints,
    plan_layouts,
    plan_places,
)
from shardwise.zero.connection import build_training_mesh, connect
from shardwise.zero.construction import refuse_inside
from shardwise.zero.dump import describe_state
from shardwise.zero.engine import Engine
from shardwise.zero.engine_optimizer import EngineOptimizer
from shardwise.zero.observed import ObservedEngine, build_observers, engine_class
from shardwise.zero.offload import choose_offload
from shardwise.zero.offloading import Offloading
from shardwise.zero.optimizer import describe
from shardwise.zero.pieces import check_have_values, release_modules
from shardwise.zero.schedule import Budgets
from shardwise.zero.unit import Unit
from shardwise.zero.wrap import UnitPlan

logger = logging.getLogger(__name__)

OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[Any]], torch.optim.Optimizer]
SchedulerLike = torch.optim.lr_scheduler.LRScheduler | Callable[[torch.optim.Optimizer], Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: OptimizerLike | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: SchedulerLike | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | Path | Mapping[str, Any] | EngineConfig | None = None,
    *,
    device: str | torch.device | None = None,
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> tuple[Engine, EngineOptimizer | None, DataLoader[Any] | None, Any]:
    """Wrap ``model`` into an engine that shards its training states as ``config`` says. Collective.

    Args:
        args: an object with ``deepspeed_config``, used where ``config`` is None (what argparse returned, say).
        model: any module, built in one piece or under ``zero.Init``; its parameters become views into the engine's
            buffers. Rank 0's values are used on all ranks.
        optimizer: a torch optimizer over the model's parameters, or a callable that builds one from parameters. None:
            the one that the configuration describes, else none: the engine then only runs the model, until
            ``engine.attach_optimizer``.
        model_parameters: what the callable or the configuration's optimizer gets; default ``model.parameters()``.
        training_data: a dataset to build a distributed loader of ``train_micro_batch_size_per_gpu`` samples for.
        lr_scheduler: a scheduler that ``engine.step`` advances, or a callable that builds one from the optimizer. None:
            the one that the configuration describes, else none.
        collate_fn: for the loader.
        config: a DeepSpeed configuration: path, mapping, base64 string of JSON, or what ``load_config`` made of one.
        device: "cpu" or "cuda"; default: what the machine has.
        timeout: how long ranks wait for each other.

    Returns:
        ``(engine, optimizer, dataloader, lr_scheduler)``; what was neither given nor configured is None.

    Raises:
        ConfigError: the arguments or the configuration cannot work; before anything is allocated where possible.
    """
    if model is None:
        raise ConfigError("initialize() got no model. Pass model=, a torch.nn.Module.")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"initialize() got a {type(model).__name__} as model. Expected a torch.nn.Module.")
    if isinstance(model, Engine):
        raise ConfigError("initialize() got an engine as model. Use engine.attach_optimizer() to give it an optimizer.")
    if config is None:
        config = getattr(args, "deepspeed_config", None)
    settings, warning = (config, "") if isinstance(config, EngineConfig) else load_silently(open_source(config))
    if settings.log_level is not None:
        set_log_level(settings.log_level)
    check_packages(settings)
    init_distributed(timeout=timeout, device=device)
    _close_at_exit()
    mesh = build_training_mesh(settings, device, timeout)
    if mesh.world.rank == 0:
        warn(warning)
    batch_sizes = settings.resolve_batch(mesh.world.size)

    refuse_inside("initialize()")
    check_have_values(model.named_parameters())
    built = _build_optimizer(model, optimizer, model_parameters, settings)
    groups = optimizer_groups(model, built)
    precision = choose_precision(settings)
    _refuse_offload_without_a_place(settings)
    zero = settings.zero_optimization
    offload = choose_offload(zero.offload_param.device, zero.offload_optimizer.device, mesh.device.type)
    planned = plan_blueprints(model, groups, precision, settings, mesh, offload)
    buffers = [blueprint for _, blueprints in planned for blueprint in blueprints]
    traits = measure_optimizer(built, buffers, mesh.world.size, offload)

    comm = connect(mesh, settings, offload)
    offloading = Offloading(comm, settings, offload, None if built is None else traits)
    try:
        engine, returned = _assemble(model, comm, offloading, planned, built, traits, batch_sizes, precision, settings)
    except BaseException:
        offloading.close()
        comm.close()
        raise
    if returned is not None:
        engine.lr_scheduler = _build_scheduler(lr_scheduler, returned, settings)
    loader = None
    if training_data is not None:
        loader = _build_loader(
            training_data, batch_sizes.train_micro_batch_size_per_gpu, mesh.world.rank, mesh.world.size,
            collate_fn, settings.dataloader_drop_last,
        )  # fmt: skip
    _open_engines.add(engine)
    return engine, returned, loader, engine.lr_scheduler


def _refuse_offload_without_a_place(settings: EngineConfig) -> None:
    faults = [f"{dotted(fault.path)}: {fault.text}" for fault in faults_of_offload(settings)]
    if faults:
        raise ConfigError("\n".join(faults))


def _assemble(
    model: nn.Module,
    comm: Communicator,
    offloading: Offloading,
    planned: Sequence[tuple[UnitPlan, list[Blueprint]]],
    optimizer: torch.optim.Optimizer | None,
    traits: OptimizerTraits,
    batch_sizes: BatchSizes,
    precision: Precision,
    settings: EngineConfig,
) -> tuple[Engine, EngineOptimizer | None]:
    """Check that ranks agree, allocate, and put the engine together."""
    check_same_model(comm, planned, [f"configuration {configuration_text(settings)}", *describe_optimizer(optimizer)])
    layouts = plan_layouts(planned, traits, comm.size, alignment_of(settings))
    places = plan_places(offloading, planned, layouts)
    offloading.open()
    units = build_units(comm, planned, layouts, places, precision)
    release_modules(model.modules())
    _move_buffers(model, comm.device, precision.compute)
    zero = settings.zero_optimization
    budgets = Budgets(zero.stage3_prefetch_bucket_size, zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance)
    build = engine_class(settings, comm.world.rank)
    engine = build(
        model, units, comm, offloading, batch_sizes, precision, choose_loss_scaler(settings), budgets, settings
    )
    returned = None if optimizer is None else engine.attach_optimizer(optimizer, traits)
    if comm.world.rank == 0:
        _start_telling(engine, units, settings)
    return engine, returned


def _start_telling(engine: Engine, units: Sequence[Unit], settings: EngineConfig) -> None:
    """Rank 0 says what the configuration asks it to say."""
    if settings.dump_state or isinstance(engine, ObservedEngine):
        make_audible()
    if settings.dump_state:
        logger.info("state at the start\n%s", describe_state(engine, units, settings))
    if isinstance(engine, ObservedEngine):
        engine.observe(build_observers(engine, settings))


_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_closes_at_exit = False


def _close_at_exit() -> None:
    """At the end of the script close the engines that are still open: their hooks on parameters keep them alive, and
    with them the process group. Registered after the group's own end, so that it comes before.
    """
    global _closes_at_exit
    if not _closes_at_exit:
        _closes_at_exit = True
        atexit.register(_close_engines)


def _close_engines() -> None:
    for engine in list(_open_engines):
        engine.close()


def _build_optimizer(
    model: nn.Module, optimizer: OptimizerLike | None, model_parameters: Iterable[Any] | None, settings: EngineConfig
) -> torch.optim.Optimizer | None:
    """The user's own wins over the configuration's."""
    parameters = list(model_parameters) if model_parameters is not None else list(model.parameters())
    _check_own(model, parameters)
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if callable(optimizer):
        built = optimizer(parameters)
        if not isinstance(built, torch.optim.Optimizer):
            raise ConfigError(f"the optimizer callable returned a {type(built).__name__}, not a torch optimizer.")
        return built
    if optimizer is not None:
        raise ConfigError(f"optimizer is a {type(optimizer).__name__}: expected a torch optimizer or a callable.")
    if settings.optimizer is None:
        return None
    return build_optimizer(settings.optimizer.type, settings.optimizer.params, parameters, model)


def _check_own(model: nn.Module, parameters: list[Any]) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    for entry in parameters:
        members = entry["params"] if isinstance(entry, dict) else [entry]
        for parameter in [members] if isinstance(members, torch.Tensor) else members:
            if id(parameter) not in own:
                raise ConfigError(
                    f"model_parameters holds {describe(parameter)} that is not in the model. Expected parameters, or "
                    "groups of them, of the model that is passed."
                )


def _build_scheduler(lr_scheduler: SchedulerLike | None, optimizer: EngineOptimizer, settings: EngineConfig) -> Any:
    if lr_scheduler is None:
        block = settings.scheduler
        return None if block is None else build_scheduler(block.type, block.params, optimizer.optimizer)
    if isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler):
        return lr_scheduler
    return lr_scheduler(optimizer.optimizer)


def _build_loader(
    data: Dataset[Any],
    batch_size: int,
    rank: int,
    world: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    drop_last: bool,
) -> DataLoader[Any]:
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=world, rank=rank, drop_last=drop_last)
    return DataLoader(data, batch_size=batch_size, sampler=sampler, collate_fn=collate_fn, drop_last=drop_last)


def _move_buffers(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Buffers follow the parameters to the device, and floating-point ones to the compute dtype."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            wanted = dtype if dtype is not None and buffer.is_floating_point() else buffer.dtype
            moved = buffer.to(device=device, dtype=wanted)
            if moved is not buffer:
                setattr(module, name, moved)
