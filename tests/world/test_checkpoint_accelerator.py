"""save_state and load_state of everything that was prepared: models, schedulers, loaders, objects, random states."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from shardwise.errors import CheckpointError, ConfigError
from shardwise.handlers import ProjectConfiguration
from tests.accelerators import accelerator_of, model_of, samples
from tests.world.engine_runs import STAGES
from tests.worlds import World, WorldPool

NUM_SAMPLES = 60


class Average:
    """An object of the script's own: an average of the losses."""

    def __init__(self) -> None:
        self.value = torch.zeros(())
        self.history: list[float] = []

    def add(self, loss: torch.Tensor) -> None:
        self.value = 0.9 * self.value + 0.1 * loss.detach()
        self.history.append(float(loss))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.history = state["value"], state["history"]


def config_of(stage: int, accumulation: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }


class Run:
    """A script: two models that train on one loss, shuffled data, dropout, a scheduler, an average."""

    def __init__(self, accelerator: Any) -> None:
        torch.manual_seed(5)
        loader = DataLoader(samples(NUM_SAMPLES), batch_size=3, shuffle=True)  # type: ignore[arg-type]
        self.accelerator = accelerator
        self.dropout = torch.nn.Dropout(0.2)
        first, second = model_of(1), torch.nn.Linear(5, 5)
        self.loader, self.first, self.first_optimizer = accelerator.prepare(
            loader, first, torch.optim.AdamW(first.parameters(), lr=1e-3)
        )
        optimizer = torch.optim.SGD(second.parameters(), lr=1e-2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 7], 0.5)
        self.second, self.second_optimizer, self.scheduler = accelerator.prepare(second, optimizer, scheduler)
        self.average = Average()
        accelerator.register_for_checkpointing(self.average)
        self.losses = self._loop()

    def train(self, num_batches: int) -> list[float]:
        """That many batches, from where the last call ended."""
        return [next(self.losses) for _ in range(num_batches)]

    def resume(self, directory: str | None = None) -> None:
        """Load, and leave the loop that runs."""
        self.accelerator.load_state(directory)
        self.losses.close()
        self.losses = self._loop()

    def _loop(self) -> Generator[float, None, None]:
        while True:
            for inputs, labels in self.loader:
                with self.accelerator.accumulate(self.first, self.second):
                    out = self.second(self.dropout(self.first(inputs)))
                    loss = torch.nn.functional.cross_entropy(out, labels)
                    self.accelerator.backward(loss)
                    for optimizer in (self.first_optimizer, self.second_optimizer):
                        optimizer.step()
                    self.scheduler.step()
                    for optimizer in (self.first_optimizer, self.second_optimizer):
                        optimizer.zero_grad()
                self.average.add(loss)
                yield float(loss)

    def weights(self) -> dict[str, torch.Tensor]:
        return {f"{n}.{k}": v for n, e in enumerate((self.first, self.second)) for k, v in e.state_dict().items()}


@contextmanager
def script(stage: int, accumulation: int = 1, **arguments: Any) -> Iterator[Run]:
    """The script on an accelerator of its own; its loop is left at the end."""
    with accelerator_of(config_of(stage, accumulation), **arguments) as accelerator:
        run = Run(accelerator)
        try:
            yield run
        finally:
            run.losses.close()


def goes_on(stage: int, accumulation: int, before: int, directory: str) -> None:
    with script(stage, accumulation) as run:
        run.train(before)
        assert run.accelerator.save_state(directory) == directory
        wanted = run.train(9)
        weights, rate, average = run.weights(), run.scheduler.get_last_lr(), run.average.state_dict()
    with script(stage, accumulation) as run:
        run.train(1)
        run.resume(directory)
        assert run.train(9) == wanted
        assert run.scheduler.get_last_lr() == rate
        if run.accelerator.is_main_process:  # whose objects are kept
            assert torch.equal(run.average.value, average["value"]) and run.average.history == average["history"]
        for name, value in run.weights().items():
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_training_goes_on_in_the_middle_of_an_epoch(world: World, stage: int, tmp_path: Path) -> None:
    world.run(goes_on, stage, 1, 4, str(tmp_path))


