"""Which parameter sits where: the arithmetic of flat buffers, without any process or device.

A *layout* lays the parameters of one unit end to end in a flat buffer of ``numel`` elements and cuts that buffer into
one *shard* a rank::

    slots   | wte ......... |gap| ln.weight |gap| ln.bias |gap|pad|
    cuts    0               c1              c2                    numel      rank r owns [cuts[r], cuts[r+1])

Unshard, reduce, optimizer, memory report and checkpoint all ask the layout; none of them does this arithmetic again.
All positions are counted in elements, never in bytes, so that one layout serves parameters, gradients and optimizer
state of any dtype.

Offsets are aligned so that every parameter starts where a vector load may start, whatever its neighbours' sizes: a
matrix product then takes the same path through the kernels as on a tensor of its own. Alignment gaps hold zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

ALIGNMENT = 32
"""Elements: 128 bytes of fp32, 64 bytes of bf16, a cache line at least."""

MAX_BLOCK = 4096
"""Elements that may share a scale where values are quantised: longer blocks save no byte worth telling, and one outlier
spoils more."""

NO_GROUP = -1
"""Group of a parameter that no optimizer owns."""


@dataclass(frozen=True, slots=True)
class Span:
    """Elements ``begin`` (included) to ``end`` (excluded) of a flat buffer."""

    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements, 0 for an empty span."""
        return self.end - self.begin

    def intersect(self, other: Span) -> Span:
        """What both spans cover; an empty span where they do not meet."""
        begin = max(self.begin, other.begin)
        return Span(begin, max(begin, min(self.end, other.end)))

    def shift(self, by: int) -> Span:
        """The same elements, counted from another origin."""
        return Span(self.begin + by, self.end + by)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one parameter: ``numel`` elements from ``offset`` on, owned by optimizer group ``group``."""

    name: str
    shape: tuple[int, ...]
    group: int
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-dim parameter."""
        return math.prod(self.shape)

    @property
    def span(self) -> Span:
        """The slot's elements in the flat buffer, without the gap behind it."""
        return Span(self.offset, self.offset + self.numel)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in some span of the flat buffer."""

    slot: int
    """Index of the parameter in ``Layout.slots``."""
    within_parameter: Span
    """The elements of the flattened parameter."""
    within_buffer: Span
    """The same elements, counted in the flat buffer."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A flat buffer: its parameters' slots in order, and the ``world + 1`` cuts between the ranks' shards."""

    slots: tuple[Slot, ...]
    cuts: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole buffer, gaps and padding included."""
        return self.cuts[-1]

    @property
    def world(self) -> int:
        """Number of ranks that the buffer is cut for."""
        return len(self.cuts) - 1

    @property
    def whole(self) -> Span:
        """The whole buffer as one span."""
        return Span(0, self.numel)

    def shard(self, rank: int) -> Span:
        """The contiguous slice that ``rank`` owns."""
        return Span(self.cuts[rank], self.cuts[rank + 1])

    def pieces(self, span: Span) -> Iterator[Piece]:
        """The parameters that lie wholly or partly in ``span``, in order."""
        for index, slot in enumerate(self.slots):
            common = slot.span.intersect(span)
            if common.numel:
                yield Piece(index, common.shift(-slot.offset), common)

    def gaps(self) -> Iterator[Span]:
        """The elements that belong to no parameter: they must hold zeros."""
        at = 0
        for slot in self.slots:
            if slot.offset > at:
                yield Span(at, slot.offset)
            at = slot.span.end
        if self.numel > at:
            yield Span(at, self.numel)

    def runs(self, span: Span, max_numel: int) -> Iterator[tuple[int, Span]]:
        """Cut ``span`` into ``(group, run)``: neighbours of one optimizer group joined, at most ``max_numel`` long.

        A run may cover the alignment gaps between its parameters (zeros stay zeros under an elementwise optimizer),
        never the padding behind the last one, and never a parameter without a group.
        """
        group, begin, end = NO_GROUP, 0, 0
        for piece in self.pieces(span):
            piece_group = self.slots[piece.slot].group
            if piece_group != group:
                yield from _cut(group, Span(begin, end), max_numel)
                group, begin = piece_group, piece.within_buffer.begin
            end = piece.within_buffer.end
        yield from _cut(group, Span(begin, end), max_numel)


def _cut(group: int, span: Span, max_numel: int) -> Iterator[tuple[int, Span]]:
    if group != NO_GROUP:
        for begin in range(span.begin, span.end, max_numel):
            yield group, Span(begin, min(begin + max_numel, span.end))


def _align(position: int, alignment: int = ALIGNMENT) -> int:
    return -(-position // alignment) * alignment


def _place(slots: Sequence[Slot], start: int, alignment: int = ALIGNMENT) -> tuple[list[Slot], int]:
    """Give each slot its aligned offset from ``start`` on; returns them and the aligned end."""
    placed = []
    for slot in slots:
        placed.append(replace(slot, offset=start))
        start = _align(start + slot.numel, alignment)
    return placed, start


def even_layout(slots: Sequence[Slot], world: int, alignment: int = ALIGNMENT) -> Layout:
    """Cut into equal shards, anywhere, also inside a parameter: what an elementwise optimizer allows.

    Parameters of one optimizer group are laid next to each other (in their given order), so that a shard holds one
    long run a group. Parameters and shards begin at multiples of ``alignment``, itself a multiple of ``ALIGNMENT``.
    """
    placed, end = _place(sorted(slots, key=lambda slot: slot.group), 0, alignment)
    shard = _align(-(-end // world), alignment)
    return Layout(tuple(placed), tuple(shard * rank for rank in range(world + 1)))


def whole_parameter_layout(slots: Sequence[Slot], loads: list[int]) -> Layout:
    """Cut between parameters only: each lies whole on one owner rank, as an optimizer needs that sees matrices.

    The largest parameter goes first to the rank that has least so far. ``loads`` counts the elements of each rank over
    several layouts and is updated, so that the balance holds over the whole model rather than in each unit.
    """
    owned: list[list[Slot]] = [[] for _ in loads]
    for slot in sorted(slots, key=lambda slot: -slot.numel):
        owner = loads.index(min(loads))
        owned[owner].append(slot)
        loads[owner] += slot.numel
    placed: list[Slot] = []
    cuts = [0]
    for part in owned:
        part_placed, end = _place(part, cuts[-1])
        placed += part_placed
        cuts.append(end)
    return Layout(tuple(placed), tuple(cuts))
