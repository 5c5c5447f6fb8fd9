"""A stream of windows: read ahead in order, as many as may be; units that are passed over leave nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shardwise.zero.window_stream import Visit, WindowStream

NUM_WINDOWS = {"a": 5, "b": 3, "c": 0, "d": 1}


class Memory:
    """What is loaded, by name, and the most that was at a time."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.most = 0

    def load(self, visit: Visit) -> None:
        visit.loaded = f"{visit.unit}{visit.window}"  # type: ignore[assignment]
        self.loaded.append(str(visit.loaded))
        self.most = max(self.most, len(self.loaded))

    def let_go(self, loaded: Any) -> None:
        self.loaded.remove(loaded)


def stream_of(depth: int) -> tuple[WindowStream, Memory]:
    memory = Memory()
    states: Any = SimpleNamespace(let_go=memory.let_go)

    def visits_of(unit: Any) -> list[Visit]:
        nothing: Any = None
        return [Visit(unit, nothing, states, number, []) for number in range(NUM_WINDOWS[unit])]  # type: ignore[arg-type]

    units: Any = list(NUM_WINDOWS)
    return WindowStream(units, visits_of, depth, memory.load), memory


def take(stream: WindowStream, unit: Any) -> int:
    """Use up a unit's windows; their number."""
    count = 0
    while (visit := stream.next_of(unit)) is not None:
        assert (visit.unit, visit.window) == (unit, count)
        visit.let_go()
        count += 1
    return count


@pytest.mark.parametrize("depth", [1, 2, 4, 20])
@pytest.mark.parametrize("passed_over", ["", "a", "b", "ab", "c", "abc", "abcd"])
@pytest.mark.parametrize("ahead", [False, True])
def test_units_are_passed_over(depth: int, passed_over: str, ahead: bool) -> None:
    stream, memory = stream_of(depth)
    for unit in NUM_WINDOWS:
        if ahead:
            stream.read_ahead()
        if unit not in passed_over:
            unit_: Any = unit
            stream.skip_to(unit_)
            assert take(stream, unit_) == NUM_WINDOWS[unit]
    assert memory.most <= depth
    stream.close()
    assert memory.loaded == []
    stream.read_ahead()
    assert memory.loaded == []
