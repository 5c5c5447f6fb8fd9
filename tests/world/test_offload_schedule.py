"""On a disk on paper, whose time passes only while somebody works or waits: every transfer that can be hidden is.

What a read delivers is garbage until it ends, so a schedule that touches memory too early also computes wrong numbers.
The disk reads and writes at a time. So nothing can be faster than the longest of three: the work, the reads and the
writes; and what begins a pass or a step can be hidden behind nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.slow_store import Disk, SlowStore
from tests.world.engine_runs import Config, config_of, open_engine, rank, world_size
from tests.world.offload_runs import zero_block
from tests.worlds import World

WIDTH = 127
NUM_BLOCKS = 8
WINDOW = 1 << 12
STEPS = 3
MODULE_SECONDS = 1.0
WINDOW_SECONDS = 1.0
NO_SECONDS = 1e-3
ROUNDING = 0.05  # of transfers that take no time to speak of, and of alignment


class Timed(nn.Linear):
    """A layer that takes a second of the disk's time, in forward and in backward."""

    disk: Disk | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disk is not None:
            self.disk.work(MODULE_SECONDS, "module")
        out = super().forward(x)
        if out.requires_grad and self.disk is not None:
            disk = self.disk
            out.register_hook(lambda _: disk.work(MODULE_SECONDS, "module"))
        return out


class Recomputed(nn.Sequential):
    """Runs each layer's forward once more in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class TimedAdamW(torch.optim.AdamW):
    """A step over a window takes a second."""

    disk: Disk | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.disk is not None:
            self.disk.work(WINDOW_SECONDS, "window")
        super().step(closure)


@dataclass(frozen=True)
class Case:
    """Speeds of the disk, and what rests on it."""

    read_seconds: float = 0.6  # of what a rank holds of a layer; a window of four states takes as long
    write_seconds: float = NO_SECONDS  # likewise
    recomputes: bool = False
    parameter: str = "nvme"
    optimizer: str = "nvme"
    buffer_count: int | None = None
    bf16: bool = False

    def build(self) -> nn.Sequential:
        torch.manual_seed(3)
        layers = [Timed(WIDTH, WIDTH) for _ in range(NUM_BLOCKS)]
        return Recomputed(*layers) if self.recomputes else nn.Sequential(*layers)

    def config(self, directory: Path | None = None) -> Config:
        """With files in ``directory``; None: with nothing off the device."""
        zero: Config = {}
        if directory is not None:
            zero = {**zero_block(self.parameter, self.optimizer, directory), "sub_group_size": WINDOW // world_size()}
        if directory is not None and self.buffer_count is not None:
            for name in ("offload_param", "offload_optimizer"):
                zero[name]["buffer_count"] = self.buffer_count
        return config_of(3, zero=zero, bf16={"enabled": self.bf16})

    def disk(self) -> Disk:
        held = 4 * (WIDTH * WIDTH + 128) / world_size()
        return Disk(held / self.read_seconds, held / self.write_seconds)


CASES = {
    "both ways in time": Case(),
    "activations recomputed": Case(recomputes=True),
    "writes that take long": Case(write_seconds=0.7),
    "two buffers": Case(buffer_count=2),
    "reads that take too long": Case(read_seconds=1.5),
    "writes that take too long": Case(write_seconds=3.0),
    "values apart from masters": Case(bf16=True, write_seconds=3.0),
    "optimizer in memory": Case(optimizer="none", write_seconds=0.7),
    "optimizer alone": Case(parameter="none", write_seconds=0.7),
}


@dataclass(frozen=True)
class Spent:
    """Seconds of the disk's time."""

    elapsed: float
    work: float
    read: float
    write: float

    @classmethod
    def during(cls, disk: Disk, part: Callable[[], object]) -> Spent:
        """What ``part`` takes."""
        before = disk.now, disk.stall_seconds, dict(disk.busy_seconds)
        part()
        elapsed, stalled = disk.now - before[0], disk.stall_seconds - before[1]
        busy = {kind: seconds - before[2][kind] for kind, seconds in disk.busy_seconds.items()}
        return cls(elapsed, elapsed - stalled, busy["read"], busy["write"])

    @property
    def unhidden(self) -> float:
        """Beyond the longest of the three."""
        return self.elapsed - max(self.work, self.read, self.write)


def train(model: nn.Sequential, config: Config, disk: Disk) -> tuple[list[torch.Tensor], list[dict[str, Spent]]]:
    """Losses; and what each step took, phase by phase."""
    optimizer = TimedAdamW(model.parameters(), lr=1e-2)
    losses: list[torch.Tensor] = []
    spent = []
    with open_engine(model, optimizer, config) as engine:

        def forward(step: int) -> None:
            losses.append(engine(torch.full((2, WIDTH), 0.5 + step + rank())).float().square().mean())

        for timed in (optimizer, *model):
            timed.disk = disk
        for step in range(STEPS):
            spent.append(
                {
                    "forward": Spent.during(disk, partial(forward, step)),
                    "backward": Spent.during(disk, lambda: engine.backward(losses[-1])),
                    "step": Spent.during(disk, engine.step),
                }
            )
        optimizer.disk = None
    return [loss.detach() for loss in losses], spent


def unhidden_at_most(case: Case) -> dict[str, float]:
    """What nothing can hide.

    A pass waits for its first shard, or for two where ranks gather one ahead, and for what the step still writes; a
    step for its first window, and for the last gradients. Where the disk is what everything waits for, its last
    transfer of a phase may end in the next one.
    """
    last = max(case.read_seconds, case.write_seconds)
    allowed = {
        "forward": case.read_seconds * (1 if world_size() == 1 else 2) + case.write_seconds,
        # A reduction between ranks ends when the next begins, so the last two gradients leave together.
        "backward": (0.0 if world_size() == 1 else case.write_seconds) + (last if last > MODULE_SECONDS else 0.0),
        "step": case.read_seconds + case.write_seconds,
    }
    return {phase: seconds + ROUNDING for phase, seconds in allowed.items()}


def hides_what_can_be_hidden(case: Case, directory: str) -> None:
    disk = case.disk()
    expected, _ = train(case.build(), case.config(), Disk())
    with mock.patch("shardwise.zero.offloading.SwapFile", lambda path, io: SlowStore(disk)):
        found, spent = train(case.build(), case.config(Path(directory)), disk)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), (found, expected)
    if case.parameter == "nvme":
        assert spent[0]["forward"].unhidden > 2 * case.read_seconds  # nothing predicts the first pass
    allowed = unhidden_at_most(case)
    for phases in spent[1:]:
        unhidden = {phase: each.unhidden for phase, each in phases.items()}
        assert all(unhidden[phase] <= allowed[phase] for phase in unhidden), (unhidden, allowed, phases)


@pytest.mark.parametrize("world", [1, 2], indirect=True)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_transfers_are_hidden(world: World, case: Case, tmp_path: Path) -> None:
    world.run(hides_what_can_be_hidden, case, str(tmp_path))
