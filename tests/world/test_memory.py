"""Bytes: what rests on a rank is the formula exactly, and no more lives at once than the schedule says.

P parameters, W ranks, Adam (Rajbhandari et al., "ZeRO", section 5, with the master weights counted where they exist):

    fp32                  16P    8P + 8P/W     4P + 12P/W    16P/W       (the master is a slice of the parameters)
    bf16, fp32 gradients  18P    6P + 12P/W    2P + 16P/W    16P/W       (the fp32 master is separate)
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.comm.shared_memory import CHUNK
from tests.models import Block, Checkpointing, run_blocks
from tests.references import adamw_in_two_groups
from tests.world.engine_runs import STAGES, Config, config_of, open_engine, rank
from tests.worlds import World

WIDTH, HIDDEN, DEPTH = 64, 192, 6
"""Sizes at which no parameter, no group and no shard needs padding for up to four ranks, so that P is exact."""

COUNTED_BYTES = 64
"""Smaller storages are step counters."""

ACTIVATION_BYTES = 32 * 2**10
"""What the tiny batches here leave alive in the middle of a pass."""

BIG_WIDTH, BIG_HIDDEN = 768, 1344
"""12.5 million parameters in six blocks of two million: model states tower over what a process allocates besides."""

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
PROCESS_SLACK_BYTES = 24 * 2**20
"""Allocator, autograd's thread and the transport's small buffers, in a process whose states take 100 MB and more."""

Sampler = Callable[[], None]


class SampledBlock(Block):
    """Calls a function in the middle of its forward and of its backward."""

    sample: Sampler | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        if self.sample is not None:
            self.sample()
            if x.requires_grad:
                x.register_hook(self._in_backward)
        return x

    def _in_backward(self, gradient: Tensor) -> None:
        assert self.sample is not None
        self.sample()


class Tower(nn.Module):
    """Blocks between two square linear layers."""

    def __init__(
        self, width: int = WIDTH, hidden: int = HIDDEN, depth: int = DEPTH, checkpointing: Checkpointing = "none"
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(SampledBlock(width, hidden) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.to(self.stem.weight.dtype))
        return self.head(run_blocks(self.blocks, x, self.checkpointing))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def formula_bytes(stage: int, parameters: int, ranks: int, narrow: bool) -> int:
    """The table above."""
    shard = parameters // ranks
    assert shard * ranks == parameters
    if narrow:
        rows = (18 * parameters, 6 * parameters + 12 * shard, 2 * parameters + 16 * shard, 16 * shard)
    else:
        rows = (16 * parameters, 8 * parameters + 8 * shard, 4 * parameters + 12 * shard, 16 * shard)
    return rows[stage]


def live_storages() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process can reach, by address; those of some size only."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.nbytes() >= COUNTED_BYTES:
                found[storage.data_ptr()] = max(storage.nbytes(), found.get(storage.data_ptr(), 0))
    return found


def live_bytes_beyond(before: dict[int, int]) -> int:
    """Bytes of storages that were not there before; where two of them overlap (maps of one file), bytes count once."""
    total = reached = 0
    for address, num_bytes in sorted(live_storages().items()):
        if address not in before:
            end = address + num_bytes
            total += max(0, end - max(address, reached))
            reached = max(reached, end)
    return total


def train_some_steps(engine: Any, steps: int = 3, width: int = WIDTH, micro_batch: int = 2) -> None:
    for step in range(steps):
        inputs = torch.randn(micro_batch, width, generator=torch.Generator().manual_seed(10 * step + rank()))
        engine.backward(engine(inputs).float().square().mean())
        engine.step()


def resting_bytes(config: Config) -> dict[str, int]:
    gc.collect()
    before = live_storages()
    torch.manual_seed(0)
    model = Tower()
    parameters = num_parameters(model)
    with open_engine(model, adamw_in_two_groups(model), config) as engine:
        train_some_steps(engine)
        gc.collect()
        report = engine.memory_report()
        return {
            "P": parameters,
            "parameters": report.parameters_bytes,
            "gradients": report.gradients_bytes,
            "optimizer": report.optimizer_bytes,
            "buffers": report.buffers_bytes,
            "total": report.total_bytes,
            "predicted": report.predicted_bytes,
            "measured": live_bytes_beyond(before),
        }


@pytest.mark.parametrize("world", [1, 2, 4], indirect=True)
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_resting_bytes_are_the_formula(world: World, stage: int, narrow: bool) -> None:
    config = config_of(stage, **({"bf16": {"enabled": True}} if narrow else {}))
    row = stage if world.size > 1 else 0  # one rank has nobody to share with: every stage is plain training there
    for found in world.run(resting_bytes, config):
        states = found["parameters"] + found["gradients"] + found["optimizer"]
        assert states == formula_bytes(row, found["P"], world.size, narrow), found
        assert found["predicted"] == states, found
        assert found["total"] == states + found["buffers"], found


@pytest.mark.parametrize("transport", ["process_group", "shared_memory"])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_report_is_what_is_allocated(world2: World, stage: int, narrow: bool, transport: str) -> None:
    config = config_of(stage, shardwise={"transport": transport}, **({"bf16": {"enabled": True}} if narrow else {}))
    for found in world2.run(resting_bytes, config):
        assert found["measured"] == found["total"], found


def odd_prediction(stage: int) -> tuple[int, int]:
    torch.manual_seed(0)
    model = Tower(width=61, hidden=37, depth=3)
    with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
        train_some_steps(engine, width=61)
        report = engine.memory_report()
        states = report.parameters_bytes + report.gradients_bytes + report.optimizer_bytes
        text = str(report)
        assert all(word in text for word in ("parameters", "gradients", "optimizer")), text
        return states, report.predicted_bytes


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_the_prediction_is_exact_for_odd_sizes_too(world: World, stage: int) -> None:
    for states, predicted in world.run(odd_prediction, stage):
        assert states == predicted


def peak_live_bytes(config: Config, checkpointing: Checkpointing = "none") -> dict[str, int]:
    """The most bytes that were reachable in any block's forward or backward, beyond what rests."""
    gc.collect()
    before = live_storages()
    torch.manual_seed(0)
    model = Tower(checkpointing=checkpointing)
    peaks = [0]

    def sample() -> None:
        peaks[0] = max(peaks[0], live_bytes_beyond(before))

    with open_engine(model, adamw_in_two_groups(model), config) as engine:
        train_some_steps(engine, 2)
        for block in model.blocks:
            block.sample = sample  # type: ignore[assignment]
        train_some_steps(engine, 2)
        report = engine.memory_report()
        states = report.parameters_bytes + report.gradients_bytes + report.optimizer_bytes
    return {"states": states, "peak": peaks[0]}


