"""Optimizers for tests: makers that travel by name, and a LAMB, whose step needs whole matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Maker:
    """Builds `torch.optim.<name>` (or Lamb) over two groups with learning rates of their own: matrices and the rest."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer_class = Lamb if self.name == "Lamb" else getattr(torch.optim, self.name)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if p.ndim >= 2]}]
        if rest := [p for p in trained if p.ndim < 2]:
            groups.append({"params": rest, "lr": 2e-3})
        made: torch.optim.Optimizer = optimizer_class(groups, **{"lr": 3e-3, **dict(self.arguments)})
        return made

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.arguments)])


def maker(name: str, **arguments: Any) -> Maker:
    """A Maker with keyword arguments."""
    return Maker(name, tuple(arguments.items()))


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2019, algorithm 2) without bias correction: Adam's step scaled by norm(weight) / norm(step)."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, eps: float = 1e-6, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                step = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                step += group["weight_decay"] * parameter
                parameter.add_(step * self._trust(parameter, step), alpha=-group["lr"])

    @staticmethod
    def _trust(parameter: Tensor, step: Tensor) -> Tensor:
        weight_norm, step_norm = parameter.norm(), step.norm()
        ratio = weight_norm / step_norm
        return torch.where((weight_norm > 0) & (step_norm > 0), ratio, torch.ones_like(ratio))


def adamw_from_parameters(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """What a script passes as a callable."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def adamw_over_the_model(model: nn.Module) -> torch.optim.Optimizer:
    """The same over a model's parameters."""
    return adamw_from_parameters(model.parameters())


def fused_adamw_over_the_model(model: nn.Module) -> torch.optim.Optimizer:
    """The same, stepped by the fused kernel."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
