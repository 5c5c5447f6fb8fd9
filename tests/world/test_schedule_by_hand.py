"""The schedule by hand, over units without memory: what it gathers ahead, what it keeps, and what it never does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from shardwise.errors import StateError
from shardwise.layout import Layout, Span
from shardwise.zero.schedule import Budgets, Schedule
from shardwise.zero.sharding import STAGES
from shardwise.zero.unit import Segment, ShardedState, TrainingState, Unit

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""No clock decides: the machine may be busy with other things."""

ROOT_NUMEL = 3


class Home:
    """Parameters that are only talked about: each move is one word in the log."""

    def __init__(self, name: str, numel: int, log: list[str]) -> None:
        self.layout = Layout((), (0, numel))
        self.parameters: list[nn.Parameter] = []
        self.full = self.master = torch.empty(0)
        self.master_span = Span(0, 0)
        self._name = name
        self._log = log
        self.ready = False

    def fetch(self) -> bool:
        raise AssertionError("nothing rests off the device")

    def forget_fetched(self) -> None:
        pass

    def unshard(self, identity: Any, exact: bool) -> None:
        self._log.append(f"gather {self._name}")

    def wait_unsharded(self) -> None:
        self._log.append(f"wait {self._name}")
        self.ready = True

    def reshard(self) -> None:
        self._log.append(f"free {self._name}")
        self.ready = False

    def publish(self, identity: Any) -> Any:
        raise AssertionError("the schedule does not publish")

    def resting_bytes(self) -> tuple[int, int]:
        return 0, 0


class House:
    """A root and blocks a, b, c …, and the passes of a model that calls them."""

    def __init__(self, numels: Sequence[int], budgets: Budgets, prefetches: bool = True) -> None:
        self.log: list[str] = []
        self.root = self._unit("root", 0, ROOT_NUMEL)
        self.blocks = [self._unit("abcdefgh"[index], index + 1, numel) for index, numel in enumerate(numels)]
        self.units = [self.root, *self.blocks]
        self.schedule = Schedule(self.units, self.root, budgets, prefetches)
        self.most_live = 0
        self.most_ahead = 0

    def _unit(self, name: str, index: int, numel: int) -> Unit:
        home = Home(name, numel, self.log)
        return Unit(name, index, nn.Module(), [Segment(home.layout, (), torch.float32, False, STAGES[3], home)])

    def whole(self) -> str:
        """Names of the blocks that are whole."""
        return "".join(unit.name for unit in self.blocks if unit.is_whole)

    def _use(self, unit: Unit) -> None:
        assert unit.is_whole
        home = unit.segments[0].parameters
        assert isinstance(home, Home)
        assert home.ready, "used before it was waited for"
        self.most_live = max(self.most_live, sum(u.numel_sharded for u in self.units if u.is_whole))
        ahead = [u for u in self.blocks if u.is_whole and u is not unit]
        self.most_ahead = max(self.most_ahead, sum(u.numel_sharded for u in ahead))

    def forward(self, calls: str, in_graph: bool = True) -> None:
        """The root runs and calls blocks in this order."""
        self.schedule.begin_forward()
        self._before_forward(self.root)
        for name in calls:
            unit = self.units["rabcdefgh".index(name)]
            self._before_forward(unit)
            unit.training_state = TrainingState.IDLE
            unit.forwards_in_graph += in_graph
            self.schedule.after_forward(unit, in_graph)
        self.root.training_state = TrainingState.IDLE
        if not in_graph:
            self.schedule.reshard_all()

    def _before_forward(self, unit: Unit) -> None:
        self.schedule.before_forward(unit)
        unit.training_state = TrainingState.FORWARD
        self._use(unit)

    def backward(self, calls: str) -> None:
        """Backward of a forward pass with these calls: the same blocks in reverse."""
        self._before_backward(self.root)
        for name in calls[::-1]:
            unit = self.units["rabcdefgh".index(name)]
            self._before_backward(unit)
            self.schedule.after_backward(unit)
        self.schedule.reshard_all()

    def _before_backward(self, unit: Unit) -> None:
        if unit.training_state is not TrainingState.PRE_BACKWARD:
            unit.training_state = TrainingState.PRE_BACKWARD
            self.schedule.before_backward(unit)
        self._use(unit)

    def step(self, calls: str) -> list[str]:
        """Forward and backward; returns what was logged."""
        begin = len(self.log)
        self.forward(calls)
        self.backward(calls)
        self.assert_home()
        return self.log[begin:]

    def assert_home(self) -> None:
        for unit in self.units:
            assert unit.state is ShardedState.SHARDED
            assert unit.training_state is TrainingState.IDLE
            assert unit.forwards_in_graph == 0


