"""Steps beside backward: a unit whose states rest off the device is stepped as soon as its gradient is reduced.

::

    backward   | unit 3   | unit 2   | unit 1   |          this thread, or autograd's
    reduction    ......| 3        | 2        | 1           each ends with a hand-over
    step               | 3        | 2        | 1  |        a thread of its own: reads, arithmetic, writes
    step()                                      |--|       agrees, steps what is left, publishes

Only the backward pass that ends an accumulation does so, and only with units of which this rank has a gradient for each
trainable parameter: which of the others are unused on all ranks is not known before ``step``. What is left to ``step``
is what these two leave, and what rests on the device.

The reduced gradient lands in memory, waits there for its step and is not written to the store: two units' worth of it,
one that is reduced and one that is stepped. Backward waits where steps do not keep up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

import torch

from shardwise.errors import StateError
from shardwise.store.aligned import Slab
from shardwise.store.base import Transfer, round_up
from shardwise.zero.offloaded_gradients import OffloadedGradients
from shardwise.zero.offloading import Offloading
from shardwise.zero.streamed_optimizer import StreamedOptimizer
from shardwise.zero.unit import Unit
from shardwise.zero.window_stream import WindowStream
from shardwise.zero.worker import Worker

KEY = "shardwise.step_in_backward"
NUM_LANDINGS = 2
"""Units whose reduced gradients are in memory at a time."""


class EarlySteps(Protocol):
    """What is stepped before ``step`` is called."""

    begins_steps: bool
    """Whether anything may be."""

    def begin_pass(self, order: Sequence[Unit], reduces: bool) -> None:
        """A backward pass begins, in which units will be reduced in this order, if at all.

        Raises:
            StateError: the pass before it has begun a step that was not finished.
        """

    def prepare(self, unit: Unit) -> None:
        """The unit's reduction is about to start."""

    def reduced(self, unit: Unit) -> None:
        """It has ended."""

    def end_pass(self) -> None:
        """The pass is over, all is reduced."""

    def abandon(self) -> None:
        """The pass was given up."""

    def check(self, boundary: bool) -> None:
        """``step`` was called, where a step ends (``boundary``) or not.

        Raises:
            StateError: that does not fit to what the last pass has begun.
        """

    @contextmanager
    def finishing(self) -> Iterator[frozenset[Unit]]:
        """The units that are stepped already; the step is over at the end of the block."""

    def refuse(self, caller: str) -> None:
        """StateError if a step has begun and is not finished."""

    def refuse_under_way(self, caller: str) -> None:
        """The same, unless it was given up: ``mend`` may follow."""

    def mend(self) -> None:
        """The whole state was replaced: what was given up does not matter any more."""

    def rest(self) -> None:
        """Return when nothing is stepped at this moment."""

    def close(self) -> None:
        """End what is under way."""


class NoEarlySteps:
    """``step`` steps everything."""

    begins_steps = False

    def begin_pass(self, order: Sequence[Unit], reduces: bool) -> None:
        """Gradients are kept for ``step``."""

    def prepare(self, unit: Unit) -> None:
        """Its gradient is kept."""

    def reduced(self, unit: Unit) -> None:
        """Its gradient waits for ``step``."""

    def end_pass(self) -> None:
        """Nothing was begun."""

    def abandon(self) -> None:
        """Nothing was begun."""

    def check(self, boundary: bool) -> None:
        """It always fits."""

    @contextmanager
    def finishing(self) -> Iterator[frozenset[Unit]]:
        """None."""
        yield frozenset()

    def refuse(self, caller: str) -> None:
        """Everything is allowed."""

    def refuse_under_way(self, caller: str) -> None:
        """Everything is allowed."""

    def mend(self) -> None:
        """Nothing is broken."""

    def rest(self) -> None:
        """Nothing is."""

    def close(self) -> None:
        """Nothing is under way."""


class _Moment(Enum):
    IDLE = auto()
    """No step has begun."""
    PASS = auto()
    """The backward pass that ends an accumulation is under way."""
    READY = auto()
    """It is over, and ``step`` is expected."""
    BROKEN = auto()
    """It was given up, or its step failed: some units are stepped, others are not."""


