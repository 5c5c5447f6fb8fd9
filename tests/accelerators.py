"""Runs of the front-end in one process of a test: what it keeps process-wide is forgotten before and after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from shardwise.accelerator import Accelerator
from shardwise.accumulation import GradientState
from shardwise.plugin import DeepSpeedPlugin
from shardwise.state import AcceleratorState

IN, HIDDEN, OUT = 37, 129, 5
NUM_SAMPLES = 48


@contextmanager
def fresh_state() -> Iterator[None]:
    """Nothing of an earlier run."""
    forget()
    try:
        yield
    finally:
        forget()


def forget() -> None:
    """Forget all process-wide facts of the front-end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def accelerator_of(config: dict[str, Any] | None = None, **arguments: Any) -> Iterator[Accelerator]:
    """An Accelerator of its own, under a DeepSpeed JSON if there is one; its engines are closed at the end."""
    with fresh_state():
        if config is not None:
            arguments["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=json.loads(json.dumps(config)))
        accelerator = Accelerator(cpu=True, **arguments)
        try:
            yield accelerator
        finally:
            accelerator.free_memory()


def model_of(seed: int = 0) -> nn.Module:
    """A small net with odd widths."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))


def samples(number: int = NUM_SAMPLES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A labelled set, the same everywhere."""
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(IN, generator=generator), torch.randint(0, OUT, (), generator=generator)) for _ in range(number)
    ]


def loader_of(batch_size: int, number: int = NUM_SAMPLES) -> DataLoader[Any]:
    """In order, so that references are easy."""
    return DataLoader(samples(number), batch_size=batch_size)  # type: ignore[arg-type]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """Cross entropy of a batch."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)
