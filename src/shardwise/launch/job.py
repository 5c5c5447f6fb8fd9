"""What the user asked to run, resolved against the machine before any process starts."""

import difflib
import importlib.machinery
import importlib.util
import os
import shutil
import socket
import sys
from dataclasses import dataclass
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
class LaunchRequest:
    """The user's words. None and 0 stand for "choose for me"."""

    program: str
    arguments: tuple[str, ...] = ()
    kind: ProgramKind = ProgramKind.SCRIPT
    device: Device | None = None
    num_processes: int | None = None
    num_threads_per_process: int | None = None
    port: int = 0


@dataclass(frozen=True)
class Job:
    """One program in `num_processes` processes on one kind of device: every choice made, every mistake ruled out."""

    program: str
    arguments: tuple[str, ...]
    kind: ProgramKind
    device: Device
    num_processes: int
    num_threads_per_process: int
    threads_were_asked_for: bool  # else a thread count that the user's environment already has stays
    port: int  # of the rendezvous; 0: a free one

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
    _check_program(request.kind, request.program)
    device = request.device or (Device.GPU if machine.num_gpus else Device.CPU)
    num_processes = _num_processes(request.num_processes, device, machine)
    if request.port:
        _check_port(request.port)
    num_threads = request.num_threads_per_process
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"--num_cpu_threads_per_process is {num_threads}, and a process needs at least 1.")
    return Job(
        program=request.program,
        arguments=request.arguments,
        kind=request.kind,
        device=device,
        num_processes=num_processes,
        num_threads_per_process=num_threads or max(1, machine.num_cores // num_processes),
        threads_were_asked_for=num_threads is not None,
        port=request.port,
    )


def _num_processes(asked: int | None, device: Device, machine: Machine) -> int:
    if device is Device.GPU and machine.num_gpus == 0:
        raise ConfigError(
            "--gpu was given, but torch sees no CUDA device on this machine. "
            "Leave --gpu out to run on the CPU, or see `shardwise env` for what torch was built with."
        )
    if asked is None:
        return machine.num_gpus if device is Device.GPU else min(2, machine.num_cores)
    if asked < 1:
        raise ConfigError(f"--num_processes is {asked}, and a run needs at least 1.")
    if device is Device.GPU and asked > machine.num_gpus:
        raise ConfigError(
            f"--num_processes is {asked}, but torch sees {machine.num_gpus} CUDA device(s), and each process needs its "
            f"own. Choose at most {machine.num_gpus}, or give --cpu to run on the CPU."
        )
    return asked


def _check_program(kind: ProgramKind, program: str) -> None:
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


def _check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise ConfigError(f"--main_process_port is {port}. Choose one from 1 to 65535, or 0 for a free one.")
    with socket.socket() as probe:
        # As the rendezvous itself does: a port that only waits for its last connection's echo is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ConfigError(
                f"--main_process_port {port} cannot be used: {error.strerror}. Choose another, or 0 for a free one."
            ) from error
