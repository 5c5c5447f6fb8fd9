"""Models whose constructors do what constructors do, and the ways to build them: whole, and under ``zero.Init``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import shardwise
from shardwise.zero.pieces import parked
from tests import models
from tests.references import Recipe, adamw_in_two_groups
from tests.world.engine_runs import rank

Build = Callable[[], nn.Module]

WIDTH, VOCAB = 61, 131
TINY = {"max_whole_bytes": 3 * 4 * WIDTH**2, "small_bytes": 64}
"""Room for about three of the matrices below."""


class Awkward(nn.Module):
    """All that constructors do with weights that exist already."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH, padding_idx=3)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH - 1, 4, 67, dropout=0.0) for _ in range(3)])
        layer = nn.TransformerEncoderLayer(WIDTH - 1, 3, 67, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)  # deep copies of one layer
        self.lstm = nn.LSTM(WIDTH, 37)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 41))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.part = nn.Parameter(torch.randn(90, WIDTH)[7:70])
        self.turned = nn.Parameter(torch.randn(70, WIDTH).t())
        self.counts = nn.Parameter(torch.arange(3000), requires_grad=False)
        self.register_buffer("mean_of_head", self.head.weight.mean(0).detach())
        self.apply(self.init)
        nn.init.normal_(self.blocks[0].linear1.weight, std=0.3)
        nn.init.orthogonal_(self.blocks[1].linear1.weight)
        self.blocks[2].linear1.weight.data = torch.randn(67, WIDTH - 1)
        self.blocks[0].linear2.weight.data.copy_(self.blocks[1].linear2.weight * 2 + self.blocks[2].linear2.weight)
        self.blocks[1].linear1.reset_parameters()
        with torch.no_grad():
            self.wte.weight[self.wte.padding_idx].fill_(0)
            self.wte.weight[5:9, ::2] += self.wte.weight[10:14, ::2] @ torch.ones(31, 31)
            torch._foreach_mul_([self.lstm.weight_ih_l0, self.lstm.weight_hh_l0], 1.5)
            self.part.set_(self.part.roll(3, 0).contiguous())
            if bool((self.turned > 0).any()) and self.turned.tolist()[0][0] != 0:
                self.turned.mul_(2)
            torch.add(self.part, 1, out=self.part)
        self.twin = copy.deepcopy(self.blocks[0])
        self.double()
        self.float()
        self.last = nn.ParameterList([nn.Parameter(self.twin.linear1.weight.detach() * k) for k in range(1, 4)])

    @staticmethod
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.1)
        elif isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight)


def build_awkward() -> nn.Module:
    """The whole list."""
    return Awkward()


class Rows(nn.Module):
    """Blocks of odd widths, a tied table, and a constructor that goes over all of it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH, padding_idx=3)
        self.blocks = nn.ModuleList([models.Block(WIDTH, 97) for _ in range(3)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        self.blocks[1].requires_grad_(False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def build_rows() -> nn.Module:
    """The same everywhere."""
    torch.manual_seed(11)
    return Rows()


def build_rows_in_pieces() -> nn.Module:
    """The same, but rank 0's random numbers are what counts."""
    torch.manual_seed(11 + 5 * rank())
    with shardwise.zero.Init(**TINY):
        model = Rows()
    return model


def batch_of_tokens(index: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * index + rank)
    return torch.randint(0, VOCAB, (2, 9), generator=generator)


def loss_of_tokens(model: Callable[..., Tensor], batch: Tensor) -> Tensor:
    logits = model(batch)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


ROWS = Recipe(build_rows, batch_of_tokens, loss_of_tokens, adamw_in_two_groups)
ROWS_IN_PIECES = Recipe(build_rows_in_pieces, batch_of_tokens, loss_of_tokens, adamw_in_two_groups)


def in_pieces(build: Build, spread: int = 0, **settings: Any) -> nn.Module:
    """Build it under ``zero.Init``; with a `spread` each rank draws other random numbers."""
    torch.manual_seed(spread * rank())
    with shardwise.zero.Init(**{**TINY, **settings}):
        return build()


def number_in_pieces(model: nn.Module) -> int:
    """How many of the model's parameters rest in pieces."""
    return sum(parked(parameter) is not None for parameter in model.parameters())


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, whole. Collective."""
    with shardwise.zero.GatheredParameters(model.parameters()):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Names, order, dtypes and bits."""
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), f"{name} differs in {(got[name] != value).sum()} of {value.numel()}"