class StepsInBackward:
    """See the module's text.

    Args:
        optimizer: steps units one by one.
        units: all units, with room for gradients.
        offloading: where their states rest.
        ends_step: whether the next ``step`` acts.
        take_in_new_groups: makes the optimizer know groups that were added to it.
    """

    begins_steps = True

    def __init__(
        self,
        optimizer: StreamedOptimizer,
        units: Sequence[Unit],
        offloading: Offloading,
        ends_step: Callable[[], bool],
        take_in_new_groups: Callable[[], None],
    ) -> None:
        self._optimizer = optimizer
        self._beside = offloading.beside
        self._ends_step = ends_step
        self._take_in_new_groups = take_in_new_groups
        self._homes = {unit: _homes_of(unit) for unit in units}
        sizes = [sum(map(_room_of, homes)) for homes in self._homes.values()]
        self._landings = offloading.open_landings(NUM_LANDINGS, max(sizes, default=0))
        self._worker = Worker("shardwise-step", self._beside.apart)
        self._moment = _Moment.IDLE
        self._settings: list[dict[str, Any]] = []
        """Those of the optimizer's groups when the first unit was stepped."""
        self._stream: WindowStream | None = None
        self._prepared: dict[Unit, Slab | None] = {}
        """Units under reduction, and what their gradients land in."""
        self._stepped: set[Unit] = set()

    # --------------------------------------------------------------------------------------------------- backward

    def begin_pass(self, order: Sequence[Unit], reduces: bool) -> None:
        """Where the pass ends an accumulation the first windows are read at once."""
        self.refuse("another backward pass")
        if not (reduces and self._ends_step()):
            return
        self._take_in_new_groups()
        self._settings = _settings_of(self._optimizer.inner)
        self._stream = self._optimizer.early_stream(order)
        self._worker.put(self._stream.read_ahead)
        self._moment = _Moment.PASS

    def prepare(self, unit: Unit) -> None:
        """Give its gradient memory to land in, when a unit before it has been stepped."""
        if self._moment is not _Moment.PASS or not self._optimizer.streams(unit) or not unit.all_used:
            return
        landing, homes = None, self._homes[unit]
        if homes:
            self._worker.wait_until(self._landings.has_free)
            landing, begin = self._landings.take(), 0
            for home in homes:
                home.land_in(landing.part(begin, _room_of(home)))
                begin += _room_of(home)
        unit.is_outdated = True
        self._prepared[unit] = landing

    def reduced(self, unit: Unit) -> None:
        """Have it stepped."""
        if unit not in self._prepared:
            return
        landing = self._prepared.pop(unit)
        for _, gradients in unit.trainable:
            gradients.take_norms()
        self._worker.put(partial(self._step, unit, landing, self._beside.after_caller()))

    def _step(self, unit: Unit, landing: Slab | None, arrived: Transfer) -> None:
        """In the thread of its own."""
        assert self._stream is not None
        arrived.wait()
        self._optimizer.step_early(unit, self._stream)
        self._stepped.add(unit)
        if landing is not None:
            self._landings.give_back(landing)
        self._stream.read_ahead()

    def end_pass(self) -> None:
        """``step`` is expected."""
        if self._moment is _Moment.PASS:
            self._moment = _Moment.READY

    def abandon(self) -> None:
        """What was stepped cannot be taken back."""
        if self._moment is _Moment.PASS:
            self._worker.drop()
            self._break()

    def _break(self) -> None:
        self._moment = _Moment.BROKEN
        self._prepared.clear()
        self._forget()

    def _forget(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._stepped = set()
        self._landings.take_all_back()

    # ------------------------------------------------------------------------------------------------------- step

    def check(self, boundary: bool) -> None:
        """It must be the step that the pass has begun, with the settings that it has begun with."""
        self.abandon()
        if self._moment is _Moment.BROKEN:
            self.refuse("step()")
        if self._moment is not _Moment.READY:
            return
        if not boundary:
            raise StateError(
                f"step() was called where no step ends, but the last backward pass has begun one ({KEY}): it was told "
                "that one ends. Set the accumulation's boundary before backward, and leave it until step()."
            )
        now = _settings_of(self._optimizer.inner)
        if len(now) != len(self._settings):
            raise StateError(
                f"a group was added to the optimizer between the backward pass that has begun a step ({KEY}) and "
                "step(). Remove it, call step(), and add it then."
            )
        for number, (before, after) in enumerate(zip(self._settings, now, strict=True)):
            for key in before.keys() | after.keys():
                if not _same(before.get(key), after.get(key)):
                    raise StateError(
                        f"{key!r} of the optimizer's group {number} was {before.get(key)!r} when backward began the "
                        f"step ({KEY}), and is {after.get(key)!r} in step(): some units were stepped with one, others "
                        "would be with the other. Put it back, and change it before backward or after step()."
                    )

    @contextmanager
    def finishing(self) -> Iterator[frozenset[Unit]]:
        """Whatever fails from here on leaves some units stepped and others not."""
        begun = self._moment is _Moment.READY
        try:
            if begun:
                self._worker.finish()
            stepped = frozenset(self._stepped)
            self._forget()
            yield stepped
        except BaseException:
            if begun:
                self._worker.drop()
                self._break()
            raise
        self._moment = _Moment.IDLE

    # ------------------------------------------------------------------------------------------------- in between

    def refuse(self, caller: str) -> None:
        """Parameters and states are new in part."""
        self.refuse_under_way(caller)
        if self._moment is _Moment.BROKEN:
            raise StateError(
                f"{caller} was to begin, but a step that backward had begun ({KEY}) was given up or has failed: some "
                "units are stepped, others are not. Load a checkpoint with its optimizer states, or build a new engine."
            )

    def refuse_under_way(self, caller: str) -> None:
        """The same, but for what was given up."""
        if self._moment in (_Moment.PASS, _Moment.READY):
            raise StateError(
                f"{caller} was to begin between the backward pass that has begun a step ({KEY}) and the end of step(): "
                "some units are stepped, others are not. Do it after step(), or before backward."
            )

    def mend(self) -> None:
        """All units are alike again."""
        if self._moment is _Moment.BROKEN:
            self._moment = _Moment.IDLE

    def rest(self) -> None:
        """What was handed over is stepped."""
        self._worker.finish()

    def close(self) -> None:
        """End the thread."""
        self._worker.close()
        self._forget()


def _homes_of(unit: Unit) -> list[OffloadedGradients]:
    """The gradients that need memory to land in."""
    homes = [gradients for _, gradients in unit.trainable if isinstance(gradients, OffloadedGradients)]
    return [home for home in homes if home.landing_bytes]


def _room_of(home: OffloadedGradients) -> int:
    return round_up(home.landing_bytes)


def _settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each group; copies."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    return [{key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in groups]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right) and bool(left == right or left is right)
