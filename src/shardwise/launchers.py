"""Ranks from inside Python: a function, typically of a notebook, in several processes.

A notebook's function cannot be imported by a new interpreter, so the ranks are forks of this process. That asks two
things of it: no CUDA context may exist yet (a fork cannot use it), and no process group.
"""

from __future__ import annotations

import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from shardwise import roll_call
from shardwise.accumulation import GradientState
from shardwise.config.run.file import flag_mentions
from shardwise.config.run.handover import pack
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.errors import ConfigError, StateError
from shardwise.launch.environment import RUN_VARIABLE, exported
from shardwise.launch.failure import read_failures
from shardwise.launch.runner import quiet_agent, signal_handlers_restored
from shardwise.process import PartialState
from shardwise.state import AcceleratorState

LOOPBACK = "127.0.0.1"


class LaunchedFunctionError(StateError, ChildFailedError):
    """The launched function raised on some rank; the message shows the first such rank's traceback.

    ``failures`` holds what torch's elastic agent knows, by rank.
    """

    def __init__(self, error: ChildFailedError, num_processes: int) -> None:
        self.name, self.failures = error.name, error.failures
        first = read_failures(error.failures)[0]
        end = f"{first.how}: {first.summary}".rstrip(": ")
        Exception.__init__(self, f"rank {first.rank} of {num_processes} failed ({end})\n\n{first.stack}".rstrip())


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: int | str = "29500",
    master_addr: str = LOOPBACK,
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: dict[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Call ``function(*args)`` in several processes of this machine, and wait for them.

    With one process on one machine it is called right here. Each process computes with one thread unless ``function``
    calls ``torch.set_num_threads``: a fork cannot use the threads of the process that it comes from.

    Args:
        function: trains; it makes its ``Accelerator`` itself.
        args: for ``function``.
        num_processes: on this machine; default: one a GPU, or one on the CPU.
        mixed_precision: "no", "fp16" or "bf16", where ``function`` does not say it itself.
        use_port: where ranks meet; 0 is a free one, on a single machine.
        master_addr: address of machine 0.
        node_rank: the number of this machine.
        num_nodes: machines; each makes this call.
        rdzv_backend: "static" or "c10d": how machines find each other.
        rdzv_endpoint: ``host:port`` instead of ``master_addr`` and ``use_port``.
        rdzv_conf: further settings of torch's rendezvous.
        rdzv_id: a name that all machines of the run give.
        max_restarts: how often all processes are started anew when one has failed.
        monitor_interval: seconds between two looks at the processes.
        log_line_prefix_template: as torch's elastic launcher takes it.

    Raises:
        ConfigError: an argument cannot be.
        StateError: this process has used CUDA, or made an ``Accelerator``.
        LaunchedFunctionError: ``function`` raised; also a ``ChildFailedError`` of torch.
    """
    num_local = _num_local(num_processes)
    if not 0 <= node_rank < num_nodes:
        raise ConfigError(
            f"notebook_launcher(node_rank={node_rank}, num_nodes={num_nodes}): expected 0 to num_nodes - 1."
        )
    said = {} if mixed_precision == "no" else {"mixed_precision": mixed_precision}
    asked = _asked("notebook_launcher", said)
    if num_local == num_nodes == 1:
        with _handed_over(asked):
            function(*args)
        return
    _refuse_used_process("notebook_launcher")
    if PartialState._shared_state:
        raise StateError(
            "notebook_launcher() starts processes that make their own Accelerator, but this one has made one already. "
            "Make it inside the function only, and restart the notebook."
        )
    if not rdzv_endpoint:
        rdzv_endpoint = f"{master_addr}:{_port(use_port, num_nodes, node_rank)}"
    conf = dict(rdzv_conf or {})
    if rdzv_backend == "static":
        conf["rank"] = node_rank
    config = _launch_config(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=num_local,
        run_id=rdzv_id if num_nodes > 1 else uuid.uuid4().hex,
        rdzv_backend=rdzv_backend,
        rdzv_endpoint=rdzv_endpoint,
        rdzv_configs=conf,
        max_restarts=max_restarts,
        monitor_interval=monitor_interval,
        log_line_prefix_template=log_line_prefix_template,
    )
    print(f"Launching training on {num_local} {'GPUs' if torch.cuda.is_available() else 'CPU processes'}.")
    _run(function, args, config, num_local * num_nodes, asked)


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> None:
    """Call ``function(*args)`` in a few processes on the CPU, to see whether it runs, and wait for them.

    What this process knows of an ``Accelerator`` of its own is not there in them.

    Raises:
        StateError: this process has a process group, or has used CUDA.
        LaunchedFunctionError: ``function`` raised; also a ``ChildFailedError`` of torch.
    """
    num_local = _num_local(num_processes)
    _refuse_used_process("debug_launcher")
    config = _launch_config(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_local,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",
    )
    _run(function, args, config, num_local, _asked("debug_launcher", {"use_cpu": True}))


def _num_local(num_processes: int | None) -> int:
    number = (torch.cuda.device_count() or 1) if num_processes is None else num_processes
    if number < 1:
        raise ConfigError(f"num_processes={number}: expected at least 1.")
    return number


def _refuse_used_process(launcher: str) -> None:
    if torch.cuda.is_initialized():
        raise StateError(
            f"{launcher}() forks this process, and CUDA has been initialised in it: the forks could not use it. "
            "Restart the notebook, and let nothing touch a GPU before; keep it inside the function."
        )
    if dist.is_initialized():
        raise StateError(f"{launcher}() starts ranks, but this process is a rank itself. Call it outside of a launch.")


def _asked(launcher: str, said: dict[str, Any]) -> Asked:
    mentions = flag_mentions(said)
    return Asked().stronger(
        {name: Said(mention.value, Origin.FLAG, f"{launcher}({name}=...)") for name, mention in mentions.items()}
    )


def _port(use_port: int | str, num_nodes: int, node_rank: int) -> int:
    try:
        port = int(use_port)
    except ValueError:
        raise ConfigError(f"use_port={use_port!r}: expected a number.") from None
    if not 0 <= port < 65536 or (port == 0 and num_nodes > 1):
        raise ConfigError(f"use_port={port}: expected 1 to 65535, or on a single machine 0 for a free one.")
    if node_rank > 0:
        return port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK if num_nodes == 1 else "", port))
        except OSError as error:
            raise ConfigError(
                f"use_port: port {port} cannot be used: {error.strerror}. Choose another, or 0 for a free one."
            ) from error
        return int(probe.getsockname()[1])


def _launch_config(**settings: Any) -> LaunchConfig:
    settings.setdefault("max_restarts", 0)
    return LaunchConfig(start_method="fork", role="rank", logs_specs=DefaultLogsSpecs(), **settings)


def _run(
    function: Callable[..., Any], args: Sequence[Any], config: LaunchConfig, num_processes: int, asked: Asked
) -> None:
    # The agent leaves the variable behind, so it is set beforehand, to be taken back.
    signals = exported({"TORCHELASTIC_SIGNALS_TO_HANDLE": config.signals_to_handle})
    with quiet_agent(), signal_handlers_restored(), signals, _handed_over(asked):
        try:
            launch_agent(config, _on_rank(function), list(args))
        except ChildFailedError as error:
            raise LaunchedFunctionError(error, num_processes) from None
        except SignalException as ended:
            raise KeyboardInterrupt("The run was ended; every rank is ended too.") from ended


def _on_rank(function: Callable[..., Any]) -> Callable[..., None]:
    """What a forked process calls."""

    def run(*args: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(1)  # threads that the parent has started are missing here, and OpenMP would wait for them
        try:
            function(*args)
        finally:
            roll_call.leave()  # a fork ends without Python's exit functions
        if dist.is_initialized():
            dist.destroy_process_group()

    run.__name__ = getattr(function, "__name__", type(function).__name__)  # as the agent calls it
    return run


@contextmanager
def _handed_over(asked: Asked) -> Iterator[None]:
    """Tell what was asked for to whoever reads the launcher's word, here and in forks."""
    if not asked.mentions:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="shardwise-") as directory:
        file = Path(directory, "asked.json")
        file.write_text(pack(asked))
        with exported({RUN_VARIABLE: os.fspath(file)}):
            yield
