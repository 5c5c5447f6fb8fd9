"""Arithmetic over stretches of time: how long something was under way, and how much of that beside something else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]
"""Begin and end, in any one unit; one that ends where it begins is empty."""


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as disjoint intervals in order: what overlaps or touches becomes one, what is empty goes."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if end <= begin:
            continue
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Time in which at least one of them is under way."""
    return sum(end - begin for begin, end in united(intervals))


def common(some: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """The moments in which one of ``some`` and one of ``others`` are under way: disjoint, in order."""
    left, right = united(some), united(others)
    found: list[Interval] = []
    i = j = 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            found.append((begin, end))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return found


def share_beside(some: Sequence[Interval], others: Sequence[Interval]) -> float | None:
    """Of the time in which one of ``some`` is under way, the part in which one of ``others`` is, too; None: of none."""
    whole = length(some)
    return length(common(some, others)) / whole if whole else None
