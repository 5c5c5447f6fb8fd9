"""What is trained: model, data and optimizer, the same for every contender."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bench.models import GPT, GPTShape

OptimizerName = Literal["adamw", "adamw-fused"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


@dataclass(frozen=True)
class Workload:
    """One training job in fp32 on random tokens; equal seeds give equal weights and equal data."""

    shape: GPTShape
    batch: int  # sequences per rank and step
    sequence: int  # tokens per sequence
    optimizer: OptimizerName
    seed: int

    def build_model(self) -> GPT:
        """The model with its initial weights, the same on every rank and for every contender."""
        torch.manual_seed(self.seed)
        return GPT(self.shape)

    def count_parameters(self) -> int:
        """Number of parameters, counted without allocating them."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in GPT(self.shape).parameters())

    @property
    def optimizer_class(self) -> type[torch.optim.AdamW]:
        """The optimizer's class, for contenders that build it themselves."""
        return torch.optim.AdamW

    @property
    def optimizer_flags(self) -> dict[str, Any]:
        """What differs from torch's defaults; no flag at all for ``adamw``."""
        return {"fused": True} if self.optimizer == "adamw-fused" else {}

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """The optimizer over ``parameters``."""
        return self.optimizer_class(parameters, **self.optimizer_flags)

    def tokens(self, step: int, rank: int) -> Tensor:
        """The batch of one rank at one step: int64 [batch, sequence + 1]; every rank and step has its own."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + rank)
        return torch.randint(self.shape.vocabulary, (self.batch, self.sequence + 1), generator=generator)
