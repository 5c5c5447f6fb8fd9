"""Record what Accelerate's loaders give to each rank: `python -m bench.record_batches FILE` (see tests/data_cases.py).

The file that the tests compare with is tests/facts/fixtures/batches.json. For each case: which batches each rank gets
in each epoch, the length that the loader tells, and its remainder at the end.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState

from tests.data_cases import CASES, DISPATCHED, Case, arguments, plain_loader


def give_out(loader: Any, epochs: int) -> dict[str, Any]:
    """Everything that the loader gives, as numbers."""
    given: list[Any] = []
    remainder = None
    for _ in range(epochs):
        given.append([])
        for batch in loader:
            given[-1].append(batch.tolist())
            remainder = loader.remainder
    try:
        length = len(loader)
    except TypeError:
        length = None
    return {"given": given, "len": length, "remainder": remainder}


def record(case: Case, rank: int, **options: Any) -> dict[str, Any]:
    """What `rank` gets of a case."""
    loader = prepare_data_loader(plain_loader(case), process_index=rank, **arguments(case), **options)
    return give_out(loader, case.epochs)


def record_dispatched(rank: int, world: int, port: int, directory: str) -> None:
    """One of several processes: the cases that rank 0 reads for all."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    PartialState(cpu=True, backend="gloo")
    cpu = {"device": torch.device("cpu"), "put_on_device": True, "dispatch_batches": True}
    found = {case.name: record(case, rank, **cpu) for case in DISPATCHED if case.world == world}
    Path(directory, f"{world}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def dispatched(world: int, directory: str) -> dict[str, list[Any]]:
    """The same cases of all ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(record_dispatched, (world, port, directory), nprocs=world)  # type: ignore[no-untyped-call]
    ranks = [json.loads(Path(directory, f"{world}-{rank}.json").read_text()) for rank in range(world)]
    return {name: [of_rank[name] for of_rank in ranks] for name in ranks[0]}


def main() -> None:
    """Write the file that is named on the command line."""
    import tempfile

    shards = {case.name: [record(case, rank) for rank in range(case.world)] for case in CASES}
    with tempfile.TemporaryDirectory() as directory:
        handed_out = dispatched(2, directory) | dispatched(3, directory)
    everything = {"accelerate": accelerate.__version__, "shards": shards, "dispatched": handed_out}
    lines = [f'"accelerate": {json.dumps(everything.pop("accelerate"))}']
    for part, cases in everything.items():
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(of, separators=(',', ':'))}" for name, of in cases.items())
        lines.append(f'"{part}": {{\n{rows}\n}}')
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
