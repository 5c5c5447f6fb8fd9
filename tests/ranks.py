"""One rank of a test world: the loop of its process, and the census that finds what a case left behind."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from shardwise.mesh import kept_groups

# What libraries below us set up for themselves the first time that they compile is not ours to police.
FOREIGN_ENVIRONMENT_PREFIXES = ("TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "KINETO_", "PYTEST_")
FOREIGN_THREADS = ("tqdm_monitor", "ThreadPoolExecutor")  # torch's compiler keeps a pool; shardwise has none
NAMED_SEMAPHORE = "/dev/shm/sem."  # a lock of a library (tqdm's), not memory
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankSettings:
    """What one rank's process needs to know before its first case."""

    rank: int
    size: int
    port: int
    backend: str
    timeout_seconds: float
    process_group: bool
    log_file: Path
    stack_file: Path


@dataclass(frozen=True)
class Case:
    """A call to make. `payload` is (function, args, kwargs), pickled by plain pickle: no shared-memory tensors."""

    number: int
    payload: bytes
    sys_path: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """An exception of one rank, in a form that always travels."""

    rank: int
    type_name: str
    message: str
    traceback: str
    exception: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


@dataclass(frozen=True)
class Answer:
    """What one rank made of a case."""

    value: Any = None
    failure: Failure | None = None
    leaks: tuple[str, ...] = ()
    collectives_done: int = 0


@dataclass(frozen=True)
class Census:
    """The things of a process that a well-behaved case leaves as it found them."""

    threads: frozenset[str]
    environment: frozenset[tuple[str, str]]
    process_groups: frozenset[str]
    shared_memory: frozenset[str]
    torch_state: frozenset[tuple[str, str]]

    @classmethod
    def take(cls) -> Census:
        """Count now. Garbage is collected first, so only what is still reachable counts."""
        gc.collect()
        return cls(
            threads=frozenset(
                f"{thread.name} ({thread.ident})"
                for thread in threading.enumerate()
                # autograd's own native threads show up as dummies once Python code has run in them
                if not isinstance(thread, threading._DummyThread) and not thread.name.startswith(FOREIGN_THREADS)
            ),
            environment=frozenset(
                (name, value) for name, value in os.environ.items() if not name.startswith(FOREIGN_ENVIRONMENT_PREFIXES)
            ),
            process_groups=frozenset(
                # Those of the mesh are made once and live as long as the world.
                name
                for group, name in dist.distributed_c10d._world.pg_names.items()
                if group not in kept_groups()
            ),
            shared_memory=_shared_memory(),
            torch_state=frozenset(
                {
                    ("grad mode", str(torch.is_grad_enabled())),
                    ("default dtype", str(torch.get_default_dtype())),
                    ("threads", str(torch.get_num_threads())),
                    ("deterministic", str(torch.are_deterministic_algorithms_enabled())),
                }
            ),
        )

    def leaks_since(self, before: Census) -> tuple[str, ...]:
        """Say what changed between `before` and this census, one phrase a thing."""
        found = [f"thread left running: {name}" for name in sorted(self.threads - before.threads)]
        found += [f"process group left behind: {name}" for name in sorted(self.process_groups - before.process_groups)]
        found += [f"process group destroyed: {name}" for name in sorted(before.process_groups - self.process_groups)]
        held = self.shared_memory - before.shared_memory
        found += [f"shared memory still held: {path}" for path in sorted(held)]
        changed = {name for name, _ in self.environment ^ before.environment}
        found += [f"environment changed: {name}" for name in sorted(changed)]
        found += [f"torch state changed: {name}={now}" for name, now in sorted(self.torch_state - before.torch_state)]
        return tuple(found)


def _shared_memory() -> frozenset[str]:
    """Files in memory that this process has mapped or holds open; Linux only, empty elsewhere."""
    maps, descriptors = Path("/proc/self/maps"), Path("/proc/self/fd")
    if not maps.exists():
        return frozenset()
    found = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if _is_in_memory(line)}
    for descriptor in descriptors.iterdir():
        with suppress(FileNotFoundError):  # the one that lists the directory is closed by now
            target = str(descriptor.readlink())
            if _is_in_memory(target):
                found.add(f"{target} (descriptor {descriptor.name})")
    return frozenset(found)


def _is_in_memory(path: str) -> bool:
    return ("/dev/shm/" in path and NAMED_SEMAPHORE not in path) or "/memfd:" in path


def serve(connection: Connection, settings: RankSettings) -> None:
    """Run in the rank's own process: join the world, then answer cases until the parent closes the pipe."""
    die_with_parent()
    _redirect_output(settings)
    os.environ.update(
        RANK=str(settings.rank),
        WORLD_SIZE=str(settings.size),
        LOCAL_RANK=str(settings.rank),
        LOCAL_WORLD_SIZE=str(settings.size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(settings.port),
    )
    torch.set_num_threads(1)
    if "cuda" in settings.backend:
        torch.cuda.set_device(settings.rank)
    if settings.process_group:
        dist.init_process_group(settings.backend, timeout=timedelta(seconds=settings.timeout_seconds))
        dist.barrier()
    _send(connection, Answer())
    while True:
        try:
            case: Case = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        _send(connection, _answer(case, settings))
    os._exit(0)  # a graceful shutdown of gloo would wait for ranks that may have been killed


def _answer(case: Case, settings: RankSettings) -> Answer:
    sys.path[:] = list(case.sys_path)
    print(f"--- case {case.number}", flush=True)
    before: Census | None = None
    value: Any = None
    failure: Failure | None = None
    try:
        # Unpickling imports the test module: what importing leaves behind is not the case's doing.
        function, args, kwargs = pickle.loads(case.payload)
        _reset_torch_state()
        # What is there already stays; counting past it makes each collection a thousand times cheaper.
        gc.collect()
        gc.freeze()
        before = Census.take()
        value = function(*args, **kwargs)
        pickle.dumps(value)
    except BaseException as error:
        value = None
        failure = _failure_of(error, settings.rank)
    finally:
        function = args = kwargs = None
    leaks = Census.take().leaks_since(before) if before is not None else ()
    return Answer(value=value, failure=failure, leaks=leaks, collectives_done=_collectives_done())


def _failure_of(error: BaseException, rank: int) -> Failure:
    text = traceback.format_exc()
    # The frames of the traceback hold the engine and its tensors; without this they would look like a leak.
    error.__traceback__ = None
    carried: BaseException | None = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        carried = None
    return Failure(rank, type(error).__name__, str(error), text, carried)


def _reset_torch_state() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _collectives_done() -> int:
    if not dist.is_initialized():
        return 0
    return int(dist.distributed_c10d._get_default_group()._get_sequence_number_for_group())


def _send(connection: Connection, answer: Answer) -> None:
    connection.send_bytes(pickle.dumps(answer))


def _redirect_output(settings: RankSettings) -> None:
    log = settings.log_file.open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.enable(file=log, all_threads=True)
    stacks = settings.stack_file.open("w")
    _keep_open.append(stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)


_keep_open: list[Any] = []  # faulthandler writes by file descriptor and does not hold the file itself


def die_with_parent() -> None:
    """Ask the kernel to end this process with the one that started it, so that a killed pytest leaves no orphan."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the test process, which then ends its worlds
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


CaseFunction = Callable[..., Any]
