"""A training script that is killed and started again: ``python -m tests.restarted SETTINGS.json``, under a launcher.

It has what a resume may forget: accumulation, a scheduler, dropout, data that are shuffled anew each epoch, saves in
the middle of epochs and of accumulation windows. It says what it did in one file a rank and attempt.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from shardwise.checkpoint import shard_file
from shardwise.checkpoint.manifest import complete_tags
from shardwise.checkpointing import FOLDER
from tests.accelerators import accelerator_of, model_of, samples

EPOCHS, NUM_SAMPLES, BATCH, SAVE_EVERY = 3, 60, 3, 5
WINDOW = 2  # micro-batches a step: every other save lies in the middle of one


@dataclass(frozen=True)
class Kill:
    """When a rank kills itself."""

    attempt: int
    rank: int
    batch: int
    at_write: int = 0
    """Of the save after that batch; 0: before the batch."""


@dataclass(frozen=True)
class Settings:
    """What the script is told."""

    directory: str
    front: str
    """accelerator or engine."""
    stage: int
    async_save: bool = False
    kills: list[Kill] = field(default_factory=list)

    @classmethod
    def read(cls, path: str) -> Settings:
        told = json.loads(Path(path).read_text())
        return cls(**{**told, "kills": [Kill(**kill) for kill in told["kills"]]})

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path

    @property
    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": WINDOW,
            "zero_optimization": {"stage": self.stage},
        }


class Diary:
    """What this rank did in this attempt, and where it ends."""

    def __init__(self, settings: Settings, rank: int, attempt: int) -> None:
        self._settings = settings
        self._kills = [kill for kill in settings.kills if (kill.attempt, kill.rank) == (attempt, rank)]
        self._file = (Path(settings.directory) / f"said.{rank}.{attempt}").open("w", buffering=1)

    def before(self, batch: int) -> None:
        """A batch begins, or its save."""
        for kill in self._kills:
            if kill.batch == batch and kill.at_write == 0:
                self._wait_for_a_checkpoint()
                os.kill(os.getpid(), signal.SIGKILL)

    def _wait_for_a_checkpoint(self) -> None:
        """One that is written beside training may take longer than the batches since, and then there is none."""
        directory = Path(self._settings.directory)
        deadline = time.monotonic() + 120  # a net, not a measure of speed
        while not any(map(complete_tags, [directory, *directory.glob(f"{FOLDER}/checkpoint_*")])):
            assert time.monotonic() < deadline, "no checkpoint is ever complete"
            time.sleep(0.01)

    def before_save(self, batch: int) -> None:
        """The save after a batch begins."""
        for kill in self._kills:
            if kill.batch == batch and kill.at_write:
                _die_at_write(kill.at_write)

    def after(self, batch: int, loss: torch.Tensor) -> None:
        """A batch is over."""
        self._file.write(f"{batch} {float(loss.detach()).hex()}\n")

    def end(self, weights: dict[str, torch.Tensor]) -> None:
        """All is over."""
        digest = hashlib.sha256()
        for name, value in sorted(weights.items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        self._file.write(f"weights {digest.hexdigest()}\n")


def _die_at_write(number: int) -> None:
    write, count = os.write, 0

    def counted(descriptor: int, data: Any) -> int:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, memoryview(data)[:1000])

    shard_file.os.write = counted  # type: ignore[assignment]


class Net(nn.Module):
    """The test model, with dropout before it."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.rest = model_of(1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.rest(self.dropout(inputs))


@dataclass
class Progress:
    """How far training is."""

    epoch: int = 0
    batches: int = 0

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batches = state["epoch"], state["batches"]


def schedule_of(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)


def with_accelerator(settings: Settings, diary: Diary) -> None:
    from shardwise.utils import ProjectConfiguration

    project = ProjectConfiguration(settings.directory, automatic_checkpoint_naming=True, total_limit=2)
    with accelerator_of(settings.config, project_config=project) as accelerator:
        torch.manual_seed(5)
        loader: Any = DataLoader(samples(NUM_SAMPLES), batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]
        model: Any = Net()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, schedule_of(optimizer))
        progress = Progress()
        accelerator.register_for_checkpointing(progress)
        accelerator.load_state(missing_ok=True)
        for _ in range(progress.epoch, EPOCHS):
            for inputs, labels in loader:
                diary.before(progress.batches + 1)
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(inputs), labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                progress.batches += 1
                diary.after(progress.batches, loss)
                if progress.batches % SAVE_EVERY == 0:
                    diary.before_save(progress.batches)
                    accelerator.save_state(async_save=settings.async_save)
            progress.epoch += 1
        accelerator.wait_for_checkpoint()
        diary.end(model.state_dict())


def batches_of(epoch: int, rank: int, size: int) -> Iterator[Any]:
    """This rank's batches, in an order of the epoch's own."""
    order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()
    data = samples(NUM_SAMPLES)
    for start in range(rank * BATCH, NUM_SAMPLES - BATCH * size + rank * BATCH + 1, BATCH * size):
        chosen = [data[index] for index in order[start : start + BATCH]]
        yield torch.stack([x for x, _ in chosen]), torch.stack([y for _, y in chosen])


def with_engine(settings: Settings, diary: Diary, rank: int, size: int) -> None:
    import shardwise

    torch.manual_seed(5)
    model = Net()
    torch.manual_seed(100 + rank)  # for dropout
    engine: Any
    engine, *_ = shardwise.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        lr_scheduler=schedule_of,
        config=settings.config,
    )
    with engine:
        _, kept = engine.load_checkpoint(settings.directory)
        progress = Progress(**(kept or {}))
        first = progress.batches
        progress.batches = 0
        for progress.epoch in range(EPOCHS):
            for inputs, labels in batches_of(progress.epoch, rank, size):
                progress.batches += 1
                if progress.batches <= first:
                    continue
                diary.before(progress.batches)
                loss = nn.functional.cross_entropy(engine(inputs), labels)
                engine.backward(loss)
                engine.step()
                diary.after(progress.batches, loss)
                if progress.batches % SAVE_EVERY == 0:
                    diary.before_save(progress.batches)
                    engine.save_checkpoint(
                        settings.directory,
                        f"batch{progress.batches}",
                        asdict(progress),
                        keep_last=2,
                        async_save=settings.async_save,
                    )
        engine.wait_for_checkpoint()
        diary.end(engine.state_dict())


def run(settings: Settings, rank: int, size: int, attempt: int) -> None:
    diary = Diary(settings, rank, attempt)
    fronts: dict[str, Callable[[], None]] = {
        "accelerator": lambda: with_accelerator(settings, diary),
        "engine": lambda: with_engine(settings, diary, rank, size),
    }
    fronts[settings.front]()


def main() -> None:
    names = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    rank, size, attempt = (int(os.environ[name]) for name in names)
    run(Settings.read(sys.argv[1]), rank, size, attempt)


if __name__ == "__main__":
    main()
