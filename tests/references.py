"""What the engine is compared with, written naively: one process, DistributedDataParallel with an ordered sum, FSDP2.

The reduction that all of them define: take the ranks' gradients in rank order, add them in fp32 one after the other,
multiply the total once by 1/W. A rank that has no gradient counts as zeros; a parameter that no rank has a gradient for
stays without one, so the optimizer passes it by. Where states are replicated over groups of neighbouring ranks the sums
of the groups are taken first, each in this order, and then added in the order of the groups.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests import models

Cadence = Literal["once", "every"]
"""After which backward calls of a step the gradients that came since the last time are reduced: only after the last one
(stages 0 and 1), or after each one (stages 2 and 3, which have no room for what is not reduced yet)."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, apart from how. All functions are module-level: a recipe travels to the ranks by name.

    `batch(index, rank)` gives micro-batch number `index`, counted over the whole run. `loss(model, batch)` gives one
    loss, or a tuple of losses of which each gets a backward of its own.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    loss: Callable[[Any, Any], Tensor | tuple[Tensor, ...]]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    steps: int = 3
    accumulation: int = 1
    clip: float = 0.0

    def micro_batches(self, step: int) -> range:
        """Indices of the micro-batches of optimizer step `step`."""
        return range(step * self.accumulation, (step + 1) * self.accumulation)


@dataclass
class Record:
    """What a run leaves: each micro-batch's loss on this rank, each step's gradient norm, and the final weights."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add_losses(self, losses: tuple[Tensor, ...]) -> None:
        """Note the losses of one micro-batch."""
        self.losses.extend(loss.detach().clone() for loss in losses)


def adamw_in_two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices and none for vectors and scalars; frozen parameters are left out."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=3e-3,
    )


WIDE = Recipe(models.build_wide, models.vectors, models.regression, adamw_in_two_groups, steps=20)
MLP = Recipe(models.build_mlp, models.vectors, models.regression, adamw_in_two_groups)
GPT = Recipe(models.build_gpt, models.tokens, models.language, adamw_in_two_groups)


def losses_of(recipe: Recipe, model: Any, index: int, rank: int) -> tuple[Tensor, ...]:
    """Forward of one micro-batch: its losses, always as a tuple."""
    losses = recipe.loss(model, recipe.batch(index, rank))
    return losses if isinstance(losses, tuple) else (losses,)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# -- (a) one process

Gradients = dict[str, Tensor]


@functools.lru_cache(maxsize=8)  # many tests ask for the same run; nobody changes a Record that was returned
def train_alone(
    recipe: Recipe, world_size: int, cadence: Cadence = "once", group_size: int | None = None
) -> list[Record]:
    """Play all ranks of a world in this one process; returns one Record a rank, with the same weights in each."""
    model = recipe.model()
    optimizer = recipe.optimizer(model)
    records = [Record() for _ in range(world_size)]
    for step in range(recipe.steps):
        give_gradients(model, _reduced_gradients(recipe, model, step, cadence, records, group_size))
        norm = clip(model, recipe.clip)
        optimizer.step()
        for record in records:
            record.norms.append(norm)
    weights = whole_weights(model)
    for record in records:
        record.weights = weights
    return records


def _reduced_gradients(
    recipe: Recipe, model: nn.Module, step: int, cadence: Cadence, records: list[Record], group_size: int | None
) -> Gradients:
    """All backward calls of one step: every rank adds up its own until they are reduced; the means add up in turn."""
    total: Gradients = {}
    unreduced: list[Gradients] = [{} for _ in records]
    for index in recipe.micro_batches(step):
        last_micro_batch = index == recipe.micro_batches(step)[-1]
        of_rank = [
            _gradients_of_each_backward(recipe, model, index, rank, record) for rank, record in enumerate(records)
        ]
        num_backwards = len(of_rank[0])
        for number in range(num_backwards):
            for kept, found in zip(unreduced, of_rank, strict=True):
                add_into(kept, found[number])
            if cadence == "every" or (last_micro_batch and number == num_backwards - 1):
                add_into(total, ordered_mean(unreduced, group_size))
                unreduced = [{} for _ in records]
    return total


def _gradients_of_each_backward(
    recipe: Recipe, model: nn.Module, index: int, rank: int, record: Record
) -> list[Gradients]:
    losses = losses_of(recipe, model, index, rank)
    record.add_losses(losses)
    found: list[Gradients] = []
    for number, loss in enumerate(losses, start=1):
        model.zero_grad()
        (loss / recipe.accumulation).backward(retain_graph=number < len(losses))
        found.append(take_gradients(model))
    return found


def add_into(total: Gradients, more: Gradients) -> None:
    """Add gradient by gradient, as autograd accumulates."""
    for name, gradient in more.items():
        total[name] = total[name] + gradient if name in total else gradient


def take_gradients(model: nn.Module) -> Gradients:
    """The gradients that exist, copied."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def give_gradients(model: nn.Module, gradients: Gradients) -> None:
    """Set every parameter's gradient; None for those that are not in `gradients`."""
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)


