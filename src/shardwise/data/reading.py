"""Iterators that leave some items out, and that may draw one item before it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any


def leave_out(items: Iterable[Any], begin: int, end: int) -> Iterator[Any]:
    """All items but number ``begin`` (included) to ``end`` (excluded)."""
    return (item for index, item in enumerate(items) if not begin <= index < end)


class DrawAhead:
    """An iterator whose next item may be drawn early: while random states are as they shall be for it."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._drawn: deque[Any] = deque()

    def draw_ahead(self) -> None:
        """Draw one item now, if there is one."""
        self._drawn.extend(islice(self._items, 1))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._drawn.popleft() if self._drawn else next(self._items)


class IndexReader:
    """What torch's loader draws its indices from: a sampler, of which the next epoch may leave batches out."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self._gap = (0, 0)
        self._latest = DrawAhead(())

    def __getstate__(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "_gap": (0, 0), "_latest": DrawAhead(())}  # a copy begins its own epoch

    @contextmanager
    def leaving_out(self, begin: int, end: int) -> Iterator[None]:
        """An epoch opened inside leaves out batches ``begin`` to ``end``: indices are drawn, samples never read."""
        self._gap = (begin, end)
        try:
            yield
        finally:
            self._gap = (0, 0)

    def draw_ahead(self) -> None:
        """Draw the first indices of the epoch that was opened last, if its loader has not yet."""
        self._latest.draw_ahead()

    def __iter__(self) -> Iterator[Any]:
        # torch opens it twice for an epoch that workers read, and draws from the second
        self._latest = DrawAhead(leave_out(self.sampler, *self._gap))
        return self._latest

    def __len__(self) -> int:
        return len(self.sampler)
