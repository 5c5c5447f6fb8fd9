"""The contenders that torch itself brings: no communication, DDP, DDP with a sharded optimizer, FSDP2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from bench.contenders.base import Contender
from bench.workload import Workload


class TorchTrainer:
    """The plain training loop around any module and optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer

    def step(self, tokens: Tensor) -> Tensor:
        """One step as torch's tutorials write it."""
        loss: Tensor = self._model(tokens)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def close(self) -> None:
        """Nothing outlives the objects."""


def _build_nocomm(workload: Workload) -> TorchTrainer:
    model = workload.build_model()
    return TorchTrainer(model, workload.build_optimizer(model.parameters()))


def _build_ddp(workload: Workload) -> TorchTrainer:
    model = DistributedDataParallel(workload.build_model())
    return TorchTrainer(model, workload.build_optimizer(model.parameters()))


def _build_ddp_views(workload: Workload) -> TorchTrainer:
    # Gradients live in the communication buckets: saves their second copy, and the copying.
    model = DistributedDataParallel(workload.build_model(), gradient_as_bucket_view=True)
    return TorchTrainer(model, workload.build_optimizer(model.parameters()))


def _build_ddp_zero1(workload: Workload) -> TorchTrainer:
    model = DistributedDataParallel(workload.build_model())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=workload.optimizer_class,
        # Its documentation's setting for speed: one broadcast per bucket instead of one per parameter.
        parameters_as_bucket_view=True,
        **workload.optimizer_flags,
    )
    return TorchTrainer(model, optimizer)


def _build_fsdp2(workload: Workload) -> TorchTrainer:
    model = workload.build_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    # The optimizer comes after sharding, so that its state is sharded as well.
    return TorchTrainer(model, workload.build_optimizer(model.parameters()))


CONTENDERS = (
    Contender("nocomm", "the bare loop: ranks never talk", _build_nocomm),
    Contender("ddp", "DistributedDataParallel, defaults", _build_ddp),
    Contender("ddp_views", "DistributedDataParallel, gradient_as_bucket_view", _build_ddp_views),
    Contender("ddp_zero1", "DistributedDataParallel + ZeroRedundancyOptimizer", _build_ddp_zero1),
    Contender("fsdp2", "fully_shard per block, reshard_after_forward", _build_fsdp2),
)
