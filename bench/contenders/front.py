"""The front-end's loop over shardwise's own engine: what the five lines of a script cost beside the engine's three."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from bench.contenders.base import Contender
from bench.workload import Workload


class AcceleratorTrainer:
    """The training loop of a script that was written for Accelerate."""

    def __init__(self, accelerator: Any, model: Any, optimizer: Any) -> None:
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer

    def step(self, tokens: Tensor) -> Tensor:
        """One step; with an accumulation of one, every micro-batch steps."""
        with self._accelerator.accumulate(self._model):
            loss: Tensor = self._model(tokens)
            self._accelerator.backward(loss)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.detach()

    def close(self) -> None:
        """End the engine."""
        self._accelerator.free_memory()


def _reason_to_skip() -> str | None:
    return None if importlib.util.find_spec("shardwise") else "shardwise is not installed in this environment"


def _prepare() -> None:
    importlib.import_module("shardwise").Accelerator  # noqa: B018  loads the modules where they load lazily


def _build(workload: Workload) -> AcceleratorTrainer:
    accelerator = importlib.import_module("shardwise").Accelerator(cpu=True)
    model = workload.build_model()
    model, optimizer = accelerator.prepare(model, workload.build_optimizer(model.parameters()))
    return AcceleratorTrainer(accelerator, model, optimizer)


CONTENDERS = (
    # One of them a process: what a run is, is known to the whole process.
    Contender("accelerator", "shardwise's Accelerator, without ZeRO", _build, _reason_to_skip, _prepare),
)