def words(text: str) -> list[str]:
    """ "+a ?a -a" is short for gather a, wait a, free a."""
    verbs = {"+": "gather", "?": "wait", "-": "free"}
    return [f"{verbs[word[0]]} {word[1:]}" for word in text.split()]


# -- order


def test_the_first_pass_gathers_when_it_must() -> None:
    house = House([10, 10, 10], Budgets(reuse_distance=0))
    assert house.step("abc") == words("+root ?root  +a ?a -a  +b ?b -b  +c ?c -c   +c ?c -c  +b ?b -b  +a ?a -a  -root")


def test_the_next_pass_is_one_unit_ahead() -> None:
    house = House([10, 10, 10], Budgets(reuse_distance=0))
    house.step("abc")
    assert house.step("abc") == words("+root +a ?root  +b ?a -a  +c ?b -b  ?c -c   +c +b ?c -c  +a ?b -b  ?a -a  -root")


def test_by_default_the_last_unit_waits_for_its_backward() -> None:
    """Backward begins with it: putting it away would gather it twice in a row."""
    house = House([10, 10, 10], Budgets())
    house.step("abc")
    assert house.step("abc") == words("+root +a ?root  +b ?a -a  +c ?b -b  ?c   +b -c  +a ?b -b  ?a -a  -root")


def test_a_transport_without_overlap_is_not_asked_early() -> None:
    house = House([10, 10, 10], Budgets(prefetch=1000, reuse_distance=0), prefetches=False)
    first = house.step("abc")
    assert house.step("abc") == first


def test_a_pass_without_gradients_keeps_nothing() -> None:
    house = House([10, 10], Budgets(reuse_distance=1000))
    house.step("ab")
    house.forward("ab", in_graph=False)
    house.assert_home()
    assert house.log[-3:] == words("?b -b -root")


# -- prefetch budget


@pytest.mark.parametrize(
    ("prefetch", "ahead"),
    [(0, ""), (9, ""), (10, "b"), (29, "b"), (30, "bc"), (59, "bc"), (60, "bcd"), (1000, "bcd"), (None, "b")],
)
def test_units_are_gathered_ahead_up_to_the_budget(prefetch: int | None, ahead: str) -> None:
    house = House([5, 10, 20, 30], Budgets(prefetch=prefetch, reuse_distance=0))
    house.step("abcd")
    house.schedule.begin_forward()
    house.schedule.before_forward(house.blocks[0])
    assert house.whole() == "a" + ahead


def test_backward_gathers_ahead_in_reverse() -> None:
    house = House([5, 10, 20, 30], Budgets(prefetch=30, reuse_distance=0))
    house.step("abcd")
    house.forward("abcd")
    house.schedule.before_backward(house.root)
    assert house.whole() == "", "which block begins is known when it begins"
    house.schedule.before_backward(house.blocks[3])
    assert house.whole() == "bcd"


def test_recompute_gathers_nothing_ahead_of_forward() -> None:
    """A forward inside backward: the units behind it are not what comes next."""
    house = House([10, 10, 10], Budgets(reuse_distance=0))
    house.step("abc")
    house.forward("abc")
    unit = house.blocks[1]
    unit.training_state = TrainingState.PRE_BACKWARD
    house.schedule.before_forward(unit)
    assert house.whole() == "b"


# -- live budget


@pytest.mark.parametrize(
    ("max_live", "ahead"), [(0, ""), (14, ""), (15, "b"), (34, "b"), (35, "bc"), (65, "bcd"), (None, "bcd")]
)
def test_the_live_budget_ends_prefetching_but_not_the_unit_that_runs(max_live: int | None, ahead: str) -> None:
    house = House([5, 10, 20, 30], Budgets(prefetch=1000, max_live=max_live, reuse_distance=0))
    house.step("abcd")
    house.schedule.begin_forward()
    house.schedule.before_forward(house.blocks[0])
    assert house.whole() == "a" + ahead


def test_the_live_budget_counts_the_root() -> None:
    house = House([5, 10], Budgets(prefetch=1000, max_live=ROOT_NUMEL + 14, reuse_distance=0))
    house.step("ab")
    house.schedule.begin_forward()
    house.schedule.before_forward(house.root)
    house.schedule.before_forward(house.blocks[0])
    assert house.whole() == "a"


# -- reuse


@pytest.mark.parametrize(
    ("reuse_distance", "kept"),
    [(0, ""), (1, "d"), (60, "d"), (61, "cd"), (100, "cd"), (101, "bcd"), (121, "abcd"), (None, "d")],
)
def test_a_unit_that_is_used_again_soon_stays(reuse_distance: int | None, kept: str) -> None:
    """Between forward and backward of a unit, those behind it run twice: behind c that is 2 times 30."""
    house = House([5, 10, 20, 30], Budgets(reuse_distance=reuse_distance))
    house.step("abcd")
    house.forward("abcd")
    assert house.whole() == kept
    house.backward("abcd")
    house.assert_home()


