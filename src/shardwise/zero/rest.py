"""A flat array at rest: in memory, or in a store off the training device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from shardwise.layout import Span


class Rest(Protocol):
    """Elements that rest somewhere, seen as a 1-D array."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""

    @property
    def numel(self) -> int:
        """Number of elements."""

    def part(self, span: Span) -> Rest:
        """Some of them."""

    def load(self) -> torch.Tensor:
        """[numel] the memory itself, or a new tensor with what the store holds."""

    def save(self, values: torch.Tensor) -> None:
        """Replace all elements."""

    def memory(self) -> Sequence[torch.Tensor] | None:
        """The memory itself, in parts [part] that follow each other; None where they rest in files."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """Elements that are the memory of ``tensor`` [numel]."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.tensor.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.tensor.numel()

    def part(self, span: Span) -> InMemory:
        """A view."""
        return InMemory(self.tensor[span.begin : span.end])

    def load(self) -> torch.Tensor:
        """The memory itself."""
        return self.tensor

    def save(self, values: torch.Tensor) -> None:
        """In place."""
        self.tensor.copy_(values)

    def memory(self) -> Sequence[torch.Tensor]:
        """In one part."""
        return (self.tensor,)


def _no_memory(_: Span) -> None:
    return None


@dataclass(frozen=True, slots=True)
class InStore:
    """Elements ``span`` of an array that is read and written by two functions."""

    dtype: torch.dtype
    span: Span
    read: Callable[[Span, torch.Tensor], None]
    """Fill a tensor with those elements."""
    write: Callable[[Span, torch.Tensor], None]
    """Replace those elements."""
    views: Callable[[Span], Sequence[torch.Tensor] | None] = _no_memory
    """Those elements where they are, if the store is memory."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.span.numel

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize

    def part(self, span: Span) -> InStore:
        """The same array, other elements of it."""
        return InStore(self.dtype, span.shift(self.span.begin), self.read, self.write, self.views)

    def load(self) -> torch.Tensor:
        """A new tensor on the CPU."""
        values = torch.empty(self.numel, dtype=self.dtype)
        self.read(self.span, values)
        return values

    def save(self, values: torch.Tensor) -> None:
        """Through to the store."""
        self.write(self.span, values)

    def memory(self) -> Sequence[torch.Tensor] | None:
        """Of the store."""
        return self.views(self.span)
