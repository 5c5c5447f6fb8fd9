"""Bytes of model states on one rank, before anything is allocated."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from shardwise.config.schema import EngineConfig
from shardwise.errors import ConfigError
from shardwise.layout import Slot, even_layout
from shardwise.topology import divisors
from shardwise.zero.sharding import STAGES, StateBytes, state_bytes

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MASTER_ITEMSIZE = 4  # masters are fp32
_SCALE_BYTES = 4  # so is the scale of a block

# Tensors of the parameter's size that an optimizer keeps. SGD keeps one only if it has momentum.
_STATE_TENSORS = {"adam": 2, "adamw": 2, "nadam": 2, "radam": 2, "adamax": 2, "lion": 1, "adagrad": 1, "rmsprop": 1}


@dataclass(frozen=True)
class StageStates:
    """What one stage leaves on each rank."""

    stage: int
    bytes: StateBytes
    in_force: bool  # the stage of the config


@dataclass(frozen=True)
class States:
    """Model states on one rank at every stage."""

    num_parameters: int
    num_ranks: int
    dtype: str
    optimizer: str
    stages: tuple[StageStates, ...]
    off_the_device: tuple[str, ...]
    """Which of them the config lets rest elsewhere: they are in the table all the same."""
    secondary_bytes: int
    """Of the parameters that hpZ keeps beside, between a step's first gather and its end."""


def parse_count(text: str) -> int:
    """Read ``7B``, ``350M``, ``1.5e9`` or ``124_439_808``."""
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][0-9]+)?)([KMBT]?)", text.strip().upper())
    count = float(match[1].replace("_", "")) * _FACTORS[match[2]] if match else 0.0
    if not 1 <= count < 1e18:
        raise ConfigError(f"--parameters is {text!r}, expected a number of parameters such as 124439808, 350M or 7B.")
    return round(count)


def num_ranks_for(num_processes: int | None) -> int:
    """The ranks that states are shared among; ConfigError where nobody says how many there are."""
    if num_processes is None:
        raise ConfigError("--parameters needs the number of ranks, and the config names none. Add --num_processes W.")
    return num_processes


def states_per_rank(config: EngineConfig | None, num_parameters: int, num_ranks: int) -> States:
    """The bytes at rest on one rank, for the dtype and the optimizer of `config`, at its stage and at the others.

    A run without ZeRO (None) is stage 0 in fp32.
    """
    config = config or EngineConfig()
    optimizer, num_tensors = _optimizer(config)
    compute_itemsize = 4 if config.compute_dtype == "fp32" else 2
    stages = tuple(
        StageStates(stage, found, in_force=stage == config.zero_optimization.stage)
        for stage, found in _at_every_stage(
            num_parameters, num_ranks, _group_size(config, num_ranks), compute_itemsize, num_tensors
        )
    )
    return States(
        num_parameters,
        num_ranks,
        config.compute_dtype,
        optimizer,
        stages,
        tuple(_off_the_device(config)),
        _secondary_bytes(config, num_parameters, compute_itemsize),
    )


def _secondary_bytes(config: EngineConfig, num_parameters: int, compute_itemsize: int) -> int:
    """A shard over the ranks that share one; of codes where parameters travel so."""
    zero, own = config.zero_optimization, config.shardwise
    if zero.zero_hpz_partition_size <= 1:
        return 0
    per_parameter = float(compute_itemsize)
    if zero.zero_quantized_weights:
        per_parameter = (0.5 if own.quantized_weights == "int4" else 1.0) + _SCALE_BYTES / own.quantization_block
    return round(per_parameter * num_parameters / zero.zero_hpz_partition_size)


def _off_the_device(config: EngineConfig) -> Iterator[str]:
    zero = config.zero_optimization
    where = {"cpu": "host memory", "nvme": "files"}
    if zero.offload_optimizer.device in where:
        gradients = "" if zero.stage < 2 else ", gradients"
        yield f"optimizer state, masters{gradients} in {where[zero.offload_optimizer.device]}"
    if zero.offload_param.device in where:
        yield f"parameters in {where[zero.offload_param.device]}"


def _group_size(config: EngineConfig, num_ranks: int) -> int:
    """Ranks that stage 3 shards over."""
    size = config.zero_optimization.mics_shard_size
    if size <= 0:
        return num_ranks
    if num_ranks % size:
        raise ConfigError(
            f"zero_optimization.mics_shard_size: found {size}, which does not divide {num_ranks} ranks. Expected "
            f"{' or '.join(map(str, divisors(num_ranks)))}."
        )
    return size


def _at_every_stage(
    num_parameters: int, num_ranks: int, group_size: int, compute_itemsize: int, num_tensors: int
) -> Iterator[tuple[int, StateBytes]]:
    for stage, row in enumerate(STAGES):
        size = group_size if row.parameter else num_ranks
        layout = even_layout([Slot("model", (num_parameters,), 0)], size)
        sharding = row if size > 1 else STAGES[0]  # one rank alone shards nothing
        stepped = layout.shard(0) if sharding.optimizer else layout.whole
        yield (
            stage,
            state_bytes(
                layout,
                0,
                sharding,
                compute_itemsize,
                _MASTER_ITEMSIZE,
                trainable=True,
                has_gradients=True,
            )
            + StateBytes(0, 0, num_tensors * _MASTER_ITEMSIZE * stepped.numel),
        )


def _optimizer(config: EngineConfig) -> tuple[str, int]:
    if config.optimizer is None:
        return "Adam (the config names none)", 2
    name = config.optimizer.type.lower()
    if name == "sgd":
        return config.optimizer.type, 1 if config.optimizer.params.get("momentum") else 0
    if name in _STATE_TENSORS:
        return config.optimizer.type, _STATE_TENSORS[name]
    return f"{config.optimizer.type}, counted as Adam", 2
