"""Floating-point operations of one step, counted as torch runs them.

In the step that is profiled the first micro-batch's forward and backward run under torch's counter, and hooks on every
module note operations and seconds; before and after it there is no counter and no hook.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from shardwise.config.tools import FlopsProfilerConfig
from shardwise.monitor.observer import Observer, Phase, StepReport

logger = logging.getLogger(__name__)
_WIDTH = 120  # of the table, in characters


@dataclass(slots=True)
class ModuleCost:
    """What the forward of one module took, those of its children included."""

    name: str
    class_name: str
    depth: int
    num_parameters: int
    flops: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class FlopsReport:
    """One profiled step of this rank: one micro-batch forward and backward, and the engine's step."""

    step: int
    modules: tuple[ModuleCost, ...]
    """In the order of ``named_modules``; the first is the whole model."""
    backward_flops: int
    """As it ran: recomputed forwards are in it."""
    forward_seconds: float
    backward_seconds: float
    step_seconds: float

    @property
    def forward_flops(self) -> int:
        """Of the whole model."""
        return self.modules[0].flops

    def deepest(self, module_depth: int) -> tuple[ModuleCost, ...]:
        """The modules down to ``module_depth``; -1 is all of them."""
        return tuple(module for module in self.modules if module_depth < 0 or module.depth <= module_depth)


