"""Stores on a real disk, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwise.store.aligned import Slab
from shardwise.store.base import Extent
from shardwise.store.direct_io import DirectIO
from shardwise.store.io_settings import IOSettings
from shardwise.store.swap_file import SwapFile


@contextmanager
def swap_file(
    path: Path, sizes: list[int], settings: IOSettings | None = None, verify: bool = False
) -> Iterator[tuple[SwapFile, list[Extent]]]:
    """An allocated file with one extent a size; file and threads are gone in the end, whatever happened."""
    io = DirectIO(settings)
    file = SwapFile(path, io, verify)
    try:
        extents = [file.reserve(size) for size in sizes]
        file.allocate()
        yield file, extents
    finally:
        file.close()
        io.close()


def pattern(num_bytes: int, seed: int = 0) -> Slab:
    """Memory in which no two pages are equal."""
    import torch

    slab = Slab.allocate(num_bytes)
    generator = torch.Generator().manual_seed(seed)
    slab.tensor(torch.uint8, 0, num_bytes).random_(0, 256, generator=generator)
    return slab


def io_threads() -> list[threading.Thread]:
    """Threads of any DirectIO."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("shardwise-")]
