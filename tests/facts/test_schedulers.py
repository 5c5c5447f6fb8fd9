"""The five schedules against values worked out by hand from their formulas, and the building of schedulers by name."""

import logging
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.optim.schedulers import (
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    build_scheduler,
)


def adam(*rates, **options):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates or (0.1,)]
    return torch.optim.AdamW(groups, **options)


def rates(schedule, num_steps, group=0):
    """The rate of one group before each of the first steps."""
    found = []
    for _ in range(num_steps):
        found.append(float(schedule.optimizer.param_groups[group]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return found


# --- golden values ----------------------------------------------------------------------------------------------------


def test_warmup_in_a_line():
    schedule = WarmupLR(adam(), warmup_min_lr=0.1, warmup_max_lr=0.5, warmup_num_steps=4, warmup_type="linear")
    # it = -1, 0, 1, 2, 3, 4, 5: 0.1 + 0.4·it/4, and 0.5 from it = 4 on
    assert rates(schedule, 7) == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5], abs=1e-12)


def test_warmup_by_logarithm():
    schedule = WarmupLR(adam(), warmup_max_lr=1.0, warmup_num_steps=8)
    # ln(it+1)/ln 8: ln 1 = 0, ln 2 = ln 8 / 3, ln 4 = 2 ln 8 / 3, ln 8
    found = rates(schedule, 10)
    assert found[0] == found[1] == 0.0
    assert [found[2], found[4], found[8], found[9]] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0], abs=1e-12)
    assert found[3] == pytest.approx(math.log(3) / math.log(8), abs=1e-12)


def test_warmup_rises_to_each_groups_own_rate():
    schedule = WarmupLR(adam(0.5, 0.25), warmup_num_steps=2)
    assert schedule.get_last_lr() == [0.0, 0.0]
    for _ in range(3):
        schedule.optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0.5, 0.25]


def test_warmup_of_less_than_two_steps_counts_as_two():
    schedule = WarmupLR(adam(), warmup_max_lr=1.0, warmup_num_steps=0, warmup_type="linear")
    assert rates(schedule, 4) == [0.0, 0.0, 0.5, 1.0]


def test_warmup_then_decay_in_a_line():
    schedule = WarmupDecayLR(
        adam(), total_num_steps=8, warmup_min_lr=0.1, warmup_max_lr=0.5, warmup_num_steps=4, warmup_type="linear"
    )
    # from it = 4 on: 0.1 + 0.4·(8 - it)/4
    expected = [0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1]
    assert rates(schedule, 11) == pytest.approx(expected, abs=1e-12)


def test_warmup_then_cosine():
    schedule = WarmupCosineLR(
        adam(0.8, 0.4),
        total_num_steps=8,
        warmup_min_ratio=0.5,
        warmup_num_steps=4,
        cos_min_ratio=0.1,
        warmup_type="linear",
    )
    # ratio: 0; 0.5 + 0.5·it/4; then 0.1 + 0.9·(1 + cos(π·p))/2 with p = 1/4, 2/4, 3/4, 1
    half = math.sqrt(0.5)
    ratios = [0, 0.5, 0.625, 0.75, 0.875, 0.55 + 0.45 * half, 0.55, 0.55 - 0.45 * half, 0.1, 0.1]
    assert rates(schedule, 10, group=1) == pytest.approx([0.4 * ratio for ratio in ratios], abs=1e-12)


def test_range_test_smooth_and_in_stairs():
    options = {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 4, "lr_range_test_step_rate": 2.0}
    # 0.1·(1 + 2·(it+1)/4)
    smooth = rates(LRRangeTest(adam(), **options), 6)
    assert smooth == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.35], abs=1e-12)
    stairs = rates(LRRangeTest(adam(), **options, lr_range_test_staircase=True), 9)
    assert stairs == pytest.approx([0.1] * 4 + [0.3] * 4 + [0.5], abs=1e-12)


