"""A GPT-2 shaped model in plain torch, and the shapes that the benchmarks train.

The model takes tokens and returns the mean next-token loss, so that every contender can wrap the whole of it and is
called in one way. Its repeated parts stand in ``blocks``: contenders that shard per block read them there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTShape:
    """The numbers that decide a GPT-2's size."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int


SHAPES = {
    # 29.9 M parameters: most of them in the blocks, as in larger models.
    "30M": GPTShape(layers=8, width=512, heads=8, vocabulary=8192, positions=1024),
    # 124.4 M parameters: the smallest published GPT-2, with its odd vocabulary.
    "120M": GPTShape(layers=12, width=768, heads=12, vocabulary=50257, positions=1024),
}


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then a four times wider MLP, each with a residual."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width)
        self.attention_out = nn.Linear(shape.width, shape.width)
        self.mlp_norm = nn.LayerNorm(shape.width)
        self.mlp_in = nn.Linear(shape.width, 4 * shape.width)
        self.mlp_out = nn.Linear(4 * shape.width, shape.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, width] -> [batch, sequence, width]."""
        batch, sequence, width = hidden.shape
        projected = self.query_key_value(self.attention_norm(hidden))
        # [B, S, 3C] -> three of [B, heads, S, C / heads]
        query, key, value = projected.view(batch, sequence, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(attended.transpose(1, 2).reshape(batch, sequence, width))
        expanded = functional.gelu(self.mlp_in(self.mlp_norm(hidden)), approximate="tanh")
        output: Tensor = hidden + self.mlp_out(expanded)
        return output


class GPT(nn.Module):
    """GPT-2: learned positions, a stack of blocks, and an output layer that shares the embedding's weight.

    ``recomputes``: of each block backward keeps the input alone, and computes the rest anew.
    """

    def __init__(self, shape: GPTShape, recomputes: bool = False) -> None:
        super().__init__()
        self.recomputes = recomputes
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.apply(_initialise)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, sequence + 1] -> mean cross entropy of the next token, a scalar in nats."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = self.embedding(inputs) + self.positions(torch.arange(inputs.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.recomputes else block(hidden)
        logits = self.head(self.norm(hidden))
        loss: Tensor = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss


def _initialise(module: nn.Module) -> None:
    """GPT-2's start: weights normal with deviation 0.02, biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
