"""When parameters become whole and when they are put away.

The schedule traces the order in which units run forward and predicts from it: the next pass runs alike, and backward
runs in reverse. A prediction starts gathers early; it never decides whether one happens, so a wrong one costs time and
nothing else.

Budgets, in elements of whole parameters, with the meaning that DeepSpeed documents for its keys:

``prefetch``        gathered ahead of use at most (``stage3_prefetch_bucket_size``); None: one unit ahead
``max_live``        whole at one time at most; ends prefetching, not the unit that runs (``stage3_max_live_parameters``)
``reuse_distance``  a unit that is used again within so many elements stays whole (``stage3_max_reuse_distance``);
                    None: only the unit that backward starts with
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardwise.zero.invariants import check_ready
from shardwise.zero.unit import ShardedState, TrainingState, Unit


@dataclass(frozen=True, slots=True)
class Budgets:
    """How many elements may be whole ahead of use, at once, and until their next use."""

    prefetch: int | None = None
    max_live: int | None = None
    reuse_distance: int | None = None


class Schedule:
    """Moves the units between their states; ``root`` stays whole from its forward to the end of backward."""

    def __init__(self, units: Sequence[Unit], root: Unit, budgets: Budgets, prefetches: bool) -> None:
        shards = any(unit.is_sharded for unit in units)
        self._moving = [unit for unit in units if unit.is_sharded or (shards and unit is root)]
        """Units that have states to go through; the others are always whole and never watched."""
        self._root = root
        self._budgets = budgets
        self._prefetches = prefetches
        self._fetches = any(segment.places.parameters is not None for unit in units for segment in unit.segments)
        self._order: list[Unit] = []
        """Units in the order of their first use in the last forward pass."""
        self._tracing: list[Unit] = []
        self._ahead: list[Unit] = []
        """Units that were gathered on a prediction and have not run since."""
        self.step = 0
        self._holds: Counter[Unit] = Counter()
        """How many holders want each unit whole: it is not put away meanwhile."""

    # -------------------------------------------------------------------------------------------------- forward

    def begin_forward(self) -> None:
        """A new pass of the root: what the last one did is the prediction."""
        if self._tracing:
            self._order = self._tracing
        self._tracing = []

    def before_forward(self, unit: Unit) -> None:
        """Make ``unit`` whole; gather the next ones meanwhile."""
        unit.unshard(self.step)
        predicts = unit.training_state is TrainingState.IDLE
        if predicts:
            self._prefetch(unit, forward=True)
            self._fetch(unit, forward=True)
        unit.wait_unsharded()
        if predicts:
            self._fetch_following(unit, forward=True)
        check_ready(unit, "before forward")
        if unit not in self._tracing:
            self._tracing.append(unit)

    def after_forward(self, unit: Unit, in_graph: bool) -> None:
        """Put ``unit`` away, unless it is used again soon. ``in_graph``: its backward is to be expected."""
        if not in_graph or not self._reused_soon(unit):
            self._put_away(unit)

    def _put_away(self, unit: Unit) -> None:
        if not self._holds[unit]:
            unit.reshard()

    def _reused_soon(self, unit: Unit) -> bool:
        """Whether between now and the unit's turn in backward fewer than ``reuse_distance`` elements are used.

        From the unit that ran last backward comes at once. Any other one waits for those behind it, twice: forward and
        back again.
        """
        if not self._order or unit not in self._order:
            return False
        behind = [u.numel_sharded for u in self._order[self._order.index(unit) + 1 :] if u is not self._root]
        if self._budgets.reuse_distance is None:
            return not behind
        if not 2 * sum(behind) < self._budgets.reuse_distance:
            return False
        return self._budgets.max_live is None or self._live() <= self._budgets.max_live

    # ------------------------------------------------------------------------------------------------- backward

    def before_backward(self, unit: Unit) -> None:
        """Make ``unit`` whole again; gather the ones before it meanwhile."""
        unit.unshard(self.step)
        self._prefetch(unit, forward=False)
        self._fetch(unit, forward=False)
        unit.wait_unsharded()
        self._fetch_following(unit, forward=False)
        check_ready(unit, "before backward")

    def after_backward(self, unit: Unit) -> None:
        """Put ``unit`` away once gradients have left all its calls."""
        unit.forwards_in_graph = max(0, unit.forwards_in_graph - 1)
        if unit.forwards_in_graph == 0:
            unit.training_state = TrainingState.IDLE
            self._put_away(unit)

    # ------------------------------------------------------------------------------------------------- prefetch

    def _prefetch(self, unit: Unit, forward: bool) -> None:
        """Gather what is predicted to come; put away what was predicted before and is not any more."""
        if not self._prefetches or (unit is self._root and not forward):
            return
        if unit in self._ahead:
            self._ahead.remove(unit)
        predicted = self._predicted(unit, forward)
        for stale in [other for other in self._ahead if other not in predicted]:
            self._ahead.remove(stale)
            self._put_away(stale)
        for candidate in predicted:
            if candidate.state is not ShardedState.UNSHARDED:
                candidate.unshard(self.step)
                self._ahead.append(candidate)

    def _fetch(self, unit: Unit, forward: bool) -> None:
        """Bring shards that rest off the device near, in the order of their use, as far ahead as there is room."""
        if not self._fetches:
            return
        following = self._following(unit, forward)
        if forward:
            # Behind the last unit comes backward, or else the next pass.
            following += self._backward_behind([unit, *following]) if torch.is_grad_enabled() else self._order
        _bring_near(following)

    def _backward_behind(self, forward: Sequence[Unit]) -> list[Unit]:
        """The units that backward uses when those of ``forward`` have run, nearest first.

        One of these that will be put away ends the list: its shard cannot come for backward yet, and what is used after
        it must not take its slab.
        """
        found = []
        for unit in reversed(self._order):
            if unit in forward:
                if not self._reused_soon(unit):
                    break
            elif unit is not self._root:
                found.append(unit)
        return found

    def _fetch_following(self, unit: Unit, forward: bool) -> None:
        """Once ``unit`` is whole, into the slab that it came in: with two slabs there was no room before, unless it was
        near already.
        """
        if self._fetches:
            _bring_near(self._following(unit, forward))

    def _following(self, unit: Unit, forward: bool) -> list[Unit]:
        """The units that are used next, nearest first."""
        order = self._order if forward else self._order[::-1]
        if unit not in order:
            return []
        return [u for u in order[order.index(unit) + 1 :] if u is not self._root]

    def _predicted(self, unit: Unit, forward: bool) -> list[Unit]:
        """The units that are used next and fit the budgets, nearest first."""
        following = self._following(unit, forward)
        if self._budgets.prefetch is None:
            following = following[:1]
        ahead, live, chosen = 0, self._live(), []
        for candidate in following:
            ahead += candidate.numel_sharded
            if candidate.state is not ShardedState.UNSHARDED:
                live += candidate.numel_sharded
            if self._budgets.prefetch is not None and ahead > self._budgets.prefetch:
                break
            if self._budgets.max_live is not None and live > self._budgets.max_live:
                break
            chosen.append(candidate)
        return chosen

    def _live(self) -> int:
        return sum(unit.numel_sharded for unit in self._moving if unit.state is ShardedState.UNSHARDED)

    # ---------------------------------------------------------------------------------------- whole for somebody

    def hold(self, units: Sequence[Unit]) -> None:
        """Make ``units`` whole, and keep them so until each ``hold`` was followed by a ``release``."""
        for unit in units:
            unit.unshard(self.step, exact=True)
            unit.wait_unsharded()
            self._holds[unit] += 1

    def release(self, units: Sequence[Unit]) -> None:
        """End a ``hold``: who is held by nobody else is put away."""
        for unit in units:
            self._holds[unit] -= 1
            self._put_away(unit)

    # ------------------------------------------------------------------------------------------------------ end

    def reshard_all(self) -> None:
        """Everything home: the pass is over, or was given up."""
        self._ahead.clear()
        for unit in self._moving:
            unit.training_state = TrainingState.IDLE
            unit.forwards_in_graph = 0
            self._put_away(unit)

    def outdate(self) -> None:
        """Parameters change: what was fetched ahead is not what they will be."""
        for unit in self._moving:
            unit.forget_fetched()


def _bring_near(units: Sequence[Unit]) -> None:
    for unit in units:
        if not unit.fetch():
            break
