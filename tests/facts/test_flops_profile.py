"""The profile counts what a formula gives, in one step alone, and leaves nothing on the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardwise
from shardwise.monitor.flops import FlopsProfile, FlopsReport

PACKAGE = logging.getLogger("shardwise")
ROWS, WIDTH, HIDDEN = 4, 33, 65
LINEARS = 2
FORWARD_FLOPS = LINEARS * 2 * ROWS * WIDTH * HIDDEN  # two for a multiplication with its addition


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    level, handlers = PACKAGE.level, list(PACKAGE.handlers)
    yield
    PACKAGE.setLevel(level)
    PACKAGE.handlers[:] = handlers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(batch).relu())


class Model(nn.Module):
    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        self.block = Block()
        self.recomputes = recomputes

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, batch, use_reentrant=False) if self.recomputes else self.block(batch)


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


def profiled(steps: int = 3, model: Model | None = None, **settings: Any) -> tuple[FlopsReport | None, list[list[int]]]:
    """Train some steps of two micro-batches; the profile and the hooks on the model after each of its passes."""
    model = model or Model()
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 2,
        "flops_profiler": {"enabled": True, **settings},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, _, _, _ = shardwise.initialize(model=model, optimizer=optimizer, config=config, device="cpu")
    hooks = []
    with engine:
        for _ in range(2 * steps):
            loss = engine(torch.randn(ROWS, WIDTH, requires_grad=True)).sum()
            hooks.append(hooks_of(model))
            engine.backward(loss)
            engine.step()
        (profile,) = [observer for observer in engine._observers if isinstance(observer, FlopsProfile)]
        return profile.report, hooks


def test_the_count_is_that_of_the_formula() -> None:
    report, _ = profiled()
    assert report is not None
    assert report.step == 1
    assert report.forward_flops == FORWARD_FLOPS
    assert report.backward_flops == 2 * FORWARD_FLOPS
    assert [(m.name, m.flops, m.depth) for m in report.modules] == [
        ("", FORWARD_FLOPS, 0),
        ("block", FORWARD_FLOPS, 1),
        ("block.up", FORWARD_FLOPS // 2, 2),
        ("block.down", FORWARD_FLOPS // 2, 2),
    ]
    assert report.modules[0].num_parameters == 2 * WIDTH * HIDDEN + WIDTH + HIDDEN
    assert report.forward_seconds >= report.modules[0].seconds > report.modules[1].seconds > 0
    assert report.backward_seconds > 0 and report.step_seconds > 0


def test_a_recomputed_forward_counts_in_backward() -> None:
    report, _ = profiled(model=Model(recomputes=True))
    assert report is not None
    assert report.forward_flops == FORWARD_FLOPS
    # The recompute ends with the last tensor that backward needs: the input of the last matrix product.
    assert report.backward_flops in (2 * FORWARD_FLOPS + FORWARD_FLOPS // 2, 3 * FORWARD_FLOPS)


def test_no_hook_outlives_the_profiled_pass() -> None:
    plain = hooks_of(Model())
    _, hooks = profiled()
    assert hooks == [plain] * len(hooks)


@pytest.mark.parametrize("step", [0, 2])
def test_the_step_is_the_one_that_was_named(step: int) -> None:
    report, _ = profiled(profile_step=step)
    assert report is not None and report.step == step


def test_a_step_that_never_comes_is_not_profiled() -> None:
    assert profiled(profile_step=7)[0] is None


def test_the_profile_goes_to_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "profiles" / "one.txt"
    with caplog.at_level(logging.INFO, logger="shardwise"):
        profiled(output_file=str(path))
    text = path.read_text()
    assert "forward               34.32 kFLOP" in text
    assert "Linear" in text and "block" in text
    assert "kFLOP" not in caplog.text


def test_depth_and_detail_choose_what_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="shardwise"):
        profiled(module_depth=1, detailed=True)
        assert "block" in caplog.text and "Linear" not in caplog.text
        caplog.clear()
        profiled(detailed=False)
        assert "depth 2: Linear 34.32 kFLOP" in caplog.text and "share" not in caplog.text


def test_a_pass_that_raises_leaves_the_model_as_it_was() -> None:
    model = Model()
    config = {"flops_profiler": {"enabled": True, "profile_step": 0}, "train_micro_batch_size_per_gpu": ROWS}
    engine, _, _, _ = shardwise.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config, device="cpu"
    )
    with engine:
        before = hooks_of(model)
        with pytest.raises(RuntimeError, match="shapes"):
            engine(torch.randn(ROWS, WIDTH + 1))
        assert hooks_of(model) == before
        assert torch._C._len_torch_dispatch_stack() == 0
