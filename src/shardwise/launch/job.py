"""What the user asked to run, resolved against the machine before any process starts."""

import difflib
import importlib.machinery
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from shardwise.errors import ConfigError
from shardwise.launch.machine import Machine

LOOPBACK = "127.0.0.1"


class ProgramKind(StrEnum):
    """How the program is named on the command line."""

    SCRIPT = "script"  # train.py, or a directory with a __main__.py
    MODULE = "module"  # package.train, as `python -m` takes it
    COMMAND = "command"  # an executable that is not run by Python


class Device(StrEnum):
    """What the ranks compute on, and with it the collectives: gloo on the CPU, NCCL on GPUs."""

    CPU = "cpu"
    GPU = "gpu"


@dataclass(frozen=True)
class Meeting:
    """The machines of a run, which of them this is, and where their ranks find each other."""

    num_machines: int = 1
    machine_rank: int = 0
    address: str = LOOPBACK  # of machine 0
    port: int = 0  # 0: a free one, on a single machine
    backend: str = "c10d"  # of torch's rendezvous: c10d, or static
    min_machines: int | None = None  # with how many of them the run may go on after a fault; None: all


@dataclass(frozen=True)
class FaultPolicy:
    """How the end of a rank or of a machine is noticed."""

    monitor_interval_seconds: float = 0.1  # between two looks of the agent at its ranks
    timeout_seconds: float = 60.0  # how long a machine may be silent, or a rank be stopped


@dataclass(frozen=True)
class LaunchRequest:
    """The user's words. None stands for "choose for me"."""

    program: str
    arguments: tuple[str, ...] = ()
    kind: ProgramKind = ProgramKind.SCRIPT
    device: Device | None = None
    num_processes: int | None = None  # over all machines
    num_threads_per_process: int | None = None
    max_restarts: int = 0  # how often all ranks are started anew when one has failed
    num_local_processes: int | None = None  # on this machine; None: the same on each
    faults: FaultPolicy = FaultPolicy()
    meeting: Meeting = Meeting()
    gpu_ids: tuple[str, ...] = ()  # empty: every one
    made_for_gpus: tuple[str, ...] = ()  # what the YAML says about GPUs, where it does not insist on them
    places: Mapping[str, str] = field(default_factory=dict)  # where a setting was said, by its name

    def named(self, setting: str) -> str:
        """A setting as messages call it, with the place where it was said."""
        place = self.places.get(setting, f"--{setting}")
        return place if place.startswith("--") else f"{setting} ({place})"


@dataclass(frozen=True)
class Job:
    """One program in `num_processes` processes on one kind of device: every choice made, every mistake ruled out."""

    program: str
    arguments: tuple[str, ...]
    kind: ProgramKind
    device: Device
    num_processes: int  # over all machines
    num_local_processes: int  # on this machine
    num_threads_per_process: int
    threads_were_asked_for: bool  # else a thread count that the user's environment already has stays
    max_restarts: int
    meeting: Meeting
    gpu_ids: tuple[str, ...]  # empty: every one
    faults: FaultPolicy = FaultPolicy()

    @property
    def command(self) -> list[str]:
        """The command line of one rank, as a user would type it without a launcher."""
        match self.kind:
            case ProgramKind.SCRIPT:
                interpreter = [sys.executable]
            case ProgramKind.MODULE:
                interpreter = [sys.executable, "-m"]
            case ProgramKind.COMMAND:
                interpreter = []
        return [*interpreter, self.program, *self.arguments]


