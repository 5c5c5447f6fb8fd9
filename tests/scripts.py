"""Scripts that ranks run as interpreters of their own, from the first import to the exit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def run_on_ranks(size: int, code: str, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run `code` on `size` ranks that know of each other what `torchrun` tells; no launcher watches over them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", code, *arguments]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    told = [process.communicate() for process in ranks]
    return [
        subprocess.CompletedProcess(command, process.returncode, *output)
        for process, output in zip(ranks, told, strict=True)
    ]
