"""A checkpoint's whole tensors, one at a time: for what writes formats of others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shardwise.checkpoint.load import Checkpoint
from shardwise.checkpoint.model import SavedModel
from shardwise.checkpoint.tree import DTYPES
from shardwise.layout import Span


@dataclass(frozen=True)
class Whole:
    """A tensor of a checkpoint that is read when it is asked for."""

    saved: SavedModel
    name: str
    kind: str | None
    """Of the optimizer's state; None: the weight."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """All of it, on the CPU."""
        flat = torch.empty(math.prod(self.shape), dtype=self.dtype)
        span = Span(0, flat.numel())
        if self.kind is None:
            self.saved.read_weight_now(self.name, span, flat)
        else:
            self.saved.read_state_now(self.kind, self.name, span, flat)
        return flat.view(self.shape)


class WholeModel:
    """One model of an open checkpoint.

    Args:
        checkpoint: open.
        index: of the model.
    """

    def __init__(self, checkpoint: Checkpoint, index: int = 0) -> None:
        self.saved = checkpoint.model(index)
        self.record = self.saved.record

    def weights(self) -> Iterator[tuple[str, Whole]]:
        """Names of the state dict, and the parameter that each is: the master, where there is one."""
        for name, parameter in self.record.names.items():
            if parameter in self.record.parameters:
                record = self.record.parameters[parameter]
                yield name, Whole(self.saved, parameter, None, record.shape, DTYPES[record.dtype])

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As rank 0 had them."""
        for name in self.record.buffers:
            yield name, self.saved.buffer(name, None)

    def states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Parameters that have state of an optimizer: kinds that are read when asked for, and the rest."""
        for name, record in self.record.parameters.items():
            if self.saved.signature(name):
                lazy = {
                    kind: Whole(self.saved, name, kind, record.shape, DTYPES[dtype])
                    for kind, dtype in record.state.items()
                }
                yield name, {**lazy, **self.saved.others(name)}

    def groups(self) -> list[dict[str, Any]]:
        """Settings of the optimizer's groups, with the names of their parameters; none without an optimizer."""
        optimizer = self.record.optimizer
        if optimizer is None:
            return []
        settings = self.saved.tree(optimizer["groups"], "optimizer.param_groups")
        members: list[list[str]] = [[] for _ in settings]
        for name, record in self.record.parameters.items():
            if record.trainable and 0 <= record.group < len(members):
                members[record.group].append(name)
        return [{**group, "params": names} for group, names in zip(settings, members, strict=True)]