def test_one_cycle_rates_and_momenta():
    optimizer = adam()
    schedule = OneCycle(
        optimizer,
        cycle_min_lr=0.1,
        cycle_max_lr=0.5,
        cycle_first_step_size=4,
        cycle_second_step_size=2,
        decay_step_size=2,
        decay_lr_rate=1.0,
        cycle_min_mom=0.5,
        cycle_max_mom=0.9,
    )
    betas = []
    found = []
    for _ in range(9):
        found += rates(schedule, 1)
        betas.append(optimizer.param_groups[0]["betas"])
    # up in 4, down in 2; then 0.1/(1 + d) with d = 1/2, 1
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.3, 0.1, 0.1 / 1.5, 0.05], abs=1e-12)
    expected = [0.8, 0.7, 0.6, 0.5, 0.7, 0.9, 0.9, 0.9, 0.9]  # after the step: one further than the rate
    assert [beta for beta, _ in betas] == pytest.approx(expected, abs=1e-12)
    assert {beta2 for _, beta2 in betas} == {0.99}


def test_one_cycle_in_stairs():
    schedule = OneCycle(
        adam(),
        cycle_min_lr=0.0,
        cycle_max_lr=6.0,
        cycle_first_step_size=6,
        cycle_first_stair_count=3,
        cycle_second_stair_count=2,
    )
    assert rates(schedule, 14) == [0, 0, 2, 2, 4, 4, 6, 3, 3, 3, 0, 0, 0, 0]


def test_one_cycle_rests_where_it_ended():
    schedule = OneCycle(adam(), cycle_min_lr=0.1, cycle_max_lr=0.5, cycle_first_step_size=2)
    assert rates(schedule, 8)[4:] == [0.1] * 4
    assert schedule.optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_one_cycle_holds_a_growing_momentum_below_one():
    schedule = OneCycle(
        adam(), 0.1, 0.5, cycle_first_step_size=6, cycle_second_step_size=9, decay_step_size=4, decay_mom_rate=0.1
    )
    # 0.9·(1 + 0.1·d): 0.99 at d = 1, and past 0.999 from d = 5/4 on
    assert schedule.momentum_at(18) == pytest.approx(0.99)
    assert schedule.momentum_at(19) == 0.999
    assert schedule.momentum_at(10_000) == 0.999


def test_one_cycle_writes_the_momentum_of_sgd_where_there_is_one():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": weights[:1], "momentum": 0.3}, {"params": weights[1:], "momentum": 0.0}]
    OneCycle(optimizer := torch.optim.SGD(groups, lr=1.0), 0.1, 0.5)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.0]


def test_one_cycle_says_that_there_is_no_momentum(caplog):
    with caplog.at_level(logging.WARNING, logger="shardwise.optim"):
        schedule = OneCycle(torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))]), 0.1, 0.5)
    assert not schedule.cycle_momentum
    assert "Adagrad has none to cycle" in caplog.text


# --- what every schedule owes torch -----------------------------------------------------------------------------------