def test_reuse_ends_at_the_live_budget() -> None:
    house = House([10, 10, 10, 10], Budgets(prefetch=0, reuse_distance=1000, max_live=ROOT_NUMEL + 20))
    house.step("abcd")
    house.forward("abcd")
    assert house.whole() == "ab"
    assert house.most_live == ROOT_NUMEL + 30, "two that stay, and the one that runs"


# -- calls


def test_a_block_that_is_called_twice_stays_until_both_backwards_are_over() -> None:
    house = House([10, 10], Budgets(reuse_distance=0))
    house.forward("aab")
    house.schedule.before_backward(house.blocks[0])
    house.schedule.after_backward(house.blocks[0])
    assert house.blocks[0].is_whole
    house.schedule.after_backward(house.blocks[0])
    assert not house.blocks[0].is_whole


def test_a_block_that_is_called_twice_is_predicted_once() -> None:
    house = House([10, 10, 10], Budgets(reuse_distance=0))
    house.step("abac")
    house.schedule.begin_forward()
    house.schedule.before_forward(house.blocks[1])
    assert house.whole() == "bc"


def test_a_unit_that_was_put_away_in_between_is_a_wrong_state() -> None:
    house = House([10], Budgets())
    unit = house.blocks[0]
    unit.wait_unsharded = unit.reshard  # type: ignore[method-assign]
    with pytest.raises(StateError, match="'a' is SHARDED before forward: expected UNSHARDED"):
        house.schedule.before_forward(unit)
    with pytest.raises(StateError, match="'a' is SHARDED before backward: expected UNSHARDED"):
        house.schedule.before_backward(unit)


# -- held


def test_nothing_is_put_away_while_it_is_held() -> None:
    house = House([10, 10], Budgets(reuse_distance=0))
    house.schedule.hold(house.units)
    house.schedule.hold(house.blocks[:1])
    house.log.clear()
    house.forward("ab")
    house.backward("ab")
    assert house.whole() == "ab"
    assert not any(word.startswith("free") for word in house.log)
    assert all(unit.training_state is TrainingState.IDLE for unit in house.units)
    house.schedule.release(house.units)
    assert house.whole() == "a"
    house.schedule.release(house.blocks[:1])
    house.assert_home()


# -- wrong predictions

PASSES = st.lists(st.text("abcd", max_size=6), min_size=1, max_size=4)
NUMELS = st.lists(st.integers(1, 30), min_size=4, max_size=4)
BUDGETS = st.none() | st.integers(0, 80)


@untimed
@given(NUMELS, PASSES, BUDGETS, BUDGETS, BUDGETS)
def test_whatever_runs_is_whole_and_comes_home(
    numels: list[int], passes: list[str], prefetch: int | None, max_live: int | None, reuse: int | None
) -> None:
    house = House(numels, Budgets(prefetch, max_live, reuse))
    for calls in passes:
        house.step(calls)


@untimed
@given(NUMELS, PASSES, BUDGETS, st.integers(0, 80), st.integers(0, 80))
def test_only_the_unit_that_runs_may_exceed_the_live_budget(
    numels: list[int], passes: list[str], prefetch: int | None, max_live: int, reuse: int
) -> None:
    house = House(numels, Budgets(prefetch, max_live, reuse))
    for calls in passes:
        house.step("".join(dict.fromkeys(calls)))  # a block between two calls of its own must stay, budget or not
    assert house.most_live <= max(max_live, ROOT_NUMEL) + max(numels)


@untimed
@given(NUMELS, st.permutations("abcd").map("".join), BUDGETS)
def test_a_right_prediction_stays_within_the_prefetch_budget(
    numels: list[int], calls: str, prefetch: int | None
) -> None:
    house = House(numels, Budgets(prefetch, reuse_distance=0))
    for _ in range(3):
        house.forward(calls, in_graph=False)
    assert house.most_ahead <= (max(numels) if prefetch is None else prefetch)


@pytest.mark.parametrize("prefetch", [None, 10, 20], ids=str)
def test_a_wrong_prediction_costs_no_memory(prefetch: int | None) -> None:
    """Blocks that are skipped (stochastic depth, early exit) must not pile up behind the one that runs."""
    house = House([10] * 8, Budgets(prefetch=prefetch, reuse_distance=0))
    house.step("abcdefgh")
    house.most_ahead = 0
    house.step("aceg")
    assert house.most_ahead <= (prefetch or 10)


def test_a_wrong_prediction_is_forgotten_after_one_pass() -> None:
    house = House([10] * 4, Budgets(reuse_distance=0))
    house.step("abcd")
    house.step("dcba")
    gathered = [word for word in house.step("dcba") if word.startswith("gather")]
    assert gathered == words("+root +d +c +b +a  +a +b +c +d")
