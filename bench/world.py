"""A fresh world of gloo processes on this machine that runs one function and returns every rank's result."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

Result = TypeVar("Result")


def run_in_world(world_size: int, threads: int, function: Callable[..., Result], *arguments: Any) -> list[Result]:
    """Run ``function(*arguments)`` on ``world_size`` new processes and return the results by rank.

    ``function`` and its arguments are pickled, so it stands at the top of a module. Each process has ``threads``
    threads for torch and a process group over gloo. The first rank that fails ends the others, and its error is
    raised here with its traceback. SIGTERM ends them, too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is open is closed on the way out
    # Read when a process loads its OpenMP runtime, which is before any of our code runs there.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        rank_arguments = (world_size, threads, _free_port(), folder, function, arguments)
        spawn(_run_rank, rank_arguments, nprocs=world_size, daemon=True)
        # Written by our own ranks a moment ago: nothing foreign is unpickled.
        return [pickle.loads((Path(folder) / f"{rank}").read_bytes()) for rank in range(world_size)]


def _run_rank(
    rank: int,
    world_size: int,
    threads: int,
    port: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    # The names that torchrun sets (LOCAL_SIZE is DeepSpeed's launcher's): engines read them.
    os.environ.update(
        RANK=f"{rank}",
        LOCAL_RANK=f"{rank}",
        WORLD_SIZE=f"{world_size}",
        LOCAL_WORLD_SIZE=f"{world_size}",
        LOCAL_SIZE=f"{world_size}",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=f"{port}",
    )
    dist.init_process_group("gloo")
    try:
        result = function(*arguments)
        (Path(folder) / f"{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # a rank that leaves early would break the last collectives of the others
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
