"""A unit: the parameters of one module, that are made whole, reduced and put away together.

A unit knows no autograd, no order and no stage. It can be driven by hand::

    unit.unshard(step); unit.wait_unsharded()       the module may run
    unit.reshard()                                   only shards rest
    unit.take_gradient(parameter, keep=False)        ... for each parameter, in backward
    for pending in unit.reduce(step): pending.wait() the mean gradient of this rank's shard is there
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import torch
from torch import nn

from shardwise.comm.base import CollectiveId, Communicator, Pending
from shardwise.errors import StateError
from shardwise.layout import Layout
from shardwise.precision import Precision, master_dtype
from shardwise.zero.form import Codes
from shardwise.zero.gradients import GradientHome, OnePass, ResidentGradients, TransientGradients
from shardwise.zero.offload import ON_THE_DEVICE, Places
from shardwise.zero.offloaded_gradients import OffloadedGradients
from shardwise.zero.offloaded_parameters import OffloadedParameters
from shardwise.zero.parameters import ParameterHome, ResidentParameters, ShardedParameters
from shardwise.zero.shard_states import ShardStates
from shardwise.zero.sharding import Sharding


class ShardedState(Enum):
    """Whether the unit's parameters are whole."""

    SHARDED = auto()
    UNSHARDED = auto()


class TrainingState(Enum):
    """Where in a training step the unit is."""

    IDLE = auto()
    FORWARD = auto()
    PRE_BACKWARD = auto()


@dataclass(frozen=True, slots=True)
class Segment:
    """One flat buffer of a unit: parameters of one dtype, all trainable or all frozen, under one row of the table."""

    layout: Layout
    names: tuple[str, ...]
    dtype: torch.dtype
    trainable: bool
    sharding: Sharding
    parameters: ParameterHome
    gradients: GradientHome | None = None
    """None for frozen parameters, and for all where there is no optimizer."""
    places: Places = ON_THE_DEVICE
    codes: Codes | None = None
    """What the shard rests as, if not as values."""

    @property
    def states(self) -> ShardStates | None:
        """Where the optimizer's side rests, if it is off the device."""
        return self.places.states

    def resting_bytes(self) -> tuple[int, int, int]:
        """Bytes at rest of parameters, gradients and separate masters: what is allocated, not what should be."""
        parameters, masters = self.parameters.resting_bytes()
        gradients = self.gradients.resting_tensors() if self.gradients is not None else []
        return parameters, sum(t.nbytes for t in gradients), masters


def build_segment(
    comm: Communicator,
    layout: Layout,
    parameters: Sequence[nn.Parameter],
    sharding: Sharding,
    precision: Precision,
    places: Places = ON_THE_DEVICE,
    codes: Codes | None = None,
) -> Segment:
    """Choose the home that a row of the table names; the parameters become views into the flat buffer.

    Args:
        comm: the transport.
        layout: slots and cuts.
        parameters: in the order of ``layout.slots``; one dtype, all trainable or all frozen.
        sharding: who holds what.
        precision: dtypes of compute and travel.
        places: where the states rest.
        codes: what a sharded buffer that no optimizer steps rests as.
    """
    dtype = precision.of_parameter(parameters[0])
    span = comm.my_span(layout.cuts) if sharding.optimizer else layout.whole
    home: ParameterHome
    if places.parameters is not None:
        home = OffloadedParameters(
            comm, layout, parameters, dtype, span, places.parameters, places.states, places.trained, codes
        )
    elif sharding.parameter:
        home = ShardedParameters(comm, layout, parameters, dtype, span, places.states, codes)
    else:
        home = ResidentParameters(comm, layout, parameters, dtype, span, places.states)
    names = tuple(slot.name for slot in layout.slots)
    trainable = parameters[0].requires_grad
    return Segment(layout, names, dtype, trainable, sharding, home, places=places, codes=codes)


def with_gradients(comm: Communicator, segment: Segment, precision: Precision, contiguous: bool) -> Segment:
    """The same segment with room for gradients, as its row says.

    Args:
        comm: the transport.
        segment: a trainable one.
        precision: dtypes of compute and travel.
        contiguous: False keeps gradients as autograd makes them until the unit is reduced.
    """
    # Of one rank alone nothing travels: gradients stay as autograd made them, and sums of them are not rounded.
    alone = comm.world.size == 1
    dtype, travel = master_dtype(segment.dtype), segment.dtype
    if not alone and precision.communication is not None:
        travel = precision.communication
    gradients: GradientHome
    if segment.sharding.gradient:
        one_pass = OnePass(comm, segment.layout, dtype, travel, contiguous)
        states = segment.states
        gradients = (
            TransientGradients(comm, dtype, one_pass)
            if states is None
            else OffloadedGradients(comm, dtype, one_pass, states)
        )
    else:
        sums_travel = dtype if alone else travel
        gradients = ResidentGradients(comm, segment.layout, dtype, sums_travel, segment.parameters.master_span)
    return replace(segment, gradients=gradients)


