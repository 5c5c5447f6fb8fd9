"""Windows of states on their way through memory: some units' windows, in order, a few of them ahead of use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from shardwise.zero.optimizer import Run
from shardwise.zero.shard_states import Loaded, ShardStates, Window
from shardwise.zero.unit import Segment, Unit


@dataclass(slots=True)
class Visit:
    """One window of the stream."""

    unit: Unit
    segment: Segment
    states: ShardStates
    window: Window
    runs: list[Run]
    """What is stepped there."""
    loaded: Loaded | None = None

    def let_go(self) -> None:
        """Give its memory up; nothing is taken back."""
        if self.loaded is not None:
            self.states.let_go(self.loaded)
            self.loaded = None


class WindowStream:
    """Reads ahead over the windows of ``units``.

    Args:
        units: in the order in which they are asked for.
        visits_of: the windows of one of them; asked when the stream comes there.
        depth: windows in memory at a time.
        start_load: starts to bring one.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        visits_of: Callable[[Unit], Iterable[Visit]],
        depth: int,
        start_load: Callable[[Visit], None],
    ) -> None:
        self._units = deque(units)
        self._place = {unit: place for place, unit in enumerate(self._units)}
        self._visits_of = visits_of
        self._depth = depth
        self._start_load = start_load
        self._open: Unit | None = None
        self._visits: Iterator[Visit] = iter(())
        """Those of the open unit that are not coming yet."""
        self._coming: deque[Visit] = deque()

    def read_ahead(self) -> None:
        """Start bringing as many windows as may be in memory."""
        while len(self._coming) < self._depth and (visit := self._next()) is not None:
            self._start_load(visit)
            self._coming.append(visit)

    def _next(self) -> Visit | None:
        while True:
            visit = next(self._visits, None)
            if visit is not None or not self._units:
                return visit
            self._open = self._units.popleft()
            self._visits = iter(self._visits_of(self._open))

    def next_of(self, unit: Unit) -> Visit | None:
        """The next window, on its way, if it is one of ``unit``."""
        self.read_ahead()
        return self._coming.popleft() if self._coming and self._coming[0].unit is unit else None

    def skip_to(self, unit: Unit) -> None:
        """The windows of units before ``unit`` will not be asked for."""
        place = self._place[unit]
        while self._coming and self._place[self._coming[0].unit] < place:
            self._coming.popleft().let_go()
        if self._open is not None and self._place[self._open] < place:
            self._visits = iter(())
        while self._units and self._place[self._units[0]] < place:
            self._units.popleft()

    def close(self) -> None:
        """Give up what was read ahead."""
        self._units.clear()
        self._visits = iter(())
        while self._coming:
            self._coming.popleft().let_go()
