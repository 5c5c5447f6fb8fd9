"""Running a job to its end: the ranks under torch's elastic agent, the agent under a guard.

On several machines each runs this, with an agent for its own ranks; they come together before (`gathering`), watch over
each other meanwhile (`health`), and end with one verdict.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from shardwise.launch import bootstrap, guard
from shardwise.launch.agent import Agent, Failures
from shardwise.launch.environment import exported, rank_environment
from shardwise.launch.facts import facts_of, versions_here
from shardwise.launch.failure import print_failures, read_failures
from shardwise.launch.gathering import come_together, run_id
from shardwise.launch.health import Health
from shardwise.launch.job import Job, Meeting
from shardwise.launch.local_ranks import LocalRanks, watched
from shardwise.launch.verdict import Ending, Verdict

# What a rank may take after Ctrl-C to run its `finally` blocks. One that waits in a collective cannot hear the signal.
GRACE_SECONDS = 10
MEETING_SECONDS = 600  # how long machines wait for each other
LAST_CALL_SECONDS = 15  # how long those that could go on with fewer wait for more
ASKED_FILE = "asked.json"  # in the run directory


@dataclass(frozen=True)
class Member:
    """A machine's part in a run of several, beyond its job."""

    host: str  # its name in messages
    patience_seconds: float | None = None  # for the other machines; None: MEETING_SECONDS
    shares_screen: bool = False  # with the other machines

    def tells(self, verdict: Verdict, machine_rank: int) -> bool:
        """Whether this machine shows the verdict: on a shared screen machine 0 does, or 1 where 0 is lost."""
        first_is_lost = verdict.ending is Ending.LOST and verdict.machine_rank == 0
        return not self.shares_screen or machine_rank == (1 if first_is_lost else 0)


def run(job: Job, asked: str, console: Console, member: Member | None = None) -> int:
    """Runs `job` to its end and says which exit status the launcher owes its caller.

    `asked` is handed to the ranks, who resolve it again together with what the script says.
    0 when every rank ended well, a failed rank's own exit code, or 128 + N for signal N. When this returns, or this
    process is killed, no rank is left and none of the processes that ranks started in their own process groups.
    """
    with (
        quiet_agent(),
        signal_handlers_restored(),
        _job_directory(job, asked) as directory,
        exported(rank_environment(job, os.environ, directory / ASKED_FILE)),
    ):
        if job.meeting.num_machines == 1:
            return _run_alone(job, directory, console)
        facts = facts_of(job, asked, versions_here())
        return _run_together(job, facts, directory, console, member or Member(socket.gethostname()))


def _run_alone(job: Job, directory: Path, console: Console) -> int:
    ranks = LocalRanks(directory / "ranks", job.faults.timeout_seconds)
    try:
        with watched(ranks.end_stopped):
            _run_agent(job, directory, console, uuid.uuid4().hex)
    except ChildFailedError as error:
        failures = read_failures(error.failures)
        print_failures(failures, job.num_processes, console)
        _tell_restarts(job, console)
        return failures[0].status
    except SignalException as ended:
        received = signal.Signals(ended.sigval)
        console.print(f"Ended by {received.name}; every rank is ended too.", style="yellow")
        return 128 + received
    return 0


def _run_together(job: Job, facts: Mapping[str, Any], directory: Path, console: Console, member: Member) -> int:
    meeting = job.meeting
    store = come_together(meeting, member.host, facts, member.patience_seconds or MEETING_SECONDS)
    ranks = LocalRanks(directory / "ranks", job.faults.timeout_seconds)
    health = Health(job, member.host, store, ranks, partial(_note, console))
    health.start()
    verdict = health.conclude(_end_of(job, directory, console, member, run_id(store)))
    if verdict is not None and member.tells(verdict, meeting.machine_rank):
        verdict.print(console)
        if verdict.failures:
            _tell_restarts(job, console)
    health.close()
    return 0 if verdict is None else verdict.status


def _end_of(job: Job, directory: Path, console: Console, member: Member, run: str) -> Verdict | None:
    """Runs this machine's agent, and says what was wrong with its end."""
    rank, host = job.meeting.machine_rank, member.host
    try:
        _run_agent(job, directory, console, run, host)
    except ChildFailedError as error:
        failures = tuple(read_failures(error.failures, host))
        return Verdict(Ending.FAILED, rank, host, failures, job.num_processes)
    except SignalException as ended:
        return Verdict(Ending.SIGNALLED, rank, host, signal_number=int(ended.sigval))
    except (DistError, RendezvousError) as error:
        words = f"Its agent has lost the others: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return Verdict(Ending.LOST, rank, host, words=words)
    return None


def _tell_restarts(job: Job, console: Console) -> None:
    if job.max_restarts:
        told = f"Every rank was started anew {job.max_restarts} time(s): --max_restarts allows no more."
        console.print(told, style="red", soft_wrap=True)


def _run_agent(job: Job, directory: Path, console: Console, run: str, host: str = "") -> None:
    """Runs the ranks of this machine to their end; ChildFailedError where that is a bad one.

    `run` names the run; ranks find it in their environment, as `attempt` reads it.
    """
    meeting = job.meeting
    rendezvous = _rendezvous(meeting, run)

    def restarting(failures: Failures, restarts_before: int) -> None:
        if failures:
            print_failures(read_failures(failures, host), job.num_processes, console)
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
            monitor_interval=job.faults.monitor_interval_seconds,
            # Where ranks meet; under c10d the agents find a place themselves.
            master_addr=meeting.address if meeting.backend == "static" else None,
            master_port=meeting.port if meeting.backend == "static" else None,
            # Else the machine's own name is looked up, which needs a name service.
            local_addr=_own_address(meeting),
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


def _rendezvous(meeting: Meeting, run: str) -> RendezvousHandler:
    alone = meeting.num_machines == 1
    configs: dict[str, Any] = {}
    if meeting.backend == "static":
        configs = {"rank": meeting.machine_rank, "timeout": MEETING_SECONDS}
    elif not alone:
        configs = {
            "is_host": meeting.machine_rank == 0,
            "join_timeout": MEETING_SECONDS,
            "read_timeout": MEETING_SECONDS,
            "last_call_timeout": LAST_CALL_SECONDS,
        }
    return get_rendezvous_handler(
        RendezvousParameters(
            backend=meeting.backend,
            endpoint=f"{meeting.address}:{meeting.port}",
            run_id=run,
            min_nodes=meeting.min_machines or meeting.num_machines,
            max_nodes=meeting.num_machines,
            local_addr=_own_address(meeting),
            **configs,
        )
    )


def _own_address(meeting: Meeting) -> str | None:
    """The address of this machine that reaches machine 0, and so is reached by it."""
    if meeting.machine_rank == 0:
        return meeting.address
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(meeting.address, meeting.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # chooses a route; nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return None  # no route yet: the machines will say so when they meet


def _note(console: Console, text: str) -> None:
    console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _job_directory(job: Job, asked: str) -> AbstractContextManager[Path]:
    task = {"launcher_pid": os.getpid(), **asdict(job)}
    return guarded_directory({"job.json": json.dumps(task), ASKED_FILE: asked})


@contextmanager
def guarded_directory(files: Mapping[str, str]) -> Iterator[Path]:
    """The directory of one run, with `files` to read, where processes sign in; the guard removes it.

    What has signed in under `ranks` is ended with this process, in whatever way that ends.
    """
    directory = Path(tempfile.mkdtemp(prefix="shardwise-"))
    (directory / "ranks").mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
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
