"""What ``dump_state`` prints: the configuration as it was understood, and what was built from it."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.config import EngineConfig
from shardwise.zero.assembly import configuration_text
from shardwise.zero.engine import Engine
from shardwise.zero.unit import Segment, Unit


def describe_state(engine: Engine, units: Sequence[Unit], config: EngineConfig) -> str:
    """The text, for one rank."""
    rows = [
        f"configuration: {configuration_text(config, indent=2)}",
        f"batch: {engine.train_batch_size()} samples a step, {engine.train_micro_batch_size_per_gpu()} a forward and "
        f"rank, {engine.gradient_accumulation_steps()} micro-batches a step",
        f"device of this rank: {engine.device}",
        f"learning rates: {engine.get_lr()}",
        f"loss scale: {engine.loss_scale:g}",
        f"{len(units)} units, the root first:",
        *(f"  {unit.name or '(root)'}: {_describe_segment(s)}" for unit in units for s in unit.segments),
        f"memory of this rank:\n{engine.memory_report()}",
    ]
    return "\n".join(rows)


def _describe_segment(segment: Segment) -> str:
    sharding = segment.sharding
    states = {"optimizer": sharding.optimizer, "gradient": sharding.gradient, "parameter": sharding.parameter}
    sharded = ", ".join(name for name, is_sharded in states.items() if is_sharded)
    numel = sum(slot.numel for slot in segment.layout.slots)
    return (
        f"{numel:,d} {'trainable' if segment.trainable else 'frozen'} elements of {segment.dtype} in "
        f"{len(segment.layout.slots)} parameters, {f'sharded: {sharded}' if sharded else 'nothing sharded'}"
    )
