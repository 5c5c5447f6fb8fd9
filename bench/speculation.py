"""What a step costs that can be taken back, for offload that does not wait for the gradient's norm.

A step beside backward is wrong if the norm then asks for clipping, or is not finite. It can be taken back exactly if
masters and moments were saved before, or nearly, by Adam's formula solved for the former values (Lian et al.,
"SuperOffload", 2025). All ways take turns over the same windows, in host memory, with torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from bench.interleave import Ratios, Rounds, ratios, time_in_turns
from bench.options import at_least
from bench.report import CONSOLE, ratio_text
from bench.world import run_in_world
from shardwise.zero.shard_states import WINDOW_NUMEL

STATES = ("master", "exp_avg", "exp_avg_sq")
"""With a number for each element; a step changes its count as well."""
RATE, BETAS, EPS, DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.01
GRADIENT, STEPS_BEFORE = 0.01, 5000
CLIP_FACTOR = 0.999  # near 1: a gradient that is clipped again and again stays a normal number
STEP, FACTOR, SAVING, COPY_BACK = "step", "step, with a clip factor", "step, saving what was", "back by copy"
STEP_SHARES = (0.25, 0.5, 1.0, 2.0)
"""Of the time of backward, that a plain step takes."""


@dataclass(frozen=True)
class Inverse:
    """One state after a step and its inverse, beside what it was."""

    differing_share: float
    """Of the elements, whose bits are others."""
    largest_error: float
    """Relative to the largest magnitude among the former values."""
    negative: int
    """Elements that are below zero where they were not: of ``exp_avg_sq``, whose root is taken next."""


@dataclass(frozen=True)
class Found:
    """All that was measured."""

    numel: int
    seconds: dict[str, list[float]]  # one entry a round
    ratios: dict[str, Ratios]  # to a plain step
    inverse: dict[str, dict[str, Inverse]]  # by how much larger the gradient was, then by state


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    group = parser.add_argument_group("speculation")
    group.add_argument("--windows", type=at_least(1), default=16, help="that are stepped, of 2^20 elements each")


def run(options: argparse.Namespace) -> Found:
    """Measure and print."""
    rounds = Rounds(2, options.rounds)
    (found,) = run_in_world(1, options.threads, measure, options.windows, WINDOW_NUMEL, rounds, options.seed)
    table = Table(title=f"{found.numel / 1e6:.0f} M parameters in windows of 2^20", title_justify="left")
    for column in ("turn", "ms", "ratio to the plain step", "quartiles"):
        table.add_column(column, justify="left" if column == "turn" else "right")
    for name, seconds in found.seconds.items():
        table.add_row(name, f"{1e3 * statistics.median(seconds):.0f}", *ratio_text(found.ratios[name]))
    CONSOLE.print(table)
    CONSOLE.print(_inverse_table(found))
    CONSOLE.print(_worth_table(found))
    return found


def _inverse_table(found: Found) -> Table:
    table = Table(title="back by the inverse of Adam's formula, fp32", title_justify="left")
    table.add_column("gradient, to those before")
    table.add_column("state")
    for column in ("elements with other bits", "largest error, to the largest value", "below zero"):
        table.add_column(column, justify="right")
    for larger, states in found.inverse.items():
        for name, inverse in states.items():
            table.add_row(
                larger, name, f"{100 * inverse.differing_share:.1f} %", f"{inverse.largest_error:.1e}",
                f"{inverse.negative}",
            )  # fmt: skip
    return table


def _worth_table(found: Found) -> Table:
    factor, saving, back = (found.ratios[name].median for name in (FACTOR, SAVING, COPY_BACK))
    table = Table(
        title="computed from these: saving beside backward against a step that waits for the norm", title_justify="left"
    )
    columns = (
        "step / backward",
        "gain, of a step, if nothing is clipped",
        "pays up to this share of clipped steps",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for share in STEP_SHARES:
        gain, most = worth(share, factor, saving, back)
        table.add_row(f"{share}", f"{gain:.2f}", f"{100 * most:.0f} %" if gain > 0 else "never")
    return table


def worth(step_share: float, factor: float, saving: float, back: float) -> tuple[float, float]:
    """What speculation gains in a step that is kept, in plain steps; and up to which share of steps that are not.

    Waiting for the norm costs a step behind backward: 1 where nothing is clipped, ``factor`` where it is. Speculation
    costs what does not fit into backward, ``saving`` - 1 / ``step_share`` at least 0, and with the probability p that
    it was wrong ``back`` and a step with the factor on top of it.

    Args:
        step_share: time of a plain step, to that of backward.
        factor: time of a step with a clip factor, to a plain one.
        saving: time of a step that saves what was, likewise.
        back: time of going back, likewise.
    """
    exposed = max(0.0, saving - 1 / step_share)
    gain = 1 - exposed
    # 1 - p + p * factor = exposed + p * (back + factor)
    return gain, min(1.0, max(0.0, gain / (1 + back)))


# --- in the rank ------------------------------------------------------------------------------------------------------


class Windows:
    """Masters, gradients and moments in windows, stepped one after the other as the engine's stream does."""

    def __init__(self, number: int, numel: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.masters = [torch.nn.Parameter(torch.randn(numel) * 0.02) for _ in range(number)]
        self.optimizer = torch.optim.AdamW(self.masters, lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
        self.new_gradients(1.0)
        self.step()
        for master in self.masters:
            self._settle(self.optimizer.state[master])
        self.saved = [{name: value.clone() for name, value in self.states(index)} for index in range(number)]

    def _settle(self, state: dict[str, torch.Tensor]) -> None:
        """Moments as thousands of steps with such gradients leave them: mean and deviation of a running average."""
        first, second = BETAS
        state["step"].fill_(STEPS_BEFORE)
        state["exp_avg"].normal_(0, GRADIENT * math.sqrt((1 - first) / (1 + first)))
        deviation = math.sqrt(2 * (1 - second) / (1 + second))
        state["exp_avg_sq"].normal_(1, deviation).mul_(GRADIENT**2)

    def new_gradients(self, scale: float) -> None:
        """Random ones, ``scale`` times as large as the first."""
        for master in self.masters:
            master.grad = torch.randn(master.shape) * (GRADIENT * scale)

    def step(self, before: Callable[[int], None] = lambda index: None) -> None:
        """Every window in turn, ``before`` which something else may be done with it."""
        (group,) = self.optimizer.param_groups
        for index, master in enumerate(self.masters):
            before(index)
            group["params"] = [master]
            self.optimizer.step()
        group["params"] = self.masters

    def states(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """What a step of a window changes, by name."""
        master = self.masters[index]
        yield "master", master.data
        yield from self.optimizer.state[master].items()

    def save(self, index: int) -> None:
        """Keep a window as it is."""
        for name, value in self.states(index):
            self.saved[index][name].copy_(value)

    def copy_back(self) -> None:
        """All windows as they were saved."""
        for index in range(len(self.masters)):
            for name, value in self.states(index):
                value.copy_(self.saved[index][name])

    def clip(self, index: int) -> None:
        """What a step of today does with a window's gradient."""
        gradient = self.masters[index].grad
        assert gradient is not None
        gradient.mul_(CLIP_FACTOR)

    def solved_back(self, index: int) -> dict[str, torch.Tensor]:
        """The former states of a window by Adam's formula, from what they are after the step and its gradient."""
        master = self.masters[index]
        state: dict[str, Any] = self.optimizer.state[master]
        gradient, count = master.grad, int(state["step"].item())
        assert gradient is not None
        first, second = BETAS
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - second**count)).add_(EPS)
        moved = state["exp_avg"].div(root).mul_(RATE / (1 - first**count))
        return {
            "master": master.data.add(moved).div_(1 - RATE * DECAY),
            "exp_avg": state["exp_avg"].sub(gradient, alpha=1 - first).div_(first),
            "exp_avg_sq": state["exp_avg_sq"].addcmul(gradient, gradient, value=second - 1).div_(second),
        }


def measure(number: int, numel: int, rounds: Rounds, seed: int) -> Found:
    """In one process: all ways in turns, then the inverse's errors."""
    with torch.no_grad():
        windows = Windows(number, numel, seed)
        turns: dict[str, Callable[[], None]] = {
            STEP: windows.step,
            FACTOR: lambda: windows.step(windows.clip),
            SAVING: lambda: windows.step(windows.save),
            COPY_BACK: windows.copy_back,
        }
        inverse = {f"{scale:g} times": _errors_of_inverse(windows, scale) for scale in (1.0, 10.0)}
        seconds = time_in_turns(turns, rounds, seed)
    return Found(
        number * numel, seconds, {name: ratios(each, seconds[STEP]) for name, each in seconds.items()}, inverse
    )


def _errors_of_inverse(windows: Windows, scale: float) -> dict[str, Inverse]:
    windows.new_gradients(scale)
    windows.step(windows.save)
    number = len(windows.masters)
    found: dict[str, Inverse] = {}
    solved = [windows.solved_back(index) for index in range(number)]
    for name in STATES:
        former = torch.cat([windows.saved[index][name] for index in range(number)])
        again = torch.cat([solved[index][name] for index in range(number)])
        found[name] = Inverse(
            (former != again).double().mean().item(),
            ((former - again).abs().max() / former.abs().max()).item(),
            int(((again < 0) & (former >= 0)).sum()) if name == "exp_avg_sq" else 0,
        )
    windows.copy_back()
    return found
