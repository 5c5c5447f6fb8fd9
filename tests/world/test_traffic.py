"""Bytes that a rank receives in a step are those of the formula that the page of configuration gives.

P parameters, W ranks, b bytes an element, g micro-batches; all times (W - 1)/W, since one's own slice does not travel:

    stage 0  b P + 4 P     gradients are reduced once, and their fp32 mean is gathered by ranks that step everything
    stage 1  2 b P         gradients are reduced once, stepped parameters gathered once
    stage 2  (g + 1) b P   gradients are reduced for every micro-batch
    stage 3  3 g b P       and parameters are gathered for forward and for backward, but what stays whole in between
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.references import adamw_in_two_groups
from tests.world.engine_runs import STAGES, Config, config_of, open_engine, rank
from tests.worlds import World

WIDTH, DEPTH, MICRO_BATCHES = 64, 4, 3
"""No parameter and no shard of two ranks needs padding, so that P is exact."""


class Chain(nn.Module):
    """Blocks, and a bias of the root, or a root without a parameter of its own."""

    def __init__(self, has_root_bias: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH)) if has_root_bias else None
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.bias is None else x + self.bias


def received_in_a_step(config: Config, has_root_bias: bool = True) -> tuple[dict[str, int], int]:
    """Bytes by operation in the second step (the first one predicts nothing), and P."""
    torch.manual_seed(0)
    model = Chain(has_root_bias)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    with open_engine(model, adamw_in_two_groups(model), config) as engine:
        traffic = engine._comm.traffic
        for _ in range(2):
            traffic.clear()
            for micro_batch in range(MICRO_BATCHES):
                x = torch.full((2, WIDTH), float(rank() + micro_batch))
                engine.backward(F.mse_loss(engine(x).float(), torch.ones(2, WIDTH)))
                engine.step()
        return traffic.received_bytes, num_parameters


@pytest.mark.parametrize("transport", ["process_group", "shared_memory"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_moves_what_the_formula_says(world2: World, stage: int, dtype: str, transport: str) -> None:
    config = config_of(
        stage,
        accumulation=MICRO_BATCHES,
        bf16={"enabled": dtype == "bf16"},
        shardwise={"transport": transport, "unit_classes": ["Sequential"]},
    )
    for received, num_parameters in world2.run(received_in_a_step, config):
        b = 2 if dtype == "bf16" else 4
        b_gather = 4 if transport == "shared_memory" else b
        kept = WIDTH + (num_parameters - WIDTH) // DEPTH  # root and last block stay whole from forward to backward
        reduced, gathered = {
            0: (b * num_parameters, 4 * num_parameters),
            1: (b * num_parameters, b * num_parameters),
            2: (MICRO_BATCHES * b * num_parameters, b * num_parameters),
            3: (MICRO_BATCHES * b * num_parameters, MICRO_BATCHES * b_gather * (2 * num_parameters - kept)),
        }[stage]
        assert received == {"reduce-scatter": reduced // 2, "all-gather": gathered // 2}


def test_a_root_without_parameters_still_begins_each_pass(world2: World) -> None:
    """Else nothing is predicted: every unit is gathered for forward and again for backward, the last one, too."""
    config = config_of(
        3, accumulation=MICRO_BATCHES, shardwise={"transport": "process_group", "unit_classes": ["Sequential"]}
    )
    for received, num_parameters in world2.run(received_in_a_step, config, False):
        kept = num_parameters // DEPTH
        assert received["all-gather"] == MICRO_BATCHES * 4 * (2 * num_parameters - kept) // 2
