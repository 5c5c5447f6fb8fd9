"""LAMB: Adam's step, as long as its tensor is (You et al. 2020, "Large Batch Optimization for Deep Learning")."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from shardwise.errors import ConfigError


class Lamb(Optimizer):
    """Algorithm 2 of the paper, with the bounds that the DeepSpeed JSON puts on its trust ratio.

    With gradient g, moments m and v, betas (b1, b2), rate lr and weight decay w, step number t of each tensor p is

        m <- b1·m + (1-b1)·g                        first moment
        v <- b2·v + (1-b2)·g²                       second moment
        u  = m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + w·p
        p <- p - lr · ratio · u                     ratio = |p|/|u|, kept within [min_coeff, max_coeff]

    The ratio is 1 where one of the norms is 0. The norms are those of whole tensors, so a sharded tensor cannot be
    stepped slice by slice.

    Args:
        params: tensors, or groups, as torch.optim takes them.
        lr: the rate.
        bias_correction: divide the moments by 1 - b^t; without it the first steps are short.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        eps_inside_sqrt: add ``eps`` to the second moment before the root is taken, not after.
        weight_decay: added to the step, so that the ratio counts it too.
        max_coeff: upper bound of the trust ratio.
        min_coeff: lower bound of the trust ratio.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ConfigError(f"Lamb's {name} is {value}, expected a number of at least 0. Change it.")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"Lamb's betas are {betas}, expected two numbers from 0 to below 1. Change them.")
        if not 0.0 <= min_coeff <= max_coeff:
            raise ConfigError(
                f"Lamb's min_coeff is {min_coeff} and its max_coeff {max_coeff}, expected 0 <= min_coeff <= max_coeff. "
                "Change them."
            )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient; return the loss of `closure` if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)
        return loss

    def _step_one(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the host: its value is read at every step
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        update = _adam_direction(state, group)
        if group["weight_decay"] != 0.0:
            update.add_(parameter, alpha=group["weight_decay"])
        # The rate joins the ratio on the device: neither needs its value on the host.
        parameter.sub_(update.mul_(_trust_ratio(parameter, update, group).mul_(group["lr"])))


def _adam_direction(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """First moment by root of the second: a new tensor of the parameter's shape."""
    first_mass, second_mass = 1.0, 1.0
    if group["bias_correction"]:
        step = int(state["step"])
        beta1, beta2 = group["betas"]
        first_mass, second_mass = 1.0 - beta1**step, 1.0 - beta2**step
    variance: Tensor = state["exp_avg_sq"] / second_mass
    inside, outside = (group["eps"], 0.0) if group["eps_inside_sqrt"] else (0.0, group["eps"])
    deviation = variance.add_(inside).sqrt_().add_(outside)
    return torch.div(state["exp_avg"], deviation, out=deviation).div_(first_mass)


def _trust_ratio(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
    """How much longer than `update` its parameter is, within the group's bounds. # []"""
    weight_norm, update_norm = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
    ratio = (weight_norm / update_norm).clamp_(group["min_coeff"], group["max_coeff"])
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
