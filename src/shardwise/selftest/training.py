"""A small model trained by the engine, beside the same training in one process in fp32."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.config import BatchSizes, EngineConfig
from shardwise.mesh import Mesh
from shardwise.optim.json_optimizers import build_optimizer
from shardwise.optim.schedulers import build_scheduler
from shardwise.selftest.book import CheckFailed
from shardwise.selftest.collectives import gathered_bytes
from shardwise.selftest.settings import MICRO_BATCH, WIDTH
from shardwise.zero.assembly import DTYPES
from shardwise.zero.engine import Engine
from shardwise.zero.init import initialize

NUM_STEPS = 8
NUM_BLOCKS = 3
LEARNING_RATE = 0.01
MOST_SKIPPED_STEPS = 40  # a dynamic loss scale starts at up to 2^127 and halves where it overflows

# How far the weights may lie from the reference's, as a part of the way that training has moved them. In fp32 only the
# order of sums differs; in 16 bits every product is rounded, and fp16 rounds eight times finer than bf16.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.2}

_REPORT = (
    "Set shardwise.check_collectives to true in the JSON and run the test again: it stops at the collective that goes "
    "wrong. Then report it, with `shardwise env` and `shardwise explain`."
)
Weights = dict[str, torch.Tensor]


class Block(nn.Module):
    """A residual layer; the engine makes each of them a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, WIDTH] -> [B, WIDTH]"""
        inner: torch.Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return x + inner


class SmallModel(nn.Module):
    """Blocks between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.outlet = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, WIDTH] -> [B, 1]"""
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.outlet(x)
        return out


@dataclass(frozen=True)
class Trained:
    """What a training came to on this rank."""

    losses: list[float]  # of each step, the mean over this rank's micro-batches
    weights: Weights  # whole, in fp32, on the host
    digest: bytes
    num_skipped_steps: int


def check_recipes(config: EngineConfig) -> None:
    """Build the config's optimizer and scheduler for nothing but their ConfigError: the job trains with its own."""
    if config.optimizer is None:
        return
    optimizer = build_optimizer(config.optimizer.type, config.optimizer.params, list(_model().parameters()))
    if config.scheduler is not None:
        build_scheduler(config.scheduler.type, config.scheduler.params, optimizer)


def train(mesh: Mesh, config: EngineConfig) -> Trained:
    """Train with the engine."""
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    engine, _, _, _ = initialize(model=model, optimizer=optimizer, config=config, device=mesh.device.type)
    with engine:
        sizes = config.resolve_batch(mesh.dp_shard.size)
        batches = [_batch(mesh.dp_shard.rank, number) for number in range(sizes.gradient_accumulation_steps)]
        losses: list[float] = []
        while len(losses) < NUM_STEPS:
            loss = _one_step(engine, batches)
            if engine.was_step_applied():
                losses.append(loss)
            elif engine.skipped_steps > MOST_SKIPPED_STEPS:
                raise CheckFailed(
                    f"{engine.skipped_steps} steps in a row had gradients that are not finite, at a loss scale of "
                    f"{engine.loss_scale:g}.",
                    "Lower fp16.initial_scale_power, or use bf16 where the device has it.",
                )
        state = engine.state_dict()
        weights = {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}
        return Trained(losses, weights, _digest(weights), engine.skipped_steps)


def reference(config: EngineConfig, num_ranks: int) -> Weights:
    """The same training without any engine: one process, fp32, the batches of all ranks."""
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    sizes = config.resolve_batch(num_ranks)
    batches = list(_batches_of_all(num_ranks, sizes))
    share = 1.0 / sizes.gradient_accumulation_steps
    if config.gradient_allreduce_op == "mean":
        share /= num_ranks
    for _ in range(NUM_STEPS):
        for x, y in batches:
            (_loss(model(x), y) * share).backward()
        if config.gradient_clipping:
            nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def compare_with_reference(trained: Trained, config: EngineConfig, num_ranks: int) -> str:
    """The weights must lie where the reference's lie."""
    start, expected = _model().state_dict(), reference(config, num_ranks)
    dtype = config.compute_dtype
    # Whole weights come in the compute dtype: beside what training does to them, they are rounded once.
    rounding = torch.finfo(DTYPES[dtype]).eps / 2 * _norm(expected)
    allowed = TOLERANCE[dtype] * _distance(expected, start) + rounding
    apart = _distance(trained.weights, expected)
    said = f"{apart:.1e} from the one-process reference, at most {allowed:.1e} in {dtype}"
    if not apart <= allowed:  # so that NaN fails
        raise CheckFailed(f"the weights are {said}.", _REPORT)
    skipped = f"; {trained.num_skipped_steps} steps skipped by the loss scale" if trained.num_skipped_steps else ""
    return said + skipped


def compare_losses(trained: Trained) -> str:
    """Training on the same batches must lower the loss."""
    first, last = trained.losses[0], trained.losses[-1]
    if not last < first:
        raise CheckFailed(f"the loss went from {first:.6g} to {last:.6g} in {NUM_STEPS} steps.", _REPORT)
    return f"from {first:.4g} to {last:.4g} in {NUM_STEPS} steps"


def compare_ranks(trained: Trained, mesh: Mesh) -> str:
    """All ranks must hold the same bits."""
    digests = gathered_bytes(mesh.dp_shard, trained.digest)
    counts = {digest: digests.count(digest) for digest in digests}
    usual = max(digests, key=lambda digest: counts[digest])  # the first of those that most ranks hold
    if trained.digest != usual:
        others = [rank for rank, digest in enumerate(digests) if digest == usual]
        raise CheckFailed(
            f"its weights have the hash {trained.digest.hex()[:12]}, those of rank {others[0]} {usual.hex()[:12]}.",
            _REPORT,
        )
    return f"hash {usual.hex()[:12]} on {'every rank' if mesh.dp_shard.size > 1 else 'the one rank'}"


def _one_step(engine: Engine, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    total = 0.0
    for x, y in batches:
        loss = _loss(engine(x.to(engine.device)), y.to(engine.device))
        engine.backward(loss)
        engine.step()
        total += loss.item()
    return total / len(batches)


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output.float(), target)


def _model() -> SmallModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return SmallModel()


def _batch(rank: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The micro-batch that a rank sees in every step: [B, WIDTH] and [B, 1]."""
    source = torch.Generator().manual_seed(1000 * rank + number)
    x = torch.randn(MICRO_BATCH, WIDTH, generator=source)
    return x, torch.sin(x.sum(1, keepdim=True))


def _batches_of_all(num_ranks: int, sizes: BatchSizes) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for rank in range(num_ranks):
        for number in range(sizes.gradient_accumulation_steps):
            yield _batch(rank, number)


def _distance(one: Weights, other: Weights) -> float:
    return _norm({name: one[name] - other[name] for name in one})


def _norm(weights: Weights) -> float:
    return math.sqrt(sum(float(weight.double().pow(2).sum()) for weight in weights.values()))


def _digest(weights: Weights) -> bytes:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(weights[name].numpy().tobytes())
    return found.digest()