class FlopsProfile(Observer):
    """Profiles one step and prints what it found.

    Args:
        model: the wrapped model.
        settings: the configuration's block.
        device: whose work is waited for around each module of the profiled step.
    """

    def __init__(self, model: nn.Module, settings: FlopsProfilerConfig, device: torch.device) -> None:
        self._settings = settings
        self._clock = _Clock(device)
        self._modules = _ModuleCosts(model, self._clock)
        self._counters: dict[Phase, FlopCounterMode] = {}
        self._seconds: dict[Phase, float] = {}
        self._running: Phase | None = None
        self._begun = 0.0
        self.report: FlopsReport | None = None
        """What was found; None until the step was profiled."""

    def begins(self, phase: Phase, step: int) -> None:
        """In the step to be profiled: the first forward, the first backward and each step."""
        if step != self._settings.profile_step or self.report is not None:
            return
        if phase is not Phase.STEP and (phase in self._counters or self._running is not None):
            return
        if phase is not Phase.FORWARD and Phase.FORWARD not in self._counters:
            return
        self._running = phase
        if phase is not Phase.STEP:
            counter = self._counters[phase] = FlopCounterMode(display=False)
            counter.__enter__()
            if phase is Phase.FORWARD:
                self._modules.watch(counter)
        self._begun = self._clock()

    def ends(self, phase: Phase) -> None:
        """Take the counter and the hooks away."""
        if self._running is not phase:
            return
        self._running = None
        self._seconds[phase] = self._clock() - self._begun
        if phase is not Phase.STEP:
            self._modules.leave()
            self._counters[phase].__exit__(None, None, None)

    def after_step(self, report: StepReport) -> None:
        """Print, once."""
        if self.report is not None or Phase.FORWARD not in self._counters:
            return
        backward = self._counters.get(Phase.BACKWARD)
        self.report = FlopsReport(
            step=report.step - 1,
            modules=tuple(self._modules.costs),
            backward_flops=0 if backward is None else backward.get_total_flops(),
            forward_seconds=self._seconds[Phase.FORWARD],
            backward_seconds=self._seconds.get(Phase.BACKWARD, 0.0),
            step_seconds=self._seconds.get(Phase.STEP, 0.0),
        )
        text = describe(self.report, self._settings)
        if self._settings.output_file:
            path = Path(self._settings.output_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
            logger.info("the profile of step %d is in %s", self.report.step, path)
        else:
            logger.info("profile of step %d\n%s", self.report.step, text)

    def close(self) -> None:
        """Take everything away, if a pass is under way."""
        if self._running is not None:
            self.ends(self._running)


class _Clock:
    """Seconds, with the device's work done: the profiled step may be slow, but must be right."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else _nothing

    def __call__(self) -> float:
        self._wait()
        return time.perf_counter()


def _nothing() -> None:
    return None


class _ModuleCosts:
    """Hooks on all modules of a model, for the time of one forward."""

    def __init__(self, model: nn.Module, clock: _Clock) -> None:
        self._clock = clock
        self.costs: list[ModuleCost] = []
        self._modules: list[tuple[nn.Module, ModuleCost]] = []
        for name, module in model.named_modules():
            parameters = sum(parameter.numel() for parameter in module.parameters())
            cost = ModuleCost(name, type(module).__name__, name.count(".") + 1 if name else 0, parameters)
            self.costs.append(cost)
            self._modules.append((module, cost))
        self._handles: list[RemovableHandle] = []

    def watch(self, counter: FlopCounterMode) -> None:
        """First in, last out of each module: an engine's gathers count as its module's time."""
        for module, cost in self._modules:
            began: list[tuple[float, int]] = []

            def before(_: nn.Module, __: Any, began: list[tuple[float, int]] = began) -> None:
                began.append((self._clock(), counter.get_total_flops()))

            def after(*_: Any, began: list[tuple[float, int]] = began, cost: ModuleCost = cost) -> None:
                if began:  # an exception in an earlier hook may leave a module without its beginning
                    seconds, flops = began.pop()
                    cost.seconds += self._clock() - seconds
                    cost.flops += counter.get_total_flops() - flops

            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after))

    def leave(self) -> None:
        """No hook stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def describe(report: FlopsReport, settings: FlopsProfilerConfig) -> str:
    """The profile as text: totals, the largest modules of each depth, and with ``detailed`` a table of all."""
    whole = report.modules[0]
    total_flops, total_seconds = report.forward_flops + report.backward_flops, report.forward_seconds
    total_seconds += report.backward_seconds
    lines = [
        f"parameters            {scaled(whole.num_parameters)}",
        f"forward               {scaled(report.forward_flops)}FLOP in {_milliseconds(report.forward_seconds)}",
        f"backward              {scaled(report.backward_flops)}FLOP in {_milliseconds(report.backward_seconds)}",
        f"forward and backward  {scaled(total_flops)}FLOP, {scaled(total_flops / max(total_seconds, 1e-9))}FLOP/s",
        f"step                  {_milliseconds(report.step_seconds)}",
        "One micro-batch of rank 0; counted with hooks on every module, so slower than other steps.",
    ]
    if settings.top_modules:
        modules = report.deepest(settings.module_depth)
        lines += [_largest(modules, depth, settings.top_modules) for depth in sorted({m.depth for m in modules})]
    text = "\n".join(lines)
    return f"{text}\n{_table(report, settings.module_depth)}" if settings.detailed else text


def _largest(modules: Sequence[ModuleCost], depth: int, count: int) -> str:
    """Classes of one depth by their forward operations."""
    of_class: dict[str, int] = defaultdict(int)
    for module in modules:
        if module.depth == depth:
            of_class[module.class_name] += module.flops
    largest = sorted(of_class.items(), key=lambda item: -item[1])[:count]
    return f"depth {depth}: " + ", ".join(f"{name} {scaled(flops)}FLOP" for name, flops in largest)


def _table(report: FlopsReport, module_depth: int) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="forward, a module with its children", title_justify="left")
    table.add_column("module", overflow="fold")
    for column in ("class", "parameters", "FLOP", "share", "time"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for module in report.deepest(module_depth):
        share = module.flops / report.forward_flops if report.forward_flops else 0.0
        table.add_row(
            "  " * module.depth + (module.name.rsplit(".", 1)[-1] or "(model)"),
            module.class_name,
            scaled(module.num_parameters),
            scaled(module.flops),
            f"{share:.1%}",
            _milliseconds(module.seconds),
        )
    console = Console(width=_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def scaled(number: float) -> str:
    """Three digits and a metric prefix: 1.23 G."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.4g} {prefix}"
        number /= 1000
    return f"{number:.4g} P"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