def resolve_job(request: LaunchRequest, machine: Machine) -> Job:
    """Fills in what the user left open and checks the rest.

    Raises:
        ConfigError: the program does not exist, the machine has not the devices asked for, or the port is taken.
    """
    check_program(request.kind, request.program)
    device = request.device or (Device.GPU if machine.num_gpus else Device.CPU)
    gpu_ids = request.gpu_ids if device is Device.GPU else ()
    num_processes = _num_processes(request, device, machine)
    num_local_processes = request.num_local_processes or num_processes // request.meeting.num_machines
    if request.meeting.port and request.meeting.machine_rank == 0:
        _check_port(request)
    num_threads = request.num_threads_per_process
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"--num_cpu_threads_per_process is {num_threads}, and a process needs at least 1.")
    return Job(
        program=request.program,
        arguments=request.arguments,
        kind=request.kind,
        device=device,
        num_processes=num_processes,
        num_local_processes=num_local_processes,
        num_threads_per_process=num_threads or max(1, machine.num_cores // num_local_processes),
        threads_were_asked_for=num_threads is not None,
        max_restarts=request.max_restarts,
        meeting=request.meeting,
        gpu_ids=gpu_ids,
        faults=request.faults,
    )


def notes_on(request: LaunchRequest, job: Job) -> tuple[str, ...]:
    """What the user should read about choices that the machine has made for them."""
    if not request.made_for_gpus or job.device is Device.GPU or request.device is not None:
        return ()
    return (
        f"{', '.join(request.made_for_gpus)}: torch sees no CUDA device on this machine, so the run uses the CPU "
        f"with gloo, in {job.num_processes} process{'es' * (job.num_processes > 1)}.",
    )


def _num_processes(request: LaunchRequest, device: Device, machine: Machine) -> int:
    if device is Device.GPU and machine.num_gpus == 0:
        raise ConfigError(
            f"{request.named('gpu')} was given, but torch sees no CUDA device on this machine. "
            "Leave it out to run on the CPU, or see `shardwise env` for what torch was built with."
        )
    if device is Device.GPU:
        _check_gpu_ids(request, machine)
    num_gpus = len(request.gpu_ids) or machine.num_gpus
    asked = request.num_processes
    if asked is None:
        return num_gpus if device is Device.GPU else min(2, machine.num_cores)
    if asked < 1:
        raise ConfigError(f"{request.named('num_processes')} is {asked}, and a run needs at least 1.")
    here = request.num_local_processes or asked // request.meeting.num_machines
    if device is Device.GPU and here > num_gpus:
        of_them = "" if here == asked else f", {here} of them on this machine"
        chosen = f"gpu_ids names {num_gpus} of them" if request.gpu_ids else f"torch sees {num_gpus} CUDA device(s)"
        raise ConfigError(
            f"{request.named('num_processes')} is {asked}{of_them}, but {chosen}, and each process needs its own. "
            f"Choose at most {num_gpus * request.meeting.num_machines}, or give --cpu to run on the CPU."
        )
    return asked


def _check_gpu_ids(request: LaunchRequest, machine: Machine) -> None:
    for name in request.gpu_ids:
        # A GPU has a number and a longer name; which of them belong together is not known here.
        by_number = name.isdecimal() or not name.startswith(("GPU-", "MIG-"))
        if by_number and name not in machine.gpu_names:
            limit = " (CUDA_VISIBLE_DEVICES is set)" if machine.visible_gpus else ""
            raise ConfigError(
                f'{request.named("gpu_ids")} names GPU "{name}", but torch sees {machine.num_gpus} CUDA device(s): '
                f"{', '.join(machine.gpu_names)}{limit}. Name some of these, or all."
            )


def check_program(kind: ProgramKind, program: str) -> None:
    """Raises ConfigError if there is no such program here."""
    match kind:
        case ProgramKind.SCRIPT:
            _check_script(program)
        case ProgramKind.MODULE:
            _check_module(program)
        case ProgramKind.COMMAND:
            if shutil.which(program) is None:
                raise ConfigError(f"No executable '{program}' on PATH. Give its path, or leave --no_python out.")


def _check_script(program: str) -> None:
    path = Path(program)
    if path.is_file() or (path / "__main__.py").is_file():
        return
    if path.is_dir():
        raise ConfigError(f"'{program}' is a directory without a __main__.py. Name the script inside it.")
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" Did you mean '{path.with_name(nearest[0])}'?" if nearest else ""
    raise ConfigError(
        f"No script '{program}' in {Path.cwd()}.{hint} "
        "Give a script's path, -m and a module's name, or --no_python and an executable."
    )


def _check_module(program: str) -> None:
    # Only the outermost package is looked for: to look inside it would run its code here, in the launcher.
    package = program.partition(".")[0]
    here = importlib.machinery.PathFinder.find_spec(package, [os.getcwd()])
    if not package or (here is None and importlib.util.find_spec(package) is None):
        raise ConfigError(
            f"No module '{package or program}' in {Path.cwd()} or among the installed ones. "
            "Give the name as `python -m` takes it, or leave -m out to run a file."
        )


def _check_port(request: LaunchRequest) -> None:
    port, named = request.meeting.port, request.named("main_process_port")
    if not 0 < port < 65536:
        raise ConfigError(f"{named} is {port}. Choose one from 1 to 65535, or 0 for a free one.")
    with socket.socket() as probe:
        # As the rendezvous itself does: a port that only waits for its last connection's echo is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK if request.meeting.num_machines == 1 else "", port))
        except OSError as error:
            choice = ", or 0 for a free one" if request.meeting.num_machines == 1 else ", the same on every machine"
            raise ConfigError(
                f"{named}: port {port} cannot be used: {error.strerror}. Choose another{choice}."
            ) from error
