"""Models with the shapes and habits that break sharding engines: odd widths, ties, frozen parts, 0-dim parameters.

Every builder seeds itself, so all ranks and all runs start from the same weights. Batches depend only on the index of
the micro-batch and the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FEATURES, CLASSES = 19, 7  # of the vector models
VOCABULARY, CONTEXT = 43, 11  # of the language model
MICRO_BATCH = 3

Checkpointing = Literal["none", "non_reentrant", "reentrant", "one_region"]
Batch = tuple[Tensor, Tensor]


# -- data


def _generator(index: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * (index + 1) + rank)


def vectors(index: int, rank: int) -> Batch:
    """Inputs [MICRO_BATCH, FEATURES] and targets [MICRO_BATCH, CLASSES]."""
    generator = _generator(index, rank)
    return (
        torch.randn(MICRO_BATCH, FEATURES, generator=generator),
        torch.randn(MICRO_BATCH, CLASSES, generator=generator),
    )


def tokens(index: int, rank: int) -> Batch:
    """Token ids [MICRO_BATCH, CONTEXT] and the ids that follow them."""
    ids = torch.randint(0, VOCABULARY, (MICRO_BATCH, CONTEXT + 1), generator=_generator(index, rank))
    return ids[:, :-1], ids[:, 1:]


def regression(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Mean squared error, in fp32 whatever the model computes in."""
    inputs, targets = batch
    return F.mse_loss(model(inputs).float(), targets)


