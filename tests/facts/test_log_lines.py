"""What the configuration asks to log is logged, at the steps it names; what it does not ask for costs no observer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from shardwise.monitor.printing import PhaseTimes, make_audible, set_log_level
from shardwise.zero.engine import Engine
from shardwise.zero.observed import ObservedEngine

SIZES = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
PACKAGE = logging.getLogger("shardwise")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    level, handlers = PACKAGE.level, list(PACKAGE.handlers)
    PACKAGE.setLevel(logging.NOTSET)
    yield
    PACKAGE.setLevel(level)
    PACKAGE.handlers[:] = handlers


def lines_of(caplog: pytest.LogCaptureFixture, steps: int, **config: Any) -> list[str]:
    """Train and return what was logged on the way, the close included."""
    model = nn.Linear(3, 3)
    engine, _, _, _ = shardwise.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.25),
        config={**SIZES, **config},
        device="cpu",
    )
    with engine:
        for _ in range(2 * steps):
            engine.backward(engine(torch.randn(4, 3)).sum())
            engine.step()
    return [record.getMessage() for record in caplog.records if record.name.startswith("shardwise")]


def test_an_engine_that_is_asked_for_nothing_is_the_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    engine, _, _, _ = shardwise.initialize(model=nn.Linear(2, 2), config=SIZES, device="cpu")
    with engine:
        assert type(engine) is Engine
    assert lines_of(caplog, 12) == []


@pytest.mark.parametrize(
    "config",
    [
        {"steps_per_print": 5},
        {"wall_clock_breakdown": True},
        {"memory_breakdown": True},
        {"comms_logger": {"enabled": True}},
        {"flops_profiler": {"enabled": True}},
        {"csv_monitor": {"enabled": True}},
    ],
    ids=str,
)
def test_an_engine_that_is_asked_for_something_is_watched(
    config: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine, _, _, _ = shardwise.initialize(model=nn.Linear(2, 2), config={**SIZES, **config}, device="cpu")
    with engine:
        assert type(engine) is ObservedEngine
        assert len(engine._observers) == 1


def test_progress_comes_each_so_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_of(caplog, 7, steps_per_print=3)
    assert len(lines) == 2
    for line, step in zip(lines, (3, 6), strict=True):
        assert re.fullmatch(
            rf"step {step}: learning rates \[0.25\], skipped steps 0, loss scale 1, [\d.e+]+ samples/s", line
        ), line


def test_progress_without_its_rate(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines_of(caplog, 3, steps_per_print=3, timers={"throughput": {"enabled": False}})
    assert line.endswith("loss scale 1")


@pytest.mark.parametrize(("settings", "steps"), [({}, [10]), ({"steps_per_print": 4}, [4, 8])], ids=str)
def test_times_of_the_phases(caplog: pytest.LogCaptureFixture, settings: dict[str, Any], steps: list[int]) -> None:
    lines = [line for line in lines_of(caplog, 11, wall_clock_breakdown=True, **settings) if "mean of" in line]
    for line, step in zip(lines, steps, strict=True):
        number = r"\d+\.\d\d ms"
        pattern = rf"step {step}: forward {number}, backward {number}, step {number}; mean of {steps[0]} steps"
        assert re.fullmatch(pattern, line), line


def test_a_phase_takes_the_sum_of_its_calls(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from shardwise.monitor import printing
    from shardwise.monitor.observer import Phase, StepReport

    seconds = iter(range(100))
    monkeypatch.setattr(printing, "now", lambda device: float(next(seconds)) ** 2)
    times = PhaseTimes(1, torch.device("cpu"))
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.FORWARD, Phase.BACKWARD, Phase.STEP):
        times.begins(phase, 0)
        times.ends(phase)
    with caplog.at_level(logging.INFO, logger="shardwise"):
        times.after_step(StepReport(1, 1, (), 1.0, 0))
    # Squares differ by 1, 5, 9, 13 and 17.
    assert "forward 10000.00 ms, backward 18000.00 ms, step 17000.00 ms; mean of 1 steps" in caplog.text


def test_memory_comes_after_the_first_step_and_then_in_turn(caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_of(caplog, 11, memory_breakdown=True)
    assert [line.split(":")[0] for line in lines] == [f"memory of rank 0 after step {step}" for step in (1, 10)]
    assert "model states" in lines[0]


def test_the_state_is_dumped_once_without_its_secret(caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_of(caplog, 2, dump_state=True, comet={"api_key": "hush"}, gradient_clipping=0.125)
    (text,) = lines
    assert '"gradient_clipping": 0.125' in text
    assert "8 samples a step, 4 a forward and rank, 2 micro-batches a step" in text
    assert "12 trainable elements of torch.float32 in 2 parameters" in text
    assert "hush" not in text


# -- whether it is seen


def test_the_level_is_that_of_the_configuration(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of(caplog, 3, steps_per_print=1, log_level="error") == []
    assert PACKAGE.level == logging.ERROR


def test_a_level_that_the_script_chose_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    PACKAGE.setLevel(logging.WARNING)
    assert lines_of(caplog, 3, steps_per_print=1) == []


def test_lines_are_seen_without_logging_and_come_once_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, root.handlers[:] = list(root.handlers), []
    try:
        make_audible()
        set_log_level("info")
        logging.getLogger("shardwise.x").info("seen")
        shown = capsys.readouterr().err
        assert shown.count("seen") == 1
        logging.basicConfig(format="mine %(message)s")
        logging.getLogger("shardwise.x").info("once")
        assert capsys.readouterr().err == "mine once\n"
    finally:
        root.handlers[:] = handlers
