"""Running a job to its end: the ranks under torch's elastic agent, the agent under a guard."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from shardwise.launch import bootstrap, guard
from shardwise.launch.environment import exported, rank_environment
from shardwise.launch.failure import print_failures, read_failures
from shardwise.launch.job import LOOPBACK, Job

# What a rank may take after Ctrl-C to run its `finally` blocks. One that waits in a collective cannot hear the signal.
GRACE_SECONDS = 10


def run(job: Job, console: Console) -> int:
    """Runs `job` to its end and says which exit status the launcher owes its caller.

    0 when every rank ended well, a failed rank's own exit code, or 128 + N for signal N. When this returns, or this
    process is killed, no rank is left and none of the processes that ranks started in their own process groups.
    """
    with (
        exported(rank_environment(job, os.environ)),
        _quiet_agent(),
        _signal_handlers_restored(),
        _guarded_directory(job) as directory,
    ):
        try:
            launch_agent(_launch_config(job, directory), sys.executable, [bootstrap.__file__, str(directory)])
        except ChildFailedError as error:
            failures = read_failures(error.failures)
            print_failures(failures, job.num_processes, console)
            return failures[0].status
        except SignalException as ended:
            received = signal.Signals(ended.sigval)
            console.print(f"Ended by {received.name}; every rank is ended too.", style="yellow")
            return 128 + received
    return 0


def _launch_config(job: Job, directory: Path) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.num_processes,
        run_id=uuid.uuid4().hex,
        role="rank",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:{job.port}",
        local_addr=LOOPBACK,  # else the machine's own name is looked up, which needs a name service
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(directory / "errors")),
        shutdown_timeout=GRACE_SECONDS,
    )


@contextmanager
def _guarded_directory(job: Job) -> Iterator[Path]:
    """The directory of one run, from which ranks read their job and where they sign in; the guard removes it."""
    directory = Path(tempfile.mkdtemp(prefix="shardwise-"))
    (directory / "ranks").mkdir()
    task = {"launcher_pid": os.getpid(), **asdict(job)}
    (directory / "job.json").write_text(json.dumps(task))
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # held open, a caller that reads our output to its end would wait for the guard
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of the terminal's Ctrl-C
    )
    try:
        yield directory
    finally:
        watcher.communicate()  # closes the pipe: the guard's sign to end what is left


@contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    """The agent installs handlers of its own and leaves them behind."""
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Keeps the agent's log off the screen: it repeats, in its own words, what `failure` says."""
    agent = logging.getLogger("torch.distributed.elastic")
    propagate = agent.propagate
    silence = logging.NullHandler()
    agent.addHandler(silence)
    agent.propagate = False
    try:
        yield
    finally:
        agent.removeHandler(silence)
        agent.propagate = propagate