def bytes_allowed_at_once(stage: int, model: Tower) -> int:
    """fp32 bytes that may live beside the states: whole units that run or come next, and gradients on their way.

    Parameters (stage 3): the root, the unit that runs, the one that was gathered ahead.
    Gradients (stages 2, 3): the root's, and those of two units: one that collects, one that is being reduced.
    At every stage: the one parameter's gradient that autograd hands over.
    """
    block = 4 * num_parameters(model.blocks[0])
    root = 4 * num_parameters(model) - len(model.blocks) * block
    parameters = root + 2 * block if stage == 3 else 0
    gradients = root + 2 * block if stage >= 2 else 0
    return parameters + gradients + 4 * max(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("transport", ["process_group", "shared_memory"])
@pytest.mark.parametrize("stage", STAGES)
def test_no_more_lives_at_once_than_the_schedule_allows(world2: World, stage: int, transport: str) -> None:
    allowed = bytes_allowed_at_once(stage, Tower()) + ACTIVATION_BYTES
    if transport == "shared_memory":
        allowed += 2 * 4 * CHUNK  # through which the transport reads and sums, whatever the model's size
    for found in world2.run(peak_live_bytes, config_of(stage, shardwise={"transport": transport})):
        assert found["peak"] <= found["states"] + allowed, (found, allowed)


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_recomputed_units_are_put_away_too(world2: World, checkpointing: Checkpointing) -> None:
    allowed = bytes_allowed_at_once(3, Tower()) + ACTIVATION_BYTES
    if checkpointing == "reentrant":
        # A backward inside backward may bring more gradients for any unit: they are reduced at the end.
        allowed += 4 * num_parameters(Tower())
    config = config_of(3, shardwise={"transport": "process_group"})
    for found in world2.run(peak_live_bytes, config, checkpointing):
        assert found["peak"] <= found["states"] + allowed, (found, allowed)


def peak_of_the_process(stage: int) -> tuple[int, int]:
    """(bytes by which the resident set grew at most, P), from before the model was built until after three steps."""
    # What malloc keeps of freed tensors is not held by anybody, and differs from run to run: let it keep nothing large.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16) == 1
    with open_engine(small := Tower(), adamw_in_two_groups(small), config_of(stage)) as engine:
        train_some_steps(engine, 1)  # what libraries load lazily is no model state
    del engine, small
    gc.collect()
    start = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark afresh
    torch.manual_seed(0)
    model = Tower(BIG_WIDTH, BIG_HIDDEN)
    parameters = num_parameters(model)
    with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
        train_some_steps(engine, 3, BIG_WIDTH)
        return status_bytes("VmHWM") - start, parameters


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("stage", STAGES)
def test_the_peak_of_the_process(own_world: Callable[..., World], stage: int) -> None:
    """Against the system's own count, in processes that did nothing before."""
    allowed = bytes_allowed_at_once(stage, Tower(BIG_WIDTH, BIG_HIDDEN)) + PROCESS_SLACK_BYTES
    for peak, parameters in own_world(2).run(peak_of_the_process, stage):
        assert peak <= formula_bytes(stage, parameters, 2, narrow=False) + allowed, (peak, parameters, allowed)


def left_after_close(stage: int) -> int:
    gc.collect()
    before = live_storages()
    model: Any = Tower()
    with open_engine(model, adamw_in_two_groups(model), config_of(stage)) as engine:
        train_some_steps(engine)
    del model, engine
    gc.collect()
    return live_bytes_beyond(before)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_left_after_close(world2: World, stage: int) -> None:
    assert world2.run(left_after_close, stage) == [0, 0]
