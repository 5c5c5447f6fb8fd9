"""`shardwise launch`: the program in one process per rank on this machine."""

import shlex
from typing import Annotated

import typer

from shardwise.errors import ConfigError


def launch(
    program: Annotated[str, typer.Argument(metavar="SCRIPT", help="Script to run in every process.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS", help="Handed to the script untouched.")
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num_processes",
            "-n",
            help="Number of processes, each one rank.  [default: one per GPU; without a GPU 2, or 1 on a single core]",
        ),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", "--use_cpu", help="Run on the CPU with gloo, also where GPUs are.")
    ] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Insist on GPUs: an error where there are none.")] = False,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module, as after `python -m`.")] = False,
    no_python: Annotated[
        bool, typer.Option("--no_python", help="SCRIPT is an executable that Python does not run.")
    ] = False,
    main_process_port: Annotated[
        int, typer.Option("--main_process_port", help="Port where ranks meet; 0: a free one.")
    ] = 0,
    num_cpu_threads_per_process: Annotated[
        int | None,
        typer.Option(
            "--num_cpu_threads_per_process",
            help="OMP_NUM_THREADS of each process.  [default: yours if it is set, else cores // processes]",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Print what would run, and start nothing.")] = False,
) -> None:
    """Run SCRIPT in one process per GPU of this machine, or in a few CPU processes.

    A rank that fails ends the run: its error is shown and its exit code is the command's. Ctrl-C ends every rank.
    """
    import os

    from rich.console import Console

    from shardwise.launch.environment import rank_environment
    from shardwise.launch.job import Device, LaunchRequest, ProgramKind, resolve_job
    from shardwise.launch.machine import this_machine

    if cpu and gpu:
        raise ConfigError(
            "Both --cpu and --gpu were given. Choose one, or neither: GPUs are used where there are some."
        )
    if module and no_python:
        raise ConfigError("Both --module and --no_python were given. Choose one: a module is always run by Python.")
    request = LaunchRequest(
        program=program,
        arguments=tuple(arguments or ()),
        kind=ProgramKind.MODULE if module else ProgramKind.COMMAND if no_python else ProgramKind.SCRIPT,
        device=Device.CPU if cpu else Device.GPU if gpu else None,
        num_processes=num_processes,
        num_threads_per_process=num_cpu_threads_per_process,
        port=main_process_port,
    )
    job = resolve_job(request, this_machine())
    if dry_run:
        for name, value in rank_environment(job, os.environ).items():
            print(f"{name}={shlex.quote(value)}")
        print(f"{job.num_processes} x {shlex.join(job.command)}    # on {job.device.value}")
        return

    from shardwise.launch.runner import run

    raise typer.Exit(run(job, Console(stderr=True)))
