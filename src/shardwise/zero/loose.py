"""Gradients of a model that has no optimizer here: averaged where autograd leaves them, in ``parameter.grad``.

Such a model is stepped by hand, or not at all. Data parallelism without an engine averages these gradients too; left as
they are, ranks that step by hand would drift apart unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn

from shardwise.comm.base import CollectiveId, Communicator


@torch.no_grad()
def average_loose_gradients(comm: Communicator, parameters: Sequence[nn.Parameter], step: int) -> None:
    """Give every rank the mean of each ``parameter.grad``, zeros counting where a rank has none. Collective.

    What was averaged before and has been added to since comes out right: ranks share it, so its mean is itself.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return
    mine = bytes(parameter.grad is not None for parameter in parameters)
    masks = comm.exchange(CollectiveId("gradients without an optimizer", "", step), mine)
    used = [parameter for i, parameter in enumerate(parameters) if any(mask[i] for mask in masks)]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for _, group in groupby(sorted(used, key=lambda p: str(p.dtype)), key=lambda p: p.dtype):
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # [N]
        comm.average(flat)
        means = flat.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
