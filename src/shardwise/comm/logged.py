"""Which collectives this rank took part in, how large they were, and how long it waited for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from shardwise.comm.base import CollectiveId, Communicator, Cuts, Pending
from shardwise.comm.relay import Relay
from shardwise.comm.summary import CollectiveTotal, CommsSummary

logger = logging.getLogger(__name__)

OPERATIONS = ("all_gather", "reduce_scatter", "exchange")
"""The collectives of a transport; ``exchange`` is host bytes: what ranks agree on."""
_MOST_UNRESOLVED = 4096  # pairs of CUDA events that wait to be read


@dataclass(frozen=True, slots=True)
class CommsLogSettings:
    """What is logged; the configuration's block ``comms_logger``."""

    operations: frozenset[str] = frozenset(OPERATIONS)
    by_unit: bool = False
    each: bool = False
    """One line for each collective as it ends."""


@dataclass(slots=True)
class _Running:
    count: int = 0
    seconds: float = 0.0


_Key = tuple[str, str | None, int]


class Logged(Relay):
    """Counts and times what the transport does."""

    def __init__(self, inner: Communicator, axis: str, settings: CommsLogSettings) -> None:
        super().__init__(inner)
        self._axis = axis
        self._settings = settings
        self._running: dict[_Key, _Running] = {}
        self._unresolved: list[tuple[_Running, torch.cuda.Event, torch.cuda.Event]] = []

    def _all_gather(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        return self._logged(
            "all_gather", identity, output.nbytes, lambda: self._inner._all_gather(identity, output, shard)
        )

    def _all_gather_exactly(self, identity: CollectiveId, output: torch.Tensor, shard: torch.Tensor) -> Pending:
        return self._logged(
            "all_gather", identity, output.nbytes, lambda: self._inner._all_gather_exactly(identity, output, shard)
        )

    def _all_gather_in_place(self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts) -> Pending:
        return self._logged(
            "all_gather", identity, buffer.nbytes, lambda: self._inner._all_gather_in_place(identity, buffer, cuts)
        )

    def _reduce_scatter(
        self, identity: CollectiveId, buffer: torch.Tensor, cuts: Cuts, shard: torch.Tensor, accumulate: bool
    ) -> Pending:
        return self._logged(
            "reduce_scatter",
            identity,
            buffer.nbytes,
            lambda: self._inner._reduce_scatter(identity, buffer, cuts, shard, accumulate),
        )

    def exchange(self, identity: CollectiveId, payload: bytes) -> list[bytes]:
        """By the transport; it is over when it returns."""
        if "exchange" not in self._settings.operations:
            return self._inner.exchange(identity, payload)
        running = self._entry("exchange", identity, len(payload))
        start = time.perf_counter()
        received = self._inner.exchange(identity, payload)
        running.seconds += time.perf_counter() - start
        self._say("exchange", identity, len(payload))
        return received

    def _logged(self, operation: str, identity: CollectiveId, num_bytes: int, start: Callable[[], Pending]) -> Pending:
        if operation not in self._settings.operations:
            return start()
        running = self._entry(operation, identity, num_bytes)
        with self._timing(running):
            pending = start()
        return _Timed(self, running, pending, lambda: self._say(operation, identity, num_bytes))

    def _entry(self, operation: str, identity: CollectiveId, num_bytes: int) -> _Running:
        key = (operation, identity.unit if self._settings.by_unit else None, num_bytes)
        running = self._running.setdefault(key, _Running())
        running.count += 1
        return running

    @contextmanager
    def _timing(self, running: _Running) -> Iterator[None]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            running.seconds += time.perf_counter() - start
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._unresolved.append((running, begin, end))
        if len(self._unresolved) > _MOST_UNRESOLVED:
            self._resolve()

    def _resolve(self) -> None:
        """Read the events; those of long ago are over, so this waits for little."""
        for running, begin, end in self._unresolved:
            end.synchronize()
            running.seconds += begin.elapsed_time(end) / 1e3
        self._unresolved.clear()

    def _say(self, operation: str, identity: CollectiveId, num_bytes: int) -> None:
        if self._settings.each:
            logger.info("%s over %s: %s, %s B", operation, self._axis, identity, f"{num_bytes:,d}")

    def summary(self) -> CommsSummary:
        """All that was logged until now; on CUDA it waits for what is under way."""
        self._resolve()
        totals = [
            CollectiveTotal(self._axis, operation, unit, num_bytes, running.count, running.seconds)
            for (operation, unit, num_bytes), running in self._running.items()
        ]
        totals.sort(key=lambda t: (OPERATIONS.index(t.operation), -t.message_bytes, t.unit or ""))
        return CommsSummary(tuple(totals), self.traffic.by_route)


class _Timed:
    """A collective under way whose waiting is timed, once."""

    def __init__(self, comm: Logged, running: _Running, pending: Pending, over: Callable[[], None]) -> None:
        self._comm = comm
        self._running = running
        self._pending: Pending | None = pending
        self._over = over

    def wait(self) -> None:
        if self._pending is not None:
            with self._comm._timing(self._running):
                self._pending.wait()
            self._pending = None
            self._over()
