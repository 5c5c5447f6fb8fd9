"""One rank: the checks in order, each needing those before it."""

import gc
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from shardwise.config import EngineConfig
from shardwise.errors import ConfigError
from shardwise.launch.handed_over import handed_over
from shardwise.mesh import Mesh, build_mesh, init_distributed
from shardwise.selftest import collectives, training
from shardwise.selftest.book import Book, NothingMoreToCheck
from shardwise.selftest.settings import in_words, job_config, user_config

TIMEOUT = timedelta(minutes=1)  # of a rank that waits for the others; nothing here takes longer than seconds


def run(directory: Path, environ: Mapping[str, str]) -> None:
    """Go through the checks and write each verdict into `directory`.

    A configuration that cannot work is written down and no error: every rank finds the same.
    """
    if "RANK" not in environ:
        raise ConfigError("The self-test is started by `shardwise test`, which tells each process its rank.")
    rank, num_ranks = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    first_here = rank - int(environ["LOCAL_RANK"])
    book = Book(directory, rank, range(first_here, first_here + int(environ["LOCAL_WORLD_SIZE"])))
    with suppress(NothingMoreToCheck):
        _checks(book, environ, rank, num_ranks)
    gc.collect()  # an engine is a ring of references that ends at the group, whose threads must end before the process
    if dist.is_initialized():
        dist.destroy_process_group()


def _checks(book: Book, environ: Mapping[str, str], rank: int, num_ranks: int) -> None:
    config = book.check("settings", lambda: _settings(environ, num_ranks), _no_advice)
    mesh = book.check("process group", lambda: _meet(rank, num_ranks), _advice_on_meeting)
    for name, exchange in (
        ("broadcast", collectives.broadcast),
        ("reduce", collectives.reduce),
        ("gather", collectives.gather),
    ):
        book.compare(name, partial(exchange, mesh), _advice_on_meeting)
    trained = book.check("training", lambda: _train(mesh, config), _advice_on_training)
    # Last words on what every rank has by now: no rank waits for another but in the last.
    book.compare("reference", lambda: training.compare_with_reference(trained, config, num_ranks), _no_advice)
    book.compare("loss", lambda: training.compare_losses(trained), _no_advice)
    book.compare("ranks agree", lambda: training.compare_ranks(trained, mesh), _advice_on_meeting)


def _settings(environ: Mapping[str, str], num_ranks: int) -> tuple[EngineConfig, str]:
    asked = user_config(handed_over(environ), num_ranks)
    training.check_recipes(asked)
    config = job_config(asked, num_ranks)
    return config, in_words(config)


def _meet(rank: int, num_ranks: int) -> tuple[Mesh, str]:
    init_distributed(timeout=TIMEOUT)
    mesh = build_mesh(timeout=TIMEOUT)
    found = (mesh.dp_shard.rank, mesh.dp_shard.size)
    if found != (rank, num_ranks):
        raise RuntimeError(f"it is rank {found[0]} of {found[1]}, but was started as rank {rank} of {num_ranks}")
    return mesh, f"{num_ranks} rank{'s' * (num_ranks > 1)} on {mesh.device.type}, {_backend(mesh)}"


def _backend(mesh: Mesh) -> str:
    return "nccl" if mesh.device.type == "cuda" else "gloo"


def _train(mesh: Mesh, config: EngineConfig) -> tuple[training.Trained, str]:
    trained = training.train(mesh, config)
    return trained, f"{training.NUM_STEPS} steps, {in_words(config)}"


def _no_advice(error: Exception) -> str:
    return ""


def _advice_on_meeting(error: Exception) -> str:
    """What to do where ranks cannot reach each other."""
    if "nccl" in str(error).lower():
        return (
            "NCCL cannot move data between the GPUs. Run again with NCCL_DEBUG=INFO for its reason; on several network "
            "interfaces set NCCL_SOCKET_IFNAME to the one that the ranks share."
        )
    return (
        "gloo cannot open a connection between ranks. Set GLOO_SOCKET_IFNAME to the network interface that they share "
        "(`ip addr` lists them; `lo` on one machine), and see that no firewall stands between them."
    )


def _advice_on_training(error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "out of memory" in text or "cannot allocate" in text:
        return (
            "Memory has run out, and this model is tiny: something else holds it. `shardwise env` shows what is free."
        )
    if "no space left" in text:
        return "Shared memory is full (`df -h /dev/shm`). Free it, or set shardwise.transport to process_group."
    if "connection" in text or "did not come" in text:
        return "Another rank went first: its error is the one to read."
    return "Report it, with `shardwise env` and `shardwise explain`."
