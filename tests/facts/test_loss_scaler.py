"""The loss scale follows DeepSpeed's documented rule, step by step, and survives a checkpoint in any state."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.errors import StateError
from shardwise.precision import DynamicLossScaler, StaticLossScaler

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""No clock decides: the machine may be busy with other things."""


def scales(outcomes: str, **settings: Any) -> list[float]:
    """The scale after each step; "o" is an overflow, "." a good step."""
    scaler = DynamicLossScaler(**settings)
    found = []
    for outcome in outcomes:
        scaler.update(outcome == "o")
        found.append(scaler.scale)
    return found


@pytest.mark.parametrize(
    ("settings", "outcomes", "expected"),
    [
        # Every `window` good steps double the scale.
        ({"window": 2}, "......", [64, 128, 128, 256, 256, 512]),
        # Hysteresis 2: the first overflow is forgiven, each further one halves.
        ({}, "ooo", [64, 32, 16]),
        ({"hysteresis": 1}, "oo", [32, 16]),
        ({"hysteresis": 4}, "ooooo", [64, 64, 64, 32, 16]),
        # A good step alone does not fill the hysteresis; a whole window does.
        ({"window": 3}, "o.o", [64, 64, 32]),
        ({"window": 3}, "oo...oo", [64, 32, 32, 32, 64, 64, 32]),
        # With consecutive_hysteresis a good step fills it.
        ({"consecutive_hysteresis": True}, "o.o.oo", [64, 64, 64, 64, 64, 32]),
        # An overflow begins the window anew, a forgiven one too.
        ({"window": 3}, "..o...", [64, 64, 64, 64, 64, 128]),
        ({"window": 3, "hysteresis": 1}, "..o..o...", [64, 64, 32, 32, 32, 16, 16, 16, 32]),
        # The minimum holds, also where halving would step over it.
        ({"hysteresis": 1, "min_scale": 16.0}, "oooo", [32, 16, 16, 16]),
        ({"hysteresis": 1, "min_scale": 24.0}, "ooo", [32, 24, 24]),
    ],
    ids=str,
)
def test_the_rule(settings: dict[str, Any], outcomes: str, expected: list[int]) -> None:
    assert scales(outcomes, scale=64.0, **{"window": 1000, **settings}) == expected


SETTINGS = st.fixed_dictionaries(
    {
        "scale": st.sampled_from([1.0, 4.0, 2.0**16]),
        "window": st.integers(1, 5),
        "hysteresis": st.integers(1, 4),
        "min_scale": st.sampled_from([0.25, 1.0, 3.0]),
        "consecutive_hysteresis": st.booleans(),
    }
).filter(lambda settings: settings["min_scale"] <= settings["scale"])
OUTCOMES = st.text("o.", max_size=60)


def by_history(outcomes: str, settings: dict[str, Any]) -> float:
    """The documented rule, each step decided by looking back over all steps before it: no counters."""
    scale = settings["scale"]
    refilled_at = 0  # the first step that the present hysteresis counts for
    for step, outcome in enumerate(outcomes):
        if outcome == ".":
            good_steps = step - outcomes.rfind("o", 0, step)
            if good_steps % settings["window"] == 0:
                scale *= 2
                refilled_at = step + 1
            if settings["consecutive_hysteresis"]:
                refilled_at = step + 1
        elif outcomes.count("o", refilled_at, step) >= settings["hysteresis"] - 1:
            scale = max(scale / 2, settings["min_scale"])
    return float(scale)


@untimed
@given(OUTCOMES, SETTINGS)
def test_the_counters_say_what_the_history_says(outcomes: str, settings: dict[str, Any]) -> None:
    assert [settings["scale"], *scales(outcomes, **settings)][-1] == by_history(outcomes, settings)


# -- an end to hopeless runs


def test_patience_ends_at_the_minimum() -> None:
    scaler = DynamicLossScaler(scale=4.0, hysteresis=1, min_scale=1.0, patience=3)
    for _ in range(2 + 2):  # two halvings, then two of three
        scaler.update(True)
    with pytest.raises(StateError, match=r"3 steps in a row.*minimum of 1.*learning rate"):
        scaler.update(True)


def test_a_good_step_renews_patience() -> None:
    scaler = DynamicLossScaler(scale=1.0, hysteresis=1, patience=2)
    for _ in range(5):
        scaler.update(True)
        scaler.update(False)
    scaler.update(True)
    with pytest.raises(StateError):
        scaler.update(True)


def test_above_the_minimum_patience_does_not_count() -> None:
    assert scales("o" * 20, scale=2.0**20, hysteresis=1, patience=1)[-1] == 1.0


# -- checkpoints


@untimed
@given(OUTCOMES, OUTCOMES, SETTINGS)
def test_a_loaded_scaler_goes_on_as_the_saved_one(before: str, after: str, settings: dict[str, Any]) -> None:
    saved = DynamicLossScaler(**settings)
    for outcome in before:
        saved.update(outcome == "o")
    loaded = DynamicLossScaler(**{**settings, "scale": 7.0})
    loaded.load_state_dict(saved.state_dict())
    assert loaded.state_dict() == saved.state_dict()
    for outcome in after:
        saved.update(outcome == "o")
        loaded.update(outcome == "o")
        assert loaded.scale == saved.scale


def test_patience_survives_a_checkpoint() -> None:
    saved, loaded = (DynamicLossScaler(scale=1.0, hysteresis=1, patience=2) for _ in range(2))
    saved.update(True)
    loaded.load_state_dict(saved.state_dict())
    with pytest.raises(StateError):
        loaded.update(True)


# -- the constant


def test_a_static_scale_never_moves() -> None:
    scaler = StaticLossScaler(128.0, skips_overflows=True)
    for overflow in (True, False, True):
        scaler.update(overflow)
    scaler.load_state_dict({"scale": 2.0})
    assert (scaler.scale, scaler.skips_overflows, scaler.state_dict()) == (128.0, True, {"scale": 128.0})


def test_overflows_are_skipped_where_a_scale_can_cause_them() -> None:
    assert DynamicLossScaler(scale=1.0).skips_overflows
    assert not StaticLossScaler().skips_overflows
