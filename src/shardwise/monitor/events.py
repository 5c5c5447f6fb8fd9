"""Numbers of each step for trackers, under the names and over the samples that DeepSpeed's monitors use."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardwise.monitor.observer import Observer, StepReport
from shardwise.monitor.writers import Event, Writer

TRAIN_LOSS = "Train/Samples/train_loss"
LEARNING_RATE = "Train/Samples/lr"
LOSS_SCALE = "Train/Samples/loss_scale"


class _HostCopy:
    """A number that is on its way from the device; nobody waits for it."""

    def __init__(self, value: torch.Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def is_here(self) -> bool:
        return self._arrival is None or self._arrival.query()

    def read(self) -> float:
        if self._arrival is not None:
            self._arrival.synchronize()
        return float(self._value)


@dataclass(frozen=True, slots=True)
class _Waiting:
    report: StepReport
    loss: _HostCopy | None


class TrainingEvents(Observer):
    """Loss, learning rate and loss scale of each step, by samples seen.

    The loss is this rank's, as it was given to ``engine.backward``, averaged over the step's micro-batches. On CUDA a
    step's events are written when its loss has arrived on the host, with one of the next steps.
    """

    def __init__(self, writers: Sequence[Writer], with_loss_scale: bool) -> None:
        self._writers = writers
        self._with_loss_scale = with_loss_scale
        self._total: torch.Tensor | None = None
        self._num_losses = 0
        self._waiting: deque[_Waiting] = deque()

    def take_loss(self, loss: torch.Tensor) -> None:
        """Add up where the loss is."""
        loss = loss.detach().float()
        self._total = loss if self._total is None else self._total + loss
        self._num_losses += 1

    def after_step(self, report: StepReport) -> None:
        """Send the loss on its way, and write what has arrived."""
        loss = None if self._total is None else _HostCopy((self._total / self._num_losses).squeeze())
        self._total, self._num_losses = None, 0
        self._waiting.append(_Waiting(report, loss))
        while self._waiting and ((copy := self._waiting[0].loss) is None or copy.is_here()):
            self._write(self._waiting.popleft())

    def _write(self, waiting: _Waiting) -> None:
        report = waiting.report
        events = []
        if waiting.loss is not None:
            events.append(Event(TRAIN_LOSS, waiting.loss.read(), report.samples))
        if report.learning_rates:
            events.append(Event(LEARNING_RATE, report.learning_rates[0], report.samples))
        if self._with_loss_scale:
            events.append(Event(LOSS_SCALE, report.loss_scale, report.samples))
        for writer in self._writers if events else ():
            writer.write(events)

    def close(self) -> None:
        """Write what is left, and close the trackers."""
        while self._waiting:
            self._write(self._waiting.popleft())
        for writer in self._writers:
            writer.close()
