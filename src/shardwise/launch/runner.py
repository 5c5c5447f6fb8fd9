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
from typing import Any

from rich.console import Console
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from shardwise.errors import StateError
from shardwise.launch import bootstrap, guard
from shardwise.launch.agent import Agent, Failures
from shardwise.launch.environment import exported, rank_environment
from shardwise.launch.failure import print_failures, read_failures
from shardwise.launch.job import Job, Meeting

# What a rank may take after Ctrl-C to run its `finally` blocks. One that waits in a collective cannot hear the signal.
GRACE_SECONDS = 10
MEETING_SECONDS = 600  # how long machines wait for each other
ASKED_FILE = "asked.json"  # in the run directory


def run(job: Job, asked: str, console: Console) -> int:
    """Runs `job` to its end and says which exit status the launcher owes its caller.

    `asked` is handed to the ranks, who resolve it again together with what the script says.
    0 when every rank ended well, a failed rank's own exit code, or 128 + N for signal N. When this returns, or this
    process is killed, no rank is left and none of the processes that ranks started in their own process groups.
    """
    with (
        quiet_agent(),
        signal_handlers_restored(),
        _guarded_directory(job, asked) as directory,
        exported(rank_environment(job, os.environ, directory / ASKED_FILE)),
    ):
        try:
            _run_agent(job, directory, console)
        except ChildFailedError as error:
            failures = read_failures(error.failures)
            print_failures(failures, job.num_processes, console)
            if job.max_restarts:
                told = f"Every rank was started anew {job.max_restarts} time(s): --max_restarts allows no more."
                console.print(told, style="red", soft_wrap=True)
            return failures[0].status
        except SignalException as ended:
            received = signal.Signals(ended.sigval)
            console.print(f"Ended by {received.name}; every rank is ended too.", style="yellow")
            return 128 + received
        except (DistError, RendezvousError) as error:
            meeting = job.meeting
            raise StateError(
                f"Machine {meeting.machine_rank} of {meeting.num_machines} has not met the others at "
                f"{meeting.address}:{meeting.port}: {_first_line(error)} Start the same command on every machine, "
                "each with its own --machine_rank, and see that they reach that address and port."
            ) from error
    return 0


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if line.endswith(".") else line + "."


def _run_agent(job: Job, directory: Path, console: Console) -> None:
    """Runs the ranks of this machine to their end; ChildFailedError where that is a bad one."""
    meeting = job.meeting
    rendezvous = _rendezvous(meeting)

    def restarting(failures: Failures, restarts_before: int) -> None:
        if failures:
            print_failures(read_failures(failures), job.num_processes, console)
        why = "" if failures else "Ranks of another machine have failed. "
        console.print(f"{why}Every rank starts anew ({restarts_before + 1} of {job.max_restarts}).", style="yellow")

    agent = Agent(
        WorkerSpec(
            role="rank",
            local_world_size=job.num_local_processes,
            rdzv_handler=rendezvous,
            entrypoint=sys.executable,
            args=(bootstrap.__file__, str(directory)),
            max_restarts=job.max_restarts,
            # Where ranks meet; under c10d the agents find a place themselves.
            master_addr=meeting.address if meeting.backend == "static" else None,
            master_port=meeting.port if meeting.backend == "static" else None,
            # Else the machine's own name is looked up, which needs a name service.
            local_addr=meeting.address if meeting.machine_rank == 0 else None,
        ),
        DefaultLogsSpecs(log_dir=str(directory / "errors")),
        GRACE_SECONDS,
        restarting,
        end_leftovers=lambda: guard.end_groups(directory / "ranks"),
    )
    try:
        failures = agent.run().failures
    except SignalException:
        raise  # without closing the rendezvous: the other machines go on as they can
    except BaseException:
        rendezvous.shutdown()
        raise
    rendezvous.shutdown()
    if failures:
        raise ChildFailedError(job.program, failures)


def _rendezvous(meeting: Meeting) -> RendezvousHandler:
    alone = meeting.num_machines == 1
    configs: dict[str, Any] = {}
    if meeting.backend == "static":
        configs = {"rank": meeting.machine_rank, "timeout": MEETING_SECONDS}
    elif not alone:
        configs = {
            "is_host": meeting.machine_rank == 0,
            "join_timeout": MEETING_SECONDS,
            "read_timeout": MEETING_SECONDS,  # the others' first look for machine 0 falls under it
        }
    return get_rendezvous_handler(
        RendezvousParameters(
            backend=meeting.backend,
            endpoint=f"{meeting.address}:{meeting.port}",
            run_id=uuid.uuid4().hex if alone else "shardwise",  # machines that meet must agree on it
            min_nodes=meeting.num_machines,
            max_nodes=meeting.num_machines,
            local_addr=meeting.address if meeting.machine_rank == 0 else None,
            **configs,
        )
    )


@contextmanager
def _guarded_directory(job: Job, asked: str) -> Iterator[Path]:
    """The directory of one run, from which ranks read their job and where they sign in; the guard removes it."""
    directory = Path(tempfile.mkdtemp(prefix="shardwise-"))
    (directory / "ranks").mkdir()
    task = {"launcher_pid": os.getpid(), **asdict(job)}
    (directory / "job.json").write_text(json.dumps(task))
    (directory / ASKED_FILE).write_text(asked)
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
def signal_handlers_restored() -> Iterator[None]:
    """The agent installs handlers of its own and leaves them behind."""
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def quiet_agent() -> Iterator[None]:
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
