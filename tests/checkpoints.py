"""Runs that are saved and resumed, for the tests of checkpoints: a model with all that a resume may forget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import models
from tests.models import CLASSES, FEATURES, Block
from tests.references import adamw_in_two_groups
from tests.world.engine_runs import open_engine, rank

SCHEDULER_STEPS = 40
Whole = dict[str, Tensor]


class Forgetful(nn.Module):
    """Dropout (random states), batch norm (buffers of each rank), a tie, a frozen layer and a 0-dim parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 37)
        self.norm = nn.BatchNorm1d(37)
        self.dropout = nn.Dropout(0.25)
        self.blocks = nn.ModuleList(Block(37, 53) for _ in range(2))
        self.left = nn.Linear(37, 37, bias=False)
        self.right = nn.Linear(37, 37, bias=False)
        self.right.weight = self.left.weight
        self.frozen = nn.Linear(37, 37).requires_grad_(False)
        self.head = nn.Linear(37, CLASSES)
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.stem(x.to(self.stem.weight.dtype))))
        for block in self.blocks:
            x = block(x)
        return self.head(self.frozen(self.right(torch.tanh(self.left(x))))) * self.temperature


def build_forgetful() -> nn.Module:
    """The same weights everywhere."""
    torch.manual_seed(23)
    return Forgetful()


def warmup(optimizer: torch.optim.Optimizer) -> Any:
    """A scheduler that changes the rate at every step."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=SCHEDULER_STEPS)


def train_steps(engine: Any, first: int, last: int) -> list[Tensor]:
    """Micro-batches `first` to `last`; this rank's losses."""
    losses = []
    for index in range(first, last):
        loss = models.regression(engine, models.vectors(index, rank()))
        losses.append(loss.detach().clone())
        engine.backward(loss)
        engine.step()
    return losses


def begin(config: dict[str, Any], **arguments: Any) -> Any:
    """An open engine over the forgetful model."""
    model = build_forgetful()
    torch.manual_seed(100 + rank())
    arguments.setdefault("lr_scheduler", warmup)
    return open_engine(model, adamw_in_two_groups(model), config, **arguments)


def optimizer_parts(engine: Any) -> list[tuple[str, str, int, Tensor]]:
    """This rank's part of the optimizer's state: kind, parameter, first element, values."""
    parts = []
    for piece in engine._step.states():
        begin = piece.within_parameter.begin
        parts += [(kind, piece.name, begin, rest.load().clone()) for kind, rest in piece.elementwise.items()]
        for key, value in piece.others.items():
            parts.append((f"{key} of all", piece.name, 0, torch.as_tensor(value).clone()))
    return parts


def join(of_ranks: list[list[tuple[str, str, int, Tensor]]]) -> Whole:
    """The parts of all ranks, each parameter's put together."""
    found: dict[str, dict[int, Tensor]] = {}
    for parts in of_ranks:
        for kind, name, first, values in parts:
            found.setdefault(f"{kind} {name}", {})[first] = values.reshape(-1)
    return {key: torch.cat([part for _, part in sorted(pieces.items())]) for key, pieces in sorted(found.items())}


def same(one: Whole, other: Whole) -> bool:
    """Equal names and bits."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def differences(one: Whole, other: Whole) -> list[str]:
    """Names of what differs, for messages."""
    return [key for key in one.keys() | other.keys() if key not in one or key not in other
            or not torch.equal(one[key], other[key])]  # fmt: skip
