"""Those who read the optimizer's state beside training, such as a save: who changes it waits for them first."""

from __future__ import annotations

import threading
import weakref

import torch
from torch.utils.hooks import RemovableHandle


class StateReaders:
    """Readers of one optimizer's state.

    Passes of the model do not touch it, so that there is time to read it until the next step: whoever steps the
    optimizer waits, the engine or anybody else. Those who change the state by other means call ``wait`` themselves.

    Args:
        optimizer: that keeps the state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._ends: list[threading.Event] = []
        self._before_step: RemovableHandle | None = None

    def add(self, end: threading.Event) -> None:
        """Somebody has begun to read, and sets ``end`` when that is over, whatever happens."""
        self._ends = [earlier for earlier in self._ends if not earlier.is_set()]
        self._ends.append(end)
        if self._before_step is None:  # most optimizers never have a reader, and need no hook that costs time
            readers = weakref.ref(self)
            self._before_step = self._optimizer.register_step_pre_hook(lambda *_: _wait(readers()))

    def wait(self) -> None:
        """Return when nobody reads any more."""
        while self._ends:
            self._ends.pop().wait()

    def close(self) -> None:
        """``wait``, and leave the optimizer as it was."""
        self.wait()
        if self._before_step is not None:
            self._before_step.remove()
            self._before_step = None


def _wait(readers: StateReaders | None) -> None:
    if readers is not None:
        readers.wait()
