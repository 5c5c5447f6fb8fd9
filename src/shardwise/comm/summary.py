"""What a log of collectives adds up to."""

from __future__ import annotations

from dataclasses import dataclass


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
    received_bytes: dict[str, int]
    """What came in from other ranks, by operation."""

    def __str__(self) -> str:
        if not self.totals:
            return "no collectives"
        head = f"{'axis':<12}{'operation':<16}{'message':>16} {'count':>8}{'total':>20} {'waited':>13}{'mean':>12}"
        rows = [
            f"{t.axis:<12}{t.operation:<16}{t.message_bytes:>14,d} B {t.count:>8,d}{t.total_bytes:>18,d} B "
            f"{1e3 * t.waited_seconds:>10,.2f} ms{1e3 * t.waited_seconds / t.count:>9.3f} ms"
            + (f"  {t.unit}" if t.unit is not None else "")
            for t in self.totals
        ]
        received = ", ".join(f"{size:,d} B by {name}" for name, size in self.received_bytes.items())
        return "\n".join([head, *rows, *([f"received from other ranks: {received}"] if received else [])])
