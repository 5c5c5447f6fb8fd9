"""Where an engine holds a parameter: what those need who come with nothing but the parameter."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Protocol

import torch

from shardwise.comm.base import Communicator
from shardwise.layout import Layout, Slot, Span
from shardwise.mesh import build_mesh
from shardwise.zero.parameters import ParameterHome
from shardwise.zero.pieces import Ranks
from shardwise.zero.rest import Rest
from shardwise.zero.schedule import Schedule
from shardwise.zero.step import Step
from shardwise.zero.unit import Segment, Unit


@dataclass(frozen=True)
class Held:
    """One parameter in one engine, at this moment."""

    comm: Communicator
    schedule: Schedule
    step: Step | None
    unit: Unit
    number: int
    """Of the segment in the unit."""
    index: int
    """Of the slot in the segment."""
    loss_scale: float
    global_step: int
    in_backward: bool

    @property
    def segment(self) -> Segment:
        """The flat buffer."""
        return self.unit.segments[self.number]

    @property
    def home(self) -> ParameterHome:
        """Where the buffer's parameters rest."""
        return self.segment.parameters

    @property
    def layout(self) -> Layout:
        """Of the flat buffer."""
        return self.segment.layout

    @property
    def slot(self) -> Slot:
        """The parameter's place in it."""
        return self.layout.slots[self.index]

    @property
    def name(self) -> str:
        """The parameter's full name."""
        return self.slot.name

    @property
    def ranks(self) -> Ranks:
        """Those who share it."""
        return Ranks(build_mesh(self.comm.device))

    def part_of(self, rank: int) -> Span:
        """The elements of the flattened parameter that are in ``rank``'s shard."""
        return self.slot.span.intersect(self.layout.shard(rank)).shift(-self.slot.offset)

    def resting(self, part: Span) -> Rest:
        """Where the values [part] of those elements rest, which must be here."""
        return self.home.resting.part(part.shift(self.slot.offset - self.home.master_span.begin))

    def steps(self) -> Span:
        """The elements of the flattened parameter whose masters rest here."""
        return self.slot.span.intersect(self.home.master_span).shift(-self.slot.offset)


class _Engine(Protocol):
    def holding(self, parameter: torch.Tensor) -> Held | None: ...


_engines: weakref.WeakSet[_Engine] = weakref.WeakSet()


def announce(engine: _Engine) -> None:
    """An engine holds parameters from now on."""
    _engines.add(engine)


def withdraw(engine: _Engine) -> None:
    """It holds none any more."""
    _engines.discard(engine)


def held(parameter: torch.Tensor) -> Held | None:
    """Where ``parameter`` is, if an open engine holds it."""
    for engine in list(_engines):
        found = engine.holding(parameter)
        if found is not None:
            return found
    return None