def ordered_mean(of_rank: list[Gradients], group_size: int | None = None) -> Gradients:
    """Mean over ranks, added in rank order in fp32, multiplied once by 1/W, in the gradient's dtype.

    With `group_size` each group of so many neighbours is added up first.
    """
    size = group_size or len(of_rank)
    names = {name: gradient for gradients in of_rank for name, gradient in gradients.items()}
    means: Gradients = {}
    for name, like in names.items():
        total = torch.zeros_like(like, dtype=torch.float32)
        for first in range(0, len(of_rank), size):
            of_group = torch.zeros_like(total)
            for gradients in of_rank[first : first + size]:
                if name in gradients:
                    of_group += gradients[name].float()
            total += of_group
        means[name] = (total * (1.0 / len(of_rank))).to(like.dtype)
    return means


def clip(model: nn.Module, largest: float) -> float:
    """Clip by the global norm when `largest` is above 0; returns the norm before clipping."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if largest > 0:
        return float(torch.nn.utils.clip_grad_norm_(parameters, largest))
    return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


# -- (b), (c): real ranks


def train(
    recipe: Recipe,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    accumulate_quietly: Callable[[], AbstractContextManager[None]],
    weights: Callable[[], dict[str, Tensor]],
) -> Record:
    """The plain data parallel loop of this rank; `accumulate_quietly` surrounds all but the last micro-batch."""
    record = Record()
    for step in range(recipe.steps):
        optimizer.zero_grad()
        for index in recipe.micro_batches(step):
            last = index == recipe.micro_batches(step)[-1]
            with nullcontext() if last else accumulate_quietly():
                losses = losses_of(recipe, module, index, dist.get_rank())
                record.add_losses(losses)
                for number, loss in enumerate(losses, start=1):
                    (loss / recipe.accumulation).backward(retain_graph=number < len(losses))
        record.norms.append(clip(module, recipe.clip))
        optimizer.step()
    record.weights = weights()
    return record


def train_with_ddp(recipe: Recipe, find_unused_parameters: bool = False) -> Record:
    """DistributedDataParallel whose buckets are reduced in rank order."""
    model = recipe.model()
    optimizer = recipe.optimizer(model)
    parallel = DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
    parallel.register_comm_hook(None, ordered_all_reduce)
    return train(recipe, parallel, optimizer, parallel.no_sync, lambda: whole_weights(model))


def ordered_all_reduce(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook: gather every rank's bucket, then add in rank order as `ordered_mean` does."""
    mine = bucket.buffer()
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]  # W x [N]
    dist.all_gather(gathered, mine)
    total = torch.zeros_like(mine, dtype=torch.float32)
    for gradient in gathered:
        total += gradient.float()
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result((total * (1.0 / len(gathered))).to(mine.dtype))
    return future


def train_with_fsdp2(recipe: Recipe) -> Record:
    """FSDP2: every block of the model, then the root. The optimizer is built on its sharded parameters."""
    model = recipe.model()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    assert isinstance(model.blocks, nn.ModuleList)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(recipe, model, recipe.optimizer(model), nullcontext, lambda: dict(_whole_fsdp2(model)))


def _whole_fsdp2(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in model.state_dict().items():
        yield name, value.full_tensor().detach().clone()


# -- comparing


def assert_same(got: Record, wanted: Record, what: str) -> None:
    """Losses and weights agree bit for bit."""
    _assert_alike(got, wanted, what, torch.equal)


def assert_near(got: Record, wanted: Record, what: str, rtol: float, atol: float) -> None:
    """Losses and weights agree within the tolerance."""
    _assert_alike(got, wanted, what, functools.partial(torch.allclose, rtol=rtol, atol=atol))


def _assert_alike(got: Record, wanted: Record, what: str, alike: Callable[[Tensor, Tensor], bool]) -> None:
    assert len(got.losses) == len(wanted.losses), f"{what}: {len(got.losses)} losses, wanted {len(wanted.losses)}"
    faults = [
        f"loss {index}: {ours.item()!r}, wanted {theirs.item()!r}"
        for index, (ours, theirs) in enumerate(zip(got.losses, wanted.losses, strict=True))
        if not alike(ours, theirs)
    ]
    assert list(got.weights) == list(wanted.weights), f"{what}: names {list(got.weights)}, not {list(wanted.weights)}"
    for name, ours in got.weights.items():
        theirs = wanted.weights[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            faults.append(f"{name}: {ours.dtype} {tuple(ours.shape)}, wanted {theirs.dtype} {tuple(theirs.shape)}")
        elif not alike(ours, theirs):
            apart = (ours.double() - theirs.double()).abs()
            faults.append(
                f"{name}: {int((apart > 0).sum())} of {apart.numel()} elements, up to {apart.max().item():.3g}"
            )
    assert not faults, f"{what} differs:\n  " + "\n  ".join(faults)
