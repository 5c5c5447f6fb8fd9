"""From a model, an optimizer and a configuration to the parts of an engine: every choice is made here, once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from shardwise.comm.base import CollectiveId, Communicator
from shardwise.config import EngineConfig
from shardwise.errors import ConfigError
from shardwise.layout import ALIGNMENT, NO_GROUP, Layout, Slot, even_layout, whole_parameter_layout
from shardwise.mesh import Mesh
from shardwise.optim.probe import OptimizerTraits, probe_optimizer
from shardwise.precision import DynamicLossScaler, LossScaler, Precision, StaticLossScaler, master_dtype
from shardwise.zero.form import Codes
from shardwise.zero.offload import Offload, Places
from shardwise.zero.offloading import Buffer, Offloading
from shardwise.zero.optimizer import describe
from shardwise.zero.sharding import STAGES, Sharding
from shardwise.zero.unit import Segment, Unit, build_segment, with_gradients
from shardwise.zero.wrap import UnitPlan, plan_units

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Blueprint:
    """One flat buffer to be: the parameters of a unit that share dtype, trainability and row."""

    slots: tuple[Slot, ...]
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype
    """The dtype that they compute in."""
    trainable: bool
    sharding: Sharding
    codes: Codes | None = None
    """What it rests as, if not as values."""


def choose_precision(config: EngineConfig) -> Precision:
    """Dtypes of compute and of travelling gradients."""
    compute = None if config.compute_dtype == "fp32" else DTYPES[config.compute_dtype]
    travel = None if config.communication_data_type is None else DTYPES[config.communication_data_type]
    return Precision(compute, travel)


def choose_loss_scaler(config: EngineConfig) -> LossScaler:
    """Dynamic or static for fp16, a constant 1 otherwise."""
    fp16 = config.fp16
    if not config.scales_loss:
        # A NaN makes the whole block that it is quantised in NaN: one that came by such a way is not applied.
        return StaticLossScaler(skips_overflows=config.zero_optimization.zero_quantized_gradients)
    if fp16.loss_scale:
        return StaticLossScaler(fp16.loss_scale, skips_overflows=True)
    return DynamicLossScaler(
        scale=2.0**fp16.initial_scale_power,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        min_scale=fp16.min_loss_scale,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
    )


def configuration_text(config: EngineConfig, indent: int | None = None) -> str:
    """The configuration as JSON, without what must not stand in a log."""
    return config.model_dump_json(indent=indent, exclude={"comet": {"api_key"}})


def is_local(buffers: Iterable[Blueprint | Segment], world: int, offload: Offload) -> bool:
    """Whether nothing travels and every trainable parameter is its own master: torch alone can step it."""
    if world > 1 or offload.is_any:
        return False
    return all(master_dtype(b.dtype) == b.dtype for b in buffers if b.trainable)


def measure_optimizer(
    optimizer: torch.optim.Optimizer | None,
    buffers: Sequence[Blueprint | Segment],
    world: int,
    offload: Offload,
) -> OptimizerTraits:
    """What the optimizer allows; refuses one that needs whole matrices where parameters are sharded."""
    if optimizer is None or is_local(buffers, world, offload):
        return OptimizerTraits(elementwise=True, streamable=True)
    traits = probe_optimizer(optimizer)
    if not traits.elementwise and any(buffer.sharding.parameter for buffer in buffers):
        raise ConfigError(
            f"{type(optimizer).__name__} gives other results on slices of a matrix than on the whole one, and stage 3 "
            "cuts every matrix over the ranks. Use stage 1 or 2, where each matrix is stepped whole on the "
            "rank that owns it, or an elementwise optimizer such as AdamW."
        )
    return traits


def optimizer_groups(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[nn.Parameter, int]:
    """The optimizer group of each of the model's parameters.

    Raises:
        ConfigError: the optimizer holds a tensor that is not a parameter of the model.
    """
    groups: dict[nn.Parameter, int] = {}
    known = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate(optimizer.param_groups if optimizer is not None else []):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise ConfigError(
                    f"the optimizer's group {number} holds {describe(parameter)} that is not in the model. Expected "
                    "only parameters of the model that is passed: build the optimizer over model.parameters()."
                )
            groups[parameter] = number
    return groups


def plan_blueprints(
    model: nn.Module,
    groups: dict[nn.Parameter, int],
    precision: Precision,
    config: EngineConfig,
    mesh: Mesh,
    offload: Offload,
) -> list[tuple[UnitPlan, list[Blueprint]]]:
    """Cut the model into units and each unit into flat buffers."""
    zero = config.zero_optimization
    leaf = zero.leaf_module
    plans = plan_units(
        model,
        unit_classes=config.shardwise.unit_classes or (),
        leaf_classes=(*zero.zero_leaf_modules, *leaf.classes),
        leaf_names=leaf.names,
        leaf_name_suffixes=leaf.name_suffixes,
    )
    # An axis of one rank shards nothing: the row of plain data parallelism. What rests off the device does so in
    # shards, also of one.
    row = STAGES[zero.stage] if mesh.dp_shard.size > 1 or offload.is_any else STAGES[0]
    format = format_of_frozen(config)
    at_rest = None if format is None else Codes(format, config.shardwise.quantization_block, mesh.device)
    persistent_row = Sharding(row.optimizer, row.gradient, parameter=False)
    threshold = zero.stage3_param_persistence_threshold or 0
    planned = []
    for plan in plans:
        buffers: dict[tuple[torch.dtype, bool, bool], dict[str, nn.Parameter]] = {}
        for name, parameter in plan.parameters.items():
            key = (precision.of_parameter(parameter), parameter.requires_grad, parameter.numel() < threshold)
            buffers.setdefault(key, {})[name] = parameter
        blueprints = []
        for (dtype, trainable, persistent), parameters in buffers.items():
            slots = tuple(
                Slot(name, tuple(p.shape), groups.get(p, NO_GROUP) if trainable else NO_GROUP)
                for name, p in parameters.items()
            )
            codes = None if persistent or (trainable and groups) else at_rest
            # Codes are fewer bytes than values on one rank, too.
            sharding = persistent_row if persistent else row if codes is None else STAGES[zero.stage]
            blueprints.append(Blueprint(slots, parameters, dtype, trainable, sharding, codes))
        planned.append((plan, blueprints))
    return planned


def format_of_frozen(config: EngineConfig) -> str | None:
    """The format that parameters rest in which no optimizer steps; None: as values."""
    zero, own = config.zero_optimization, config.shardwise
    return own.frozen_weights or ("int8" if zero.zero_quantized_nontrainable_weights else None)


def describe_optimizer(optimizer: torch.optim.Optimizer | None) -> list[str]:
    """Class and settings, one line a group; equal for optimizers that step alike."""
    if optimizer is None:
        return ["no optimizer"]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return [f"optimizer {type(optimizer).__name__}, group {i}: {group}" for i, group in enumerate(groups)]


def check_same_model(
    comm: Communicator, planned: Sequence[tuple[UnitPlan, list[Blueprint]]], settings: Sequence[str]
) -> None:
    """Every rank must build the same buffers, or collectives would mix them.

    Raises:
        ConfigError: names the first parameter or setting that differs, and the rank.
    """
    lines = [*settings]
    for plan, blueprints in planned:
        for blueprint in blueprints:
            for slot in blueprint.slots:
                parameter = blueprint.parameters[slot.name]
                kind = "trainable" if parameter.requires_grad else "frozen"
                lines.append(
                    f"parameter {slot.name!r} of shape {slot.shape}, {parameter.dtype}, {kind}, in unit {plan.name!r}, "
                    f"optimizer group {slot.group}"
                )
    mine = "\n".join(lines)
    for rank, other in enumerate(comm.exchange(CollectiveId("comparison of models", "", 0), mine.encode())):
        theirs = other.decode().split("\n")
        if theirs == lines:
            continue
        for i in range(max(len(lines), len(theirs))):
            here = lines[i] if i < len(lines) else "nothing"
            there = theirs[i] if i < len(theirs) else "nothing"
            if here != there:
                raise ConfigError(
                    f"ranks have different models or settings: rank {comm.world.rank} has {here}, rank {rank} has "
                    f"{there}. Build the same model with the same configuration on every rank."
                )


def plan_layouts(
    planned: Sequence[tuple[UnitPlan, list[Blueprint]]], traits: OptimizerTraits, world: int, alignment: int
) -> list[Layout]:
    """The layout of each blueprint, in order; ``alignment`` of parameters and shards where these are even."""
    loads = [0] * world
    layouts: list[Layout] = []
    for blueprint in (blueprint for _, blueprints in planned for blueprint in blueprints):
        owned_whole = not traits.elementwise and any(slot.group != NO_GROUP for slot in blueprint.slots)
        layouts.append(
            whole_parameter_layout(blueprint.slots, loads)
            if owned_whole
            else even_layout(blueprint.slots, world, alignment)
        )
    return layouts


def alignment_of(config: EngineConfig) -> int:
    """Elements; blocks that are quantised never hold values of two parameters or two shards."""
    zero = config.zero_optimization
    quantizes = zero.zero_quantized_weights or zero.zero_quantized_gradients or format_of_frozen(config) is not None
    return config.shardwise.quantization_block if quantizes else ALIGNMENT


def plan_places(
    offloading: Offloading, planned: Sequence[tuple[UnitPlan, list[Blueprint]]], layouts: Sequence[Layout]
) -> list[Places]:
    """Where the states of each blueprint will rest; room for them is reserved. Collective."""
    blueprints = [blueprint for _, blueprints in planned for blueprint in blueprints]
    return offloading.plan(
        [
            Buffer(layout, blueprint.dtype, blueprint.trainable, blueprint.sharding, blueprint.codes)
            for blueprint, layout in zip(blueprints, layouts, strict=True)
        ]
    )


def build_units(
    comm: Communicator,
    planned: Sequence[tuple[UnitPlan, list[Blueprint]]],
    layouts: Sequence[Layout],
    places: Sequence[Places],
    precision: Precision,
) -> list[Unit]:
    """Allocate the flat buffers of parameters and make the model's parameters views into them; the root comes first."""
    chosen = iter(zip(layouts, places, strict=True))
    units = []
    for index, (plan, blueprints) in enumerate(planned):
        segments = []
        for blueprint in blueprints:
            layout, place = next(chosen)
            parameters = [blueprint.parameters[slot.name] for slot in layout.slots]
            segments.append(
                build_segment(comm, layout, parameters, blueprint.sharding, precision, place, blueprint.codes)
            )
        units.append(Unit(plan.name, index, plan.module, segments, comm.rounds_gathers))
    return units


def equip_with_gradients(
    comm: Communicator,
    units: Sequence[Unit],
    groups: dict[nn.Parameter, int],
    precision: Precision,
    contiguous_gradients: bool,
) -> None:
    """Give every trainable segment room for gradients, and its slots the optimizer groups that they are in."""
    for unit in units:
        segments = []
        for segment in unit.segments:
            if segment.trainable and segment.codes is not None:
                raise ConfigError(
                    f"an optimizer came to an engine that was built without one, and whose parameters rest quantised, "
                    f"{segment.names[0]!r} among them. Pass the optimizer to initialize(), or drop "
                    "shardwise.frozen_weights and zero_quantized_nontrainable_weights."
                )
            if segment.trainable:
                slots = tuple(
                    replace(slot, group=groups.get(parameter, NO_GROUP))
                    for slot, parameter in zip(segment.layout.slots, segment.parameters.parameters, strict=True)
                )
                segment = replace(segment, layout=Layout(slots, segment.layout.cuts))
                segment = with_gradients(comm, segment, precision, contiguous_gradients)
            segments.append(segment)
        unit.replace_segments(segments)