def write_in(directory: str, stage: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    with script(stage) as run:
        run.train(4)
        run.accelerator.save_state(directory)
        return run.average.history, run.weights()


def read_in(directory: str, stage: int) -> tuple[list[float], dict[str, torch.Tensor], int]:
    with script(stage) as run:
        run.resume(directory)
        return run.average.history, run.weights(), run.loader.state_dict()["batches"]


def test_another_world(worlds: WorldPool, tmp_path: Path) -> None:
    history, weights = worlds[2].run(write_in, str(tmp_path), 3)[0]
    for found_history, found, batches in worlds[1].run(read_in, str(tmp_path), 1):
        assert found_history == history
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert batches == 8  # of 3 samples, as 4 rounds of 2 x 3


def hooks_and_names(project: str) -> None:
    configuration = ProjectConfiguration(project_dir=project, automatic_checkpoint_naming=True, total_limit=2)
    called: list[Any] = []
    with script(2, project_config=configuration) as run:
        accelerator = run.accelerator

        def save_hook(models: list[Any], weights: list[Any], output_dir: str) -> None:
            weights.pop()  # as scripts of today's libraries do
            called.append(("save", len(models), Path(output_dir).name))

        handle = accelerator.register_save_state_pre_hook(save_hook)
        accelerator.register_load_state_pre_hook(lambda models, folder: called.append(("load", len(models))))
        for _ in range(4):
            run.train(1)
            accelerator.save_state()
        base = Path(project) / "checkpoints"
        assert sorted(path.name for path in base.glob("checkpoint_*")) == ["checkpoint_2", "checkpoint_3"]
        handle.remove()
        run.train(2)
        run.resume()
        assert len(run.average.history) == 4
        assert called == [("save", 2, f"checkpoint_{n}") for n in range(4)] + [("load", 2)]
        configuration.iteration = 3
        with pytest.raises(ConfigError, match="checkpoint_3 is there already"):
            accelerator.save_state()
    again = ProjectConfiguration(project_dir=project, automatic_checkpoint_naming=True, total_limit=2)
    with script(2, project_config=again) as run:
        run.resume()
        assert again.iteration == 4


def test_hooks_and_automatic_names(world2: World, tmp_path: Path) -> None:
    world2.run(hooks_and_names, str(tmp_path))


def refusals(directory: str) -> None:
    with script(1) as run:
        accelerator = run.accelerator
        with pytest.raises(ConfigError, match="without state_dict"):
            accelerator.register_for_checkpointing(object())
        with pytest.raises(ConfigError, match="no directory"):
            accelerator.save_state()
        run.average.history = [lambda: 0]  # type: ignore[list-item]
        with pytest.raises(CheckpointError, match=r"state\.custom\.0\.history\.0 is a function"):
            accelerator.save_state(directory)
        run.average.history = []
        accelerator.save_state(directory)
        accelerator.register_for_checkpointing(Average())
        with pytest.raises(CheckpointError, match=r"1 registered object\(s\), and 2"):
            accelerator.load_state(directory)
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            accelerator.load_state(f"{directory}/nothing")


def test_mistakes_are_told(world2: World, tmp_path: Path) -> None:
    world2.run(refusals, str(tmp_path))


def only_one_rank(directory: str) -> str:
    with script(3) as run:
        accelerator = run.accelerator
        if accelerator.is_main_process:
            accelerator.save_state(directory)
        run.train(1)
    return ""


def test_one_rank_alone_is_told_within_seconds(own_world: Any, tmp_path: Path) -> None:
    world = own_world(2)
    failures = world.run_expecting_errors(only_one_rank, str(tmp_path))
    assert failures[0] is not None
    assert "save_state" in failures[0].message and "Call it on all ranks" in failures[0].message


def run_without_models(directory: str) -> None:
    with accelerator_of() as accelerator:
        average = Average()
        accelerator.register_for_checkpointing(average)
        average.add(torch.tensor(float(accelerator.process_index + 1)))
        accelerator.save_state(directory)
        average.add(torch.tensor(7.0))
        accelerator.load_state(directory)
        assert average.history == [1.0]


def test_without_any_model(world2: World, tmp_path: Path) -> None:
    world2.run(run_without_models, str(tmp_path))
