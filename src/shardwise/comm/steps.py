"""A collective in several moves, each of which begins when the one before it is over."""

from __future__ import annotations

from collections.abc import Iterator

from shardwise.comm.base import Pending
from shardwise.store.beside import Beside

Steps = Iterator[list[Pending]]
"""A collective as a generator: it yields what must be over before it goes on."""


def begin(steps: Steps, beside: Beside) -> Pending:
    """Start it: on the CPU its first move, on a GPU all of it."""
    return _BySecondStream(steps, beside) if beside.is_there else _ByHost(steps)


class _ByHost:
    """The first messages are under way, and the rest happens when it is waited for."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._under_way = next(steps, None)

    def wait(self) -> None:
        while self._under_way is not None:
            for pending in self._under_way:
                pending.wait()
            self._under_way = next(self._steps, None)


class _BySecondStream:
    """A GPU's second stream does it from beginning to end, beside compute."""

    def __init__(self, steps: Steps, beside: Beside) -> None:
        with beside.run():
            for under_way in steps:
                for pending in under_way:
                    pending.wait()  # keeps the second stream, not the host
            self._join = beside.moment()

    def wait(self) -> None:
        self._join()
