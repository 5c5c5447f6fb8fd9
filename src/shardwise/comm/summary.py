"""What a log of collectives adds up to."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.comm.traffic import Route, by_operation


@dataclass(frozen=True, slots=True)
class CollectiveTotal:
    """All collectives of one kind and size."""

    axis: str
    operation: str
    unit: str | None
    """None where units are not told apart."""
    message_bytes: int
    """Of the whole buffer, not of what came in from others."""
    count: int
    waited_seconds: float
    """On the CPU: what the calls and the waiting took. On CUDA: how long the compute stream stood still for them."""

    @property
    def total_bytes(self) -> int:
        """Of all messages."""
        return self.count * self.message_bytes


@dataclass(frozen=True, slots=True)
class CommsSummary:
    """What one rank's log holds."""

    totals: tuple[CollectiveTotal, ...]
    """By axis and operation, the largest messages first."""
    received: dict[Route, int]
    """Bytes that came in from other ranks."""

    @property
    def received_bytes(self) -> dict[str, int]:
        """The same, by operation."""
        return by_operation(self.received)

    def __str__(self) -> str:
        if not self.totals:
            return "no collectives"
        head = f"{'axis':<14}{'operation':<16}{'message':>16} {'count':>8}{'total':>20} {'waited':>13}{'mean':>12}"
        rows = [
            f"{t.axis:<14}{t.operation:<16}{t.message_bytes:>14,d} B {t.count:>8,d}{t.total_bytes:>18,d} B "
            f"{1e3 * t.waited_seconds:>10,.2f} ms{1e3 * t.waited_seconds / t.count:>9.3f} ms"
            + (f"  {t.unit}" if t.unit is not None else "")
            for t in self.totals
        ]
        if not self.received:
            return "\n".join([head, *rows])
        received = [
            f"{route.axis:<14}{route.operation:<16}{route.wire:<12}"
            f"{'other nodes' if route.across else 'same node':<12}{size:>18,d} B"
            for route, size in self.received.items()
        ]
        columns = f"{'axis':<14}{'operation':<16}{'wire':<12}{'from':<12}{'received':>20}"
        return "\n".join([head, *rows, "", columns, *received])
