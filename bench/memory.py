"""Peak memory of this process over a stretch of code, by the kernel's own count (Linux).

Two counts, for each has a blind spot. The peak resident set is exact but counts a page that two ranks share once in
each. The proportional set divides a shared page among its users, but the kernel keeps no peak of it: it is sampled.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes held by this process."""

    resident_bytes: int
    proportional_bytes: int

    def __sub__(self, other: ProcessMemory) -> ProcessMemory:
        return ProcessMemory(
            self.resident_bytes - other.resident_bytes, self.proportional_bytes - other.proportional_bytes
        )

    @staticmethod
    def highest(first: ProcessMemory, second: ProcessMemory) -> ProcessMemory:
        """The higher of each count."""
        return ProcessMemory(
            max(first.resident_bytes, second.resident_bytes), max(first.proportional_bytes, second.proportional_bytes)
        )


def reason_to_skip() -> str | None:
    """Why memory cannot be measured on this system, or None."""
    missing = [str(path) for path in (_STATUS, _ROLLUP, _CLEAR_REFS) if not path.exists()]
    return f"this system has no {', '.join(missing)}" if missing else None


def current_memory() -> ProcessMemory:
    """What the process holds now."""
    return ProcessMemory(_read_bytes(_STATUS, "VmRSS"), _read_bytes(_ROLLUP, "Pss"))


def peak_resident_bytes() -> int:
    """The highest resident set since the process began, or since a ``PeakMemory`` began."""
    return _read_bytes(_STATUS, "VmHWM")


class PeakMemory:
    """Context manager; ``peak`` holds the highest counts between entry and exit."""

    def __init__(self) -> None:
        self.peak = ProcessMemory(0, 0)
        self._proportional_bytes = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        _CLEAR_REFS.write_text("5")  # the kernel's code for: start the peak of the resident set afresh
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._sampler.join()
        self.peak = ProcessMemory(peak_resident_bytes(), self._proportional_bytes)

    def _sample(self) -> None:
        ended = False
        while not ended:
            self._proportional_bytes = max(self._proportional_bytes, _read_bytes(_ROLLUP, "Pss"))
            ended = self._ended.wait(_SAMPLE_SECONDS)


def _read_bytes(path: Path, field: str) -> int:
    """The number of one ``Field:   123 kB`` line."""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise LookupError(f"{path} has no line {field!r}: this kernel does not count it")