def language(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Cross entropy of the next token, in fp32."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())


# -- parts


class Block(nn.Module):
    """Residual two-layer perceptron behind a LayerNorm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Mlp(nn.Module):
    """Stem, `depth` residual blocks, head. A submodule class may be given for the blocks."""

    def __init__(
        self,
        width: int = 37,
        hidden: int = 53,
        depth: int = 3,
        checkpointing: Checkpointing = "none",
        make_block: Callable[[int, int], nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(make_block(width, hidden) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.to(self.stem.weight.dtype))
        return self.head(run_blocks(self.blocks, x, self.checkpointing))


def run_blocks(blocks: nn.ModuleList, x: Tensor, checkpointing: Checkpointing) -> Tensor:
    """Run `blocks` one after the other, recomputed in backward as `checkpointing` says."""
    if checkpointing == "one_region":  # the first block alone, all others in one recomputed region
        first, *others = blocks

        def region(hidden: Tensor) -> Tensor:
            for block in others:
                hidden = block(hidden)
            return hidden

        return checkpoint(region, first(x), use_reentrant=False)
    for block in blocks:
        reentrant = checkpointing == "reentrant"
        x = block(x) if checkpointing == "none" else checkpoint(block, x, use_reentrant=reentrant)
    return x


class Attention(nn.Module):
    """Causal self-attention with an odd number of channels a head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape  # [B, T, C]
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class GptBlock(nn.Module):
    """Attention and perceptron, each behind a norm and with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.perceptron_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.perceptron_norm(x))))


class Gpt(nn.Module):
    """A small GPT; with `tied` the head is the token embedding, with `shared_block` the last block is the first one."""

    def __init__(
        self,
        tied: bool = True,
        shared_block: bool = False,
        checkpointing: Checkpointing = "none",
        width: int = 33,
        heads: int = 3,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(GptBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.token.weight
        if shared_block:
            self.blocks[-1] = self.blocks[0]
        self.checkpointing = checkpointing

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(run_blocks(self.blocks, x, self.checkpointing)))


class HalfTied(Mlp):
    """Two blocks of different units that share one weight, and a bias that both the root and a block hold."""

    def __init__(self) -> None:
        super().__init__()
        first, last = self.blocks[0], self.blocks[2]
        assert isinstance(first, Block)
        assert isinstance(last, Block)
        last.up.weight = first.up.weight
        first.down.bias = self.stem.bias


class TemperatureBlock(Block):
    """A block with a learned 0-dim gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.gate = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(F.gelu(self.up(self.norm(x))))


class Temperature(Mlp):
    """0-dim parameters in the blocks and at the root: a gate each and a learned temperature on the logits."""

    def __init__(self) -> None:
        super().__init__(make_block=TemperatureBlock)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(2.0)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.logit_scale.exp()


class OnlyScalars(nn.Module):
    """Nothing but three 0-dim parameters: on four ranks somebody owns none."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))
        self.offset = nn.Parameter(torch.tensor(-0.25))
        self.curve = nn.Parameter(torch.tensor(0.125))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :CLASSES]
        return self.slope * x + self.offset + self.curve * x * x


class CrumbBlock(nn.Module):
    """A block of three parameters with 1, 2 and 3 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(1))
        self.two = nn.Parameter(torch.randn(2))
        self.three = nn.Parameter(torch.randn(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        mixed = x[:, :3] @ self.three  # [B, 1]
        return x * self.one + mixed * self.two.sum() + self.two[0]


class Crumbs(nn.Module):
    """Blocks smaller than the world."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrumbBlock() for _ in range(3))
        self.last = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x[:, :CLASSES])
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x * self.last


class Branches(nn.Module):
    """Two branches of the same shape between a stem and a head; the caller says which one runs (a, b, both, none)."""

    def __init__(self, width: int = 37, hidden: int = 53) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.branch_a = Block(width, hidden)
        self.branch_b = Block(width, hidden)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, which: str) -> Tensor:
        x = self.stem(x)
        if which in ("a", "both"):
            x = self.branch_a(x)
        if which in ("b", "both"):
            x = self.branch_b(x)
        return self.head(x)


class OptionalBlock(Block):
    """A block with a part of its own that only some forwards use."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.extra = nn.Linear(width, width)

    def forward(self, x: Tensor, use_extra: bool = False) -> Tensor:
        x = super().forward(x)
        return x + self.extra(x) if use_extra else x


class Optional(nn.Module):
    """Blocks whose `extra` part runs as the caller says: one letter a block, "x" with the part and "." without."""

    def __init__(self, width: int = 37, hidden: int = 53) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(OptionalBlock(width, hidden) for _ in range(3))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, parts: str) -> Tensor:
        x = self.stem(x)
        for block, part in zip(self.blocks, parts, strict=True):
            x = block(x, use_extra=part == "x")
        return self.head(x)


class MatrixBlock(nn.Module):
    """Two matrices with a residual, no vector."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Matrices(nn.Module):
    """A model of matrices only, for optimizers that take nothing else."""

    def __init__(self, width: int = 37, hidden: int = 53) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width, bias=False)
        self.blocks = nn.ModuleList(MatrixBlock(width, hidden) for _ in range(3))
        self.head = nn.Linear(width, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank correction in fp32."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x.to(self.base.weight.dtype)).to(x.dtype)
        return frozen + x @ self.lora_a.T @ self.lora_b.T


def add_adapters(model: Mlp, base_dtype: torch.dtype = torch.float32) -> Mlp:
    """Freeze everything in `model`, then give the linear layers of its blocks trainable adapters."""
    model.requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, Block)
        for name in ("up", "down"):
            linear = getattr(block, name)
            setattr(block, name, LoraLinear(linear.to(base_dtype)))
    return model


@dataclass
class Reading:
    """What a block of NestedOutputs hands on: tensors inside a dataclass, and one value that is no tensor."""

    hidden: Tensor
    extras: dict[str, list[Tensor]]
    note: str = "a value that is no tensor"


class TupleBlock(Block):
    """Returns a tuple that also holds None and a number."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None, 3


class DictBlock(Block):
    """Takes a keyword-only tensor and returns a dict of a list."""

    def forward(self, *, x: Tensor) -> Any:
        hidden = super().forward(x)
        return {"hidden": hidden, "parts": [hidden.mean(dim=-1), (hidden.amax(dim=-1),)]}


class DataclassBlock(Block):
    """Returns a dataclass."""

    def forward(self, x: Tensor) -> Any:
        hidden = super().forward(x)
        return Reading(hidden, {"squares": [hidden.square()]})


class OnlyInADataclassBlock(Block):
    """Returns its result nowhere but inside a dataclass that nobody has registered anywhere."""

    def forward(self, x: Tensor) -> Any:
        return Reading(super().forward(x), {})


class NestedOutputs(nn.Module):
    """Blocks that return tuples, dicts and dataclasses; the model itself returns a dict."""

    def __init__(self, width: int = 37, hidden: int = 53) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.in_tuple = TupleBlock(width, hidden)
        self.in_dict = DictBlock(width, hidden)
        self.in_dataclass = DataclassBlock(width, hidden)
        self.hidden_away = OnlyInADataclassBlock(width, hidden)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden, _, _ = self.in_tuple(self.stem(x))
        answer = self.in_dict(x=hidden)
        reading = self.in_dataclass(answer["hidden"])
        last = self.hidden_away(reading.hidden)
        penalty = answer["parts"][0].square().mean() + answer["parts"][1][0].mean()
        penalty = penalty + reading.extras["squares"][0].mean()
        return {"prediction": self.head(last.hidden), "penalty": [penalty]}


class MixedBlock(nn.Module):
    """A bf16 perceptron behind a norm that stays in fp32."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden, dtype=torch.bfloat16)
        self.down = nn.Linear(hidden, width, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x).to(torch.bfloat16)
        return x + self.down(F.gelu(self.up(inner))).to(x.dtype)


class EarlyExit(Mlp):
    """Also predicts from what the first block gives."""

    def forward(self, x: Tensor) -> Any:
        first, *others = self.blocks
        early = x = first(self.stem(x))
        for block in others:
            x = block(x)
        return self.head(early), self.head(x)


class Counting(Mlp):
    """An Mlp with buffers that training changes: a persistent counter and a cache outside the state dict."""

    steps_seen: Tensor
    mean_seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean_seen", torch.zeros(FEATURES), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps_seen += 1
            self.mean_seen.copy_(x.mean(dim=0))
        return super().forward(x + self.steps_seen)


# -- builders (module-level, so that they travel to the ranks by name)


def build_mlp(checkpointing: Checkpointing = "none") -> nn.Module:
    """About 13 thousand parameters, every size odd."""
    torch.manual_seed(11)
    return Mlp(checkpointing=checkpointing)


def build_wide() -> nn.Module:
    """Two million parameters, width 1021: no power of two anywhere, no shard ends where a parameter does."""
    torch.manual_seed(12)
    return Mlp(width=1021, hidden=517, depth=2)


def build_gpt(tied: bool = True, shared_block: bool = False, checkpointing: Checkpointing = "none") -> nn.Module:
    """A small language model."""
    torch.manual_seed(13)
    return Gpt(tied, shared_block, checkpointing)


def build_half_tied() -> nn.Module:
    """Weights shared across units."""
    torch.manual_seed(14)
    return HalfTied()


def build_temperature() -> nn.Module:
    """0-dim parameters among larger ones."""
    torch.manual_seed(15)
    return Temperature()


def build_crumbs() -> nn.Module:
    """Every parameter has fewer elements than the largest world has ranks."""
    torch.manual_seed(16)
    return Crumbs()


def build_branches() -> nn.Module:
    """Two branches of one shape."""
    torch.manual_seed(17)
    return Branches()


def build_optional() -> nn.Module:
    """Parts of a unit that a forward may leave out."""
    torch.manual_seed(18)
    return Optional()


def build_nested() -> nn.Module:
    """Outputs that are not tensors."""
    torch.manual_seed(19)
    return NestedOutputs()


def build_mixed() -> nn.Module:
    """bf16 and fp32 parameters in one block."""
    torch.manual_seed(20)
    return Mlp(make_block=MixedBlock)


def build_early_exit() -> nn.Module:
    """Two outputs, one of them from the first block."""
    torch.manual_seed(25)
    return EarlyExit()


def build_counting() -> nn.Module:
    """Buffers that change."""
    torch.manual_seed(21)
    return Counting()


def build_matrices() -> nn.Module:
    """Nothing but matrices."""
    torch.manual_seed(22)
    return Matrices()


def build_lora(base_dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen model with trainable adapters."""
    torch.manual_seed(23)
    return add_adapters(Mlp(), base_dtype)


def build_partly_frozen(frozen: tuple[str, ...]) -> nn.Module:
    """An Mlp whose parameters are frozen where their name starts with one of `frozen`."""
    torch.manual_seed(24)
    model = Mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return model
