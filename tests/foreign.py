"""The model whose checkpoints DeepSpeed has written for the tests, and the batches that it was trained on.

`fixtures/deepspeed/record.py` imports this where DeepSpeed is installed; the tests import it where it is not.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

FEATURES = 11
HIDDEN = 13
MICRO_BATCH = 5
STEPS = 3
LEARNING_RATE = 3e-3


class Odd(nn.Module):
    """A tie, a frozen layer, buffers (one of each rank) and a parameter of one element; hardly an even size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.left = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.frozen = nn.Linear(HIDDEN, 7).requires_grad_(False)
        self.right = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.right.weight = self.left.weight
        self.head = nn.Linear(7, 3)
        self.gain = nn.Parameter(torch.tensor([0.7]))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 3))
        self.register_buffer("seen", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean(0).to(self.seen.dtype)
        x = self.norm(self.stem(x.to(self.stem.weight.dtype)))
        return self.head(self.frozen(self.right(torch.tanh(self.left(x))))) * self.gain * self.scale


def build_odd() -> nn.Module:
    """The same weights everywhere."""
    torch.manual_seed(31)
    return Odd()


def odd_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices are decayed, the rest is not and learns faster."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": 0.1, "betas": (0.8, 0.95)},
        {"params": [p for p in trainable if p.dim() <= 1], "lr": 2 * LEARNING_RATE, "eps": 1e-7},
    ]


def odd_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """What every recording was trained with."""
    return torch.optim.AdamW(odd_groups(model), lr=LEARNING_RATE, weight_decay=0.0)


def odd_batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a rank at a step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(MICRO_BATCH, FEATURES, generator=generator)
    return inputs, torch.randn(MICRO_BATCH, 3, generator=generator)


def odd_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    """Mean squares."""
    inputs, targets = odd_batch(step, rank)
    return (model(inputs).float() - targets).square().mean()


def odd_buffers(rank: int, steps: int = STEPS) -> dict[str, Tensor]:
    """Of a rank, after so many steps."""
    seen = torch.zeros(FEATURES)
    for step in range(steps):
        seen += odd_batch(step, rank)[0].mean(0)
    return {"scale": torch.linspace(0.5, 1.5, 3), "seen": seen}


# --- recordings -------------------------------------------------------------------------------------------------------

RECORDINGS = Path(__file__).parent / "fixtures" / "deepspeed"
TAG = f"global_step{STEPS}"


@dataclass(frozen=True)
class Recording:
    """A checkpoint as DeepSpeed left it, and what DeepSpeed said was in it."""

    directory: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def of(self, kind: str) -> dict[str, Tensor]:
        """Tensors of one kind by their names: weight, exp_avg, exp_avg_sq, next/weight."""
        return {
            name.removeprefix(f"{kind}/"): value for name, value in self.tensors.items() if name.startswith(f"{kind}/")
        }

    @property
    def own_directory(self) -> Path:
        """Of the checkpoint itself."""
        return self.directory / (f"{TAG}_universal" if (self.directory / "latest_universal").exists() else TAG)


def recorded_names() -> list[str]:
    """All of them."""
    return sorted(path.name.removesuffix(".tar.gz") for path in RECORDINGS.glob("*.tar.gz"))


def unpack(name: str, directory: Path) -> Recording:
    """A recording, unpacked in ``directory / name``."""
    place = directory / name
    with tarfile.open(RECORDINGS / f"{name}.tar.gz") as archive:
        archive.extractall(place, filter="data")
    with safe_open(place / "expected.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["facts"])
    (place / "expected.safetensors").unlink()
    return Recording(place, tensors, facts)
