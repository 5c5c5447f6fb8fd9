"""The naive mixed precision that 16-bit training is compared with: fp32 masters beside the model that computes.

The model computes in 16 bits and so do its gradients; each rank's gradient is widened to fp32, the ranks' are added in
rank order, multiplied once by 1/W, divided by the loss scale, and given to an optimizer over fp32 masters. Then the
masters are rounded into the model.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.references import Gradients, Recipe, Record, losses_of, ordered_mean, take_gradients

NARROW = (torch.float16, torch.bfloat16)


def train_with_masters(
    recipe: Recipe, world_size: int, compute: torch.dtype | None = None, loss_scale: float = 1.0
) -> list[Record]:
    """Play all ranks of a world; `compute` None keeps every parameter's own dtype.

    Returns one Record a rank, whose weights are the masters. The recipe must have one micro-batch a step, and none of
    its gradients may overflow.
    """
    model = recipe.model()
    masters = recipe.model()  # a module, so that the recipe can build its optimizer over it
    for master in masters.parameters():
        if master.dtype in NARROW:
            master.data = master.data.float()
    if compute is not None:
        model.to(compute)
    optimizer = recipe.optimizer(masters)
    records = [Record() for _ in range(world_size)]
    for step in range(recipe.steps):
        of_rank: list[Gradients] = []
        for rank, record in enumerate(records):
            model.zero_grad()
            (loss,) = losses_of(recipe, model, step, rank)
            record.add_losses((loss,))
            (loss * loss_scale).backward()
            of_rank.append({name: gradient.float() for name, gradient in take_gradients(model).items()})
        means = ordered_mean(of_rank)
        for name, master in masters.named_parameters():
            master.grad = means[name] * (1.0 / loss_scale) if name in means else None
        optimizer.step()
        _round_into(model, masters)
    for record in records:
        record.weights = dict(masters.state_dict())
    return records


@torch.no_grad()
def _round_into(model: nn.Module, masters: nn.Module) -> None:
    for parameter, master in zip(model.parameters(), masters.parameters(), strict=True):
        parameter.copy_(master)
