"""What a GPU did, read from a Chrome trace of torch's profiler: kernels, and copies to and from host memory.

The profiler's Python events leave out how many bytes a copy moved; its trace has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.intervals import Interval, length, share_beside


@dataclass
class Copies:
    """The copies of one direction."""

    num_bytes: int = 0
    intervals: list[Interval] = field(default_factory=list)
    """Microseconds on the trace's clock."""


@dataclass
class DeviceTrace:
    """A stretch of time on one GPU."""

    kernels: list[Interval] = field(default_factory=list)
    up: Copies = field(default_factory=Copies)
    """From host memory to the device."""
    down: Copies = field(default_factory=Copies)

    @classmethod
    def read(cls, path: Path) -> DeviceTrace:
        """What a file of ``export_chrome_trace`` holds of the device; nothing where it was taken without one."""
        trace = cls()
        for event in json.loads(path.read_text())["traceEvents"]:
            if event.get("ph") != "X":
                continue
            interval = event["ts"], event["ts"] + event["dur"]
            category, name = event.get("cat"), event.get("name", "")
            if category == "kernel":
                trace.kernels.append(interval)
            elif category == "gpu_memcpy":
                copies = trace.up if "HtoD" in name else trace.down if "DtoH" in name else None
                if copies is not None:  # else inside of the device
                    copies.num_bytes += int(event["args"]["bytes"])
                    copies.intervals.append(interval)
        return trace

    @property
    def kernel_seconds(self) -> float:
        """Time in which the device computed."""
        return length(self.kernels) / 1e6

    def transfer(self, copies: Copies) -> Transfer:
        """The copies of one direction, beside the kernels of the same stretch."""
        return Transfer(copies.num_bytes, length(copies.intervals) / 1e6, share_beside(copies.intervals, self.kernels))


@dataclass(frozen=True)
class Transfer:
    """One direction's copies in one stretch of time."""

    num_bytes: int
    seconds: float
    """In which at least one copy was under way."""
    hidden_share: float | None
    """Of them, the part in which a kernel ran, too; None where nothing was copied."""


def traced(work: Callable[[], None], device: torch.device, path: Path) -> DeviceTrace:
    """Run ``work``, which waits for what it gives to the device, and write its trace to ``path``.

    On a GPU only the device's side is taken: the host's many small operations would be slowed down and fill the file.
    """
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as taken:
        work()
    taken.export_chrome_trace(str(path))
    return DeviceTrace.read(path)
