"""On a disk on paper, whose time passes only while somebody works or waits: every transfer that can be hidden is.

What a read delivers is garbage until it ends, so a schedule that touches memory too early also computes wrong numbers.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import nn

from tests.slow_store import Disk, SlowStore
from tests.world.engine_runs import Config, config_of, open_engine
from tests.world.offload_runs import zero_block
from tests.worlds import World

WIDTH = 127
NUM_BLOCKS = 8
WINDOW = 1 << 12
STEPS = 3
MODULE_SECONDS = 1.0
WINDOW_SECONDS = 1.0


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


class TimedAdamW(torch.optim.AdamW):
    """A step over a window takes a second."""

    disk: Disk | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.disk is not None:
            self.disk.work(WINDOW_SECONDS, "window")
        super().step(closure)


def build() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(Timed(WIDTH, WIDTH) for _ in range(NUM_BLOCKS)))


def train(model: nn.Module, config: Config, disk: Disk | None) -> tuple[list[torch.Tensor], list[float], float]:
    """Losses; what was waited for in each forward and backward; and in the steps after the first."""
    optimizer = TimedAdamW(model.parameters(), lr=1e-2)
    losses, passes, steps = [], [], 0.0
    with open_engine(model, optimizer, config) as engine:
        optimizer.disk = disk
        for layer in model:
            layer.disk = disk
        for step in range(STEPS):
            before = disk.stall_seconds if disk else 0.0
            loss = engine(torch.full((2, WIDTH), 0.5 + step)).square().mean()
            engine.backward(loss)
            after = disk.stall_seconds if disk else 0.0
            engine.step()
            losses.append(loss.detach())
            passes.append(after - before)
            steps += (disk.stall_seconds - after if disk else 0.0) if step else 0.0
        optimizer.disk = None
    return losses, passes, steps


def hides_what_can_be_hidden(directory: str) -> None:
    expected, _, _ = train(build(), config_of(3), None)
    layer_bytes = 4 * (WIDTH * WIDTH + 128)
    # A layer is read in 0.6 s, and a window of four states in 0.8 s; both take a second of work.
    disk = Disk(read_bytes_per_second=layer_bytes / 0.6, write_bytes_per_second=1e9)
    stores = []

    def slow_store(path: Path, io: object) -> SlowStore:
        stores.append(SlowStore(disk))
        return stores[-1]

    zero = {**zero_block("nvme", "nvme", Path(directory)), "sub_group_size": WINDOW}
    with mock.patch("shardwise.zero.offloading.SwapFile", slow_store):
        found, passes, steps = train(build(), config_of(3, zero=zero), disk)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # Nothing predicts the first pass. Later ones wait for their first layer, and for what the step still writes.
    first_layer = 0.6 + 1e-6
    assert passes[0] > 2 * first_layer
    assert all(waited <= 2 * first_layer for waited in passes[1:]), passes
    # Of a step only the first window is waited for.
    window = 4 * 4 * WINDOW / disk.read_bytes_per_second + 1e-6
    assert window < WINDOW_SECONDS
    assert steps <= (STEPS - 1) * 2 * window, (steps, window)


def test_transfers_are_hidden(world1: World, tmp_path: Path) -> None:
    world1.run(hides_what_can_be_hidden, str(tmp_path))