class Unit:
    """The segments of one module and the state that they are in."""

    def __init__(
        self, name: str, index: int, module: nn.Module, segments: Sequence[Segment], rounds: bool = False
    ) -> None:
        """``rounds``: gathered parameters differ from those at rest."""
        self.name = name
        self.index = index
        self.module = module
        self.segments = tuple(segments)
        self.is_sharded = any(segment.sharding.parameter for segment in segments)
        self.numel_sharded = sum(s.layout.numel for s in segments if s.sharding.parameter)
        """Elements that a gather makes whole: what budgets of live parameters count."""
        self.state = ShardedState.SHARDED if self.is_sharded else ShardedState.UNSHARDED
        self.training_state = TrainingState.IDLE
        self.forwards_in_graph = 0
        """Calls of the module whose backward has not ended yet."""
        self.is_outdated = False
        """Whether its step has begun before all gradients of the step under way were known."""
        self._num_taken = 0
        self._waiting_for_gather = False
        self._rounds = rounds
        self._is_exact = not self.is_sharded
        self.replace_segments(segments)

    def replace_segments(self, segments: Sequence[Segment]) -> None:
        """The same buffers with other groups in their layouts, or with gradients: an optimizer took them over."""
        self.segments = tuple(segments)
        self.trainable = tuple((s, s.gradients) for s in segments if s.gradients is not None)
        self.num_gradients = sum(len(segment.layout.slots) for segment, _ in self.trainable)
        self.used = [bytearray(len(segment.layout.slots)) for segment, _ in self.trainable]
        """One flag a trainable parameter: it got a gradient since the last ``clear_gradients``."""

    @property
    def is_whole(self) -> bool:
        """Whether the parameters may be read, or will be once they were waited for."""
        return self.state is ShardedState.UNSHARDED

    # ----------------------------------------------------------------------------------------------- parameters

    def fetch(self) -> bool:
        """Start bringing this rank's shards near; False where there is no room for them now."""
        return self.is_whole or all(segment.parameters.fetch() for segment in self.segments)

    def forget_fetched(self) -> None:
        """What was fetched ahead is not needed, or will be outdated."""
        for segment in self.segments:
            segment.parameters.forget_fetched()

    def unshard(self, step: int, exact: bool = False) -> None:
        """Start making the parameters whole; nothing happens where they are, or are on their way.

        ``exact``: as they rest, for those who read or change them; passes may compute with rounded ones.
        """
        if self.state is ShardedState.UNSHARDED:
            if self._is_exact or not exact:
                return
            self.reshard()
        for number, segment in enumerate(self.segments):
            segment.parameters.unshard(self._identity("all-gather", number, step), exact)
        self._is_exact = exact or not self._rounds
        self.state = ShardedState.UNSHARDED
        self._waiting_for_gather = True

    def wait_unsharded(self) -> None:
        """Return when the module may run."""
        if self.state is not ShardedState.UNSHARDED:
            raise StateError(f"unit {self.name!r} is {self.state.name}: expected UNSHARDED before it is waited for.")
        if self.is_outdated:
            raise StateError(self._says_outdated())
        if self._waiting_for_gather:
            for segment in self.segments:
                segment.parameters.wait_unsharded()
            self._waiting_for_gather = False

    def _says_outdated(self) -> str:
        return (
            f"unit {self.name!r} was needed after all its gradients had come, but shardwise.step_in_backward has begun "
            "its step then: its values are new in part. Set the key to false for a model that does so."
        )

    def reshard(self) -> None:
        """Put the whole parameters away; only shards rest."""
        if self.is_sharded and self.state is ShardedState.UNSHARDED:
            for segment in self.segments:
                segment.parameters.reshard()
            self.state = ShardedState.SHARDED
            self._waiting_for_gather = False

    def publish(self, step: int) -> Iterator[Pending]:
        """After the optimizer: bring new values to the ranks that hold whole parameters."""
        for number, segment in enumerate(self.segments):
            if segment.gradients is not None:
                yield segment.parameters.publish(self._identity("publication", number, step))

    # ------------------------------------------------------------------------------------------------ gradients

    def take_gradient(self, segment: int, slot: int, gradient: torch.Tensor, keep: bool) -> bool:
        """Take one parameter's gradient; True when it was the last of this backward pass that was expected."""
        if self.is_outdated:
            raise StateError(self._says_outdated())
        self.trainable[segment][1].add(slot, gradient, keep)
        self.used[segment][slot] = 1
        self._num_taken += 1
        return self._num_taken == self.num_gradients

    @property
    def all_used(self) -> bool:
        """Whether every trainable parameter got a gradient since the last ``clear_gradients``."""
        return all(all(flags) for flags in self.used)

    @property
    def has_unreduced(self) -> bool:
        """Whether a gradient came since the last reduction."""
        return any(gradients.has_unreduced for _, gradients in self.trainable)

    def reduce(self, step: int) -> list[Pending]:
        """Start averaging over ranks what is unreduced; ranks without a gradient take part with zeros."""
        return [
            gradients.reduce(self._identity("reduce-scatter", number, step))
            for number, (_, gradients) in enumerate(self.trainable)
        ]

    def spread_gradients(self, step: int) -> Iterator[Pending]:
        """Start bringing the averaged gradients to optimizers that step more than their own shard."""
        for number, (_, gradients) in enumerate(self.trainable):
            pending = gradients.spread(self._identity("all-gather of gradients", number, step))
            if pending is not None:
                yield pending

    def begin_backward(self) -> None:
        """Count gradients from zero."""
        self._num_taken = 0

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        self._num_taken = 0
        self.is_outdated = False
        for flags, (_, gradients) in zip(self.used, self.trainable, strict=True):
            flags[:] = bytes(len(flags))
            gradients.clear()

    # --------------------------------------------------------------------------------------------------- memory

    def live_bytes(self) -> int:
        """Bytes beyond the resting states at this moment: whole parameters and borrowed gradient buffers."""
        whole = sum(
            segment.parameters.full.untyped_storage().nbytes()
            for segment in self.segments
            if segment.sharding.parameter
        )
        return whole + sum(t.nbytes for _, gradients in self.trainable for t in gradients.transient_tensors())

    def _identity(self, operation: str, number: int, step: int) -> CollectiveId:
        return CollectiveId(operation, self.name if number == 0 else f"{self.name}[{number}]", step)
