"""When gradients travel: as units become complete, but in one order that all ranks agree on.

A unit whose gradients are complete is reduced when its turn has come; units that got no gradient on this rank are
reduced at the end of the pass, with zeros. So every rank reduces the same units in the same order whatever its own
backward pass did: conditional branches and unused parameters need no special case. The order is at first the reverse of
construction; once all ranks have seen one and the same order of completion, that one is taken.

Gradients that rest whole are reduced once a step, in its last backward pass. Which one is the last nobody knows before
``step``, unless the user marks it: the reducer expects as many passes as the step before had. In the first step, and in
a step with fewer passes, the reduction happens in ``step``; more passes than expected are reduced in another round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardwise.comm.base import Pending
from shardwise.zero.early_steps import EarlySteps
from shardwise.zero.unit import Unit

MAX_IN_FLIGHT = 1
"""Units whose gradient buffers may travel while the next one is filled."""


class Reducer:
    """Reduces units in an agreed order.

    Args:
        units: all units.
        overlap: start a reduction without waiting for its end.
        forgets: the transport lets reductions be dropped.
        early: told of each unit's reduction.
    """

    def __init__(self, units: Iterable[Unit], overlap: bool, forgets: bool, early: EarlySteps) -> None:
        self._forgets = forgets
        self._early = early
        self._units: list[Unit] = [unit for unit in units if unit.trainable]
        self._order: list[Unit] = self._units[::-1]
        self._overlap = overlap
        self._in_flight: list[tuple[Unit, list[Pending]]] = []
        self._complete: set[Unit] = set()
        self._next = 0
        self._completed_order: list[Unit] = []
        self.num_passes = 0
        """Backward passes since the last step."""
        self._expected_passes: int | None = None

    @property
    def units(self) -> Sequence[Unit]:
        """All units with trainable parameters, in the order of construction."""
        return self._units

    @property
    def observed_order(self) -> tuple[int, ...]:
        """Indices of the units in the order in which the last pass completed them; empty unless it completed all."""
        return tuple(unit.index for unit in self._completed_order) if self._is_whole_pass() else ()

    def _is_whole_pass(self) -> bool:
        return len(self._completed_order) == len(self._units)

    def learn(self, same_order: bool, num_passes: int | None) -> None:
        """What all ranks saw alike in the step that ends is expected of the next one."""
        if same_order:
            self._order = list(self._completed_order)
        self._expected_passes = num_passes

    @property
    def expects_last_pass(self) -> bool:
        """Whether the pass that begins is expected to be the last one of its step."""
        return self.num_passes + 1 == self._expected_passes

    def begin(self, reduces: bool) -> None:
        """A backward pass starts, in which units are reduced or not."""
        self._early.begin_pass(self._order, reduces)
        self._begin()

    def _begin(self) -> None:
        self._complete.clear()
        self._completed_order.clear()
        self._next = 0

    def complete(self, unit: Unit, step: int) -> None:
        """The gradients of ``unit`` are all there: reduce it and what waited for it, if it is its turn."""
        self._completed_order.append(unit)
        self._complete.add(unit)
        while self._next < len(self._order) and self._order[self._next] in self._complete:
            self._start(self._order[self._next], step)
            self._next += 1

    def end(self, step: int) -> None:
        """The pass is over: reduce the rest, with zeros where this rank has no gradient, and wait for all."""
        for unit in self._order[self._next :]:
            self._start(unit, step)
        self._next = len(self._order)
        self._finish(keep=0)
        self._early.end_pass()

    def reduce_now(self, units: Iterable[Unit], step: int) -> None:
        """Reduce what was left over by passes that did not reduce; all ranks name the same units."""
        for unit in units:
            self._start(unit, step)
        self._finish(keep=0)

    def _start(self, unit: Unit, step: int) -> None:
        self._finish(keep=MAX_IN_FLIGHT - 1)
        self._early.prepare(unit)
        self._in_flight.append((unit, unit.reduce(step)))
        if not self._overlap:
            self._finish(keep=0)

    def _finish(self, keep: int) -> None:
        while len(self._in_flight) > keep:
            unit, reductions = self._in_flight.pop(0)
            for pending in reductions:
                pending.wait()
            self._early.reduced(unit)

    def finish(self) -> None:
        """Wait for all that travels."""
        self._finish(keep=0)

    def abandon(self) -> None:
        """A pass was given up: forget what waited, and what travels or its result."""
        self._early.abandon()
        if self._forgets:
            self._in_flight.clear()
        self._finish(keep=0)
        self._begin()
