"""The house is checked at the door: what must hold of every unit at the boundaries of a step."""

from __future__ import annotations

from collections.abc import Iterable

from shardwise.errors import StateError
from shardwise.zero.unit import ShardedState, TrainingState, Unit


def check_ready(unit: Unit, moment: str) -> None:
    """A unit whose module is about to run must be whole."""
    if unit.state is not ShardedState.UNSHARDED:
        raise StateError(
            f"unit {unit.name!r} is {unit.state.name} {moment}: expected UNSHARDED. "
            "A hook of the unit was bypassed: call the module itself, not its forward method."
        )


def check_home(units: Iterable[Unit], moment: str) -> None:
    """Between passes every sharded unit rests as a shard and is idle."""
    for unit in units:
        if unit.training_state is not TrainingState.IDLE:
            raise StateError(f"unit {unit.name!r} is still in {unit.training_state.name} {moment}: expected IDLE.")
        if unit.is_sharded and unit.state is not ShardedState.SHARDED:
            raise StateError(f"unit {unit.name!r} is still {unit.state.name} {moment}: expected SHARDED.")


def check_reduced(units: Iterable[Unit], moment: str) -> None:
    """Before the optimizer steps, no gradient may be left on one rank alone."""
    for unit in units:
        if unit.has_unreduced:
            raise StateError(f"unit {unit.name!r} holds a gradient that was not averaged over ranks {moment}.")


def refuse_copy(unit: Unit) -> None:
    """A copy of parameters that rest as shards would hold NaN."""
    if unit.is_sharded and not unit.is_whole:
        raise StateError(
            f"the model was to be copied or pickled while unit {unit.name!r} is sharded: the copy would hold NaN. "
            "Do it inside engine.gathered_parameters(), which every rank enters."
        )
