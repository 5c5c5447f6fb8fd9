"""Copies between host memory and a GPU that run beside compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from shardwise.store.base import Done, Transfer


class _Reached(Transfer):
    """The moment at which a GPU's stream has done what it was given so far; stores know nothing of it."""

    in_order = False

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    @property
    def done(self) -> bool:
        """Whether the stream came there."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Keep the host until it does."""
        self._event.synchronize()


def _nothing() -> None:
    """What is started is done."""


class Beside:
    """A second stream of a GPU; on a CPU there is none, and what is started is done.

    What runs inside ``run`` begins when the stream of the caller has done what it was given before: memory that was
    freed there may be taken over. ``join`` lets the caller's stream wait in turn, ``end`` is for the host, which must
    not reuse pinned memory before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def is_there(self) -> bool:
        """Whether there is a second stream."""
        return self._stream is not None

    @contextmanager
    def run(self) -> Iterator[None]:
        """What is given to the device inside runs on the second stream."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What the calling thread gives to the device inside runs on a stream that waits for no other."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            yield

    def join(self) -> None:
        """The caller's stream goes on when the second one has done what it was given so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def holds(self, tensor: torch.Tensor) -> None:
        """Its memory is not used for others before the second stream has done what it was given so far."""
        if self._stream is not None and tensor.device.type == "cuda":
            tensor.record_stream(self._stream)

    def moment(self) -> Callable[[], None]:
        """Call what this returns, and the caller's stream goes on when the second one has come to here."""
        if self._stream is None:
            return _nothing
        event, device = self._stream.record_event(), self._device
        return lambda: torch.cuda.current_stream(device).wait_event(event)

    def after_caller(self) -> Transfer:
        """When the caller's stream, and the second one, have done what they were given so far."""
        with self.run():
            return self.end()

    def end(self) -> Transfer:
        """When the second stream has done what it was given so far."""
        return Done() if self._stream is None else _Reached(self._stream.record_event())
