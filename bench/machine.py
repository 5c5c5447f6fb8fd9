"""Where a measurement was taken: the facts without which its numbers mean nothing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
import torch

_PACKAGES = ("deepspeed", "shardwise", "numpy")


def machine_facts() -> dict[str, str]:
    """Processor, memory, load, versions, and the settings of malloc that change how the CPU path behaves."""
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    memory = psutil.virtual_memory()
    facts = {
        "processor": f"{_processor_name()}, {len(psutil.Process().cpu_affinity() or [])} cores usable",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free at the start",
        "load at the start": load,
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
    }
    facts |= {package: _version(package) for package in _PACKAGES}
    facts |= {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return facts


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
