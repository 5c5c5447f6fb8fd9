"""Which loader is being iterated, and whether its last batch is out.

Gradient accumulation asks it (the last batch of an epoch ends a step, however many came before), and so does whoever
gathers metrics (the last batch may hold samples twice, see ``remainder``).
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol


class TracksEnd(Protocol):
    """What a loader tells about its current iteration."""

    end_of_dataloader: bool
    remainder: int


class ActiveLoaders:
    """The loaders that are being iterated, innermost last.

    The innermost one is the one that gave a batch last. A loop that is left by ``break`` takes no leave: its loader
    counts as active until another one gives a batch. Loaders are held weakly.
    """

    def __init__(self) -> None:
        self._stack: list[weakref.ref[Any]] = []

    def __reduce__(self) -> tuple[type[ActiveLoaders], tuple[()]]:
        return type(self), ()  # a copy in another process knows no loaders

    def enter(self, loader: TracksEnd) -> None:
        """``loader`` starts, or gives its next batch: what started after it was left."""
        self.leave(loader)
        self._stack.append(weakref.ref(loader))

    def leave(self, loader: TracksEnd) -> None:
        """``loader`` has come to its end; loops inside of it that never did are over as well."""
        known = self.dataloader_references
        if loader in known:
            del self._stack[known.index(loader) :]

    @property
    def dataloader_references(self) -> list[TracksEnd | None]:
        """All loaders that are being iterated, outermost first; None in place of one that is gone."""
        return [reference() for reference in self._stack]

    @property
    def active_dataloader(self) -> TracksEnd | None:
        """The innermost one."""
        for reference in reversed(self._stack):
            loader: TracksEnd | None = reference()
            if loader is not None:
                return loader
        return None

    @property
    def in_dataloader(self) -> bool:
        """Whether any loader is being iterated."""
        return self.active_dataloader is not None

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the active loader has given its last batch."""
        loader = self.active_dataloader
        return loader is not None and loader.end_of_dataloader

    @property
    def remainder(self) -> int:
        """True samples of the active loader's last round, 0 if that is full, -1 if nobody knows."""
        loader = self.active_dataloader
        return -1 if loader is None else loader.remainder