RECIPES = {
    "WarmupLR": {"warmup_num_steps": 5},
    "WarmupDecayLR": {"total_num_steps": 12, "warmup_num_steps": 5},
    "WarmupCosineLR": {"total_num_steps": 12, "warmup_num_steps": 5},
    "LRRangeTest": {"lr_range_test_step_size": 3},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_steps", [0, 3, 9])
def test_a_loaded_state_goes_on_as_the_saved_one(name, num_steps, tmp_path):
    first = build_scheduler(name, RECIPES[name], adam(0.5, 0.25))
    rates(first, num_steps)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = build_scheduler(name, RECIPES[name], adam(0.5, 0.25))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(8):
        for schedule in (first, second):
            schedule.optimizer.step()
            schedule.step()
        assert second.get_last_lr() == first.get_last_lr()
        assert second.last_batch_iteration == first.last_batch_iteration


@pytest.mark.parametrize("name", RECIPES)
def test_a_schedule_may_start_in_the_middle(name):
    whole = build_scheduler(name, RECIPES[name], adam(0.5, 0.25))
    rates(whole, 6)
    late = build_scheduler(name, {**RECIPES[name], "last_batch_iteration": 5}, adam(0.5, 0.25))
    assert late.last_batch_iteration == whole.last_batch_iteration == 5
    assert late.get_last_lr() == whole.get_last_lr()


@pytest.mark.parametrize("name", RECIPES)
def test_a_rate_that_is_a_tensor_stays_the_same_tensor(name):
    optimizer = adam(0.5, fused=True)
    tensor = optimizer.param_groups[0]["lr"] = torch.tensor(0.5, dtype=torch.float64)
    plain = build_scheduler(name, RECIPES[name], adam(0.5))
    schedule = build_scheduler(name, RECIPES[name], optimizer)
    for _ in range(9):
        assert optimizer.param_groups[0]["lr"] is tensor
        assert float(tensor) == plain.get_last_lr()[0]
        for each in (plain, schedule):
            each.optimizer.step()
            each.step()


@pytest.mark.parametrize("name", RECIPES)
def test_torch_finds_nothing_to_warn_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates(build_scheduler(name, RECIPES[name], adam()), 4)


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from(["log", "linear"]))
def test_warm_ups_stay_between_their_bounds(total, warmup, kind):
    decay = WarmupDecayLR(adam(), total, 0.1, 0.5, warmup, kind)
    cosine = WarmupCosineLR(adam(), total, 0.2, warmup, 0.1, kind)
    for it in range(-1, 100):
        assert 0.1 - 1e-12 <= decay.rates_at(it)[0] <= 0.5 + 1e-12
        assert 0.0 <= cosine.ratio_at(it) <= 1.0
    assert decay.rates_at(max(total, warmup, 2) + 1) == [0.1]


# --- by name ----------------------------------------------------------------------------------------------------------


def test_any_scheduler_of_torch_is_found():
    schedule = build_scheduler("steplr", {"step_size": 2, "gamma": 0.5}, adam(1.0))
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR)
    assert rates(schedule, 4) == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("WarmupCosinLR", {}, 'Did you mean "WarmupCosineLR"?'),
        ("WarmupLR", {"warmup_steps": 3}, 'has no parameter "warmup_steps". Did you mean "warmup_num_steps"?'),
        ("WarmupDecayLR", {}, "needs total_num_steps"),
        ("OneCycle", {}, "needs cycle_min_lr, cycle_max_lr"),
        ("WarmupLR", {"warmup_type": "cosine"}, 'warmup_type is "cosine", expected one of log, linear'),
        ("WarmupLR", {"warmup_num_steps": 2.5}, "warmup_num_steps is 2.5, expected a whole number"),
        ("WarmupLR", {"warmup_min_lr": "0"}, 'warmup_min_lr is "0", expected a number'),
        ("WarmupLR", {"warmup_min_lr": [0.1, 0.2, 0.3]}, "lists 3 values, but the optimizer has 1 parameter groups"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "expected a whole number of at least 1"),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_max_mom": 1.0}, "expected min <= max < 1"),
        ("ReduceLROnPlateau", {}, "it steps on a metric"),
        ("LambdaLR", {"lr_lambda": "x"}, "it needs a function"),
        ("StepLR", {"step_size": "3"}, 'The scheduler StepLR has step_size = "3", expected a number'),
        ("OneCycleLR", {"max_lr": 1.0, "total_steps": -1}, "The scheduler OneCycleLR refuses its params"),
    ],
    ids=str,
)
def test_a_wrong_scheduler_is_a_config_error(name, params, words):
    with pytest.raises(ConfigError) as caught:
        build_scheduler(name, params, adam())
    assert words in str(caught.value)
