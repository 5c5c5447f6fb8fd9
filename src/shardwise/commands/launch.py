"""`shardwise launch`: the program in one process per rank."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwise.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from shardwise.commands.machine_options import MachineOptions
    from shardwise.config.run.resolved import Resolved
    from shardwise.config.run.said import Said
    from shardwise.launch.job import LaunchRequest
    from shardwise.launch.wishes import Program

_PROCESSES = "Processes"
_PROGRAM = "Program"
_WITHOUT_ZERO = "--multi_gpu"


def launch(
    program: Annotated[str, typer.Argument(metavar="SCRIPT", help="Script to run in every process.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS", help="Handed to the script untouched.")
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config_file",
            metavar="FILE",
            help="The YAML of the run; flags are stronger.  "
            "(default: ~/.config/shardwise/default_config.yaml if there is one, else Accelerate's)",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Print what would run and where each setting comes from; start nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no warnings before the run.")] = False,
    module: Annotated[
        bool,
        typer.Option("--module", "-m", help="SCRIPT is a module, as after `python -m`.", rich_help_panel=_PROGRAM),
    ] = False,
    no_python: Annotated[
        bool,
        typer.Option("--no_python", help="SCRIPT is an executable that Python does not run.", rich_help_panel=_PROGRAM),
    ] = False,
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Insist on GPUs: an error where there are none.", rich_help_panel=_PROCESSES),
    ] = False,
    multi_gpu: Annotated[
        bool,
        typer.Option(_WITHOUT_ZERO, help="Insist on GPUs, without ZeRO.", rich_help_panel=_PROCESSES),
    ] = False,
    use_deepspeed: Annotated[
        bool,
        typer.Option("--use_deepspeed", help="Run with ZeRO. Each flag below says so, too.", rich_help_panel="ZeRO"),
    ] = False,
    num_cpu_threads_per_process: Annotated[
        int | None,
        typer.Option(
            "--num_cpu_threads_per_process",
            metavar="NUMBER",
            help="OMP_NUM_THREADS of each process.  (default: yours if it is set, else cores // processes)",
            rich_help_panel=_PROCESSES,
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Run SCRIPT in one process per GPU of this machine, or in a few CPU processes.

    What a flag says is stronger than the YAML; what the DeepSpeed JSON says concretely nobody may contradict.
    A rank that fails ends the run: its error is shown and its exit code is the command's. With --max_restarts every
    rank starts anew instead, and SCRIPT goes on from its checkpoint. Ctrl-C ends every rank.
    """
    from shardwise.commands.machine_options import taken_from
    from shardwise.launch.job import ProgramKind
    from shardwise.launch.wishes import Program

    if module and no_python:
        raise ConfigError("Both --module and --no_python were given. Choose one: a module is always run by Python.")
    gpu_flag = _WITHOUT_ZERO if multi_gpu else "--gpu" if gpu else None
    if gpu_flag and settings["use_cpu"]:
        raise ConfigError(
            f"Both --cpu and {gpu_flag} were given. Choose one, or neither: GPUs are used where there are some."
        )
    if use_deepspeed and multi_gpu:
        raise ConfigError(
            "Both --use_deepspeed and --multi_gpu were given. Choose one: the first is with ZeRO, the second without. "
            "--gpu insists on GPUs for either."
        )
    machines = taken_from(settings)
    if machines.machines and settings["num_machines"] not in (None, str(machines.machines[1])):
        raise ConfigError(
            f"--nnodes is {machines.nnodes}, but --num_machines is {settings['num_machines']}. Leave one of them out."
        )
    wanted = Program(
        name=program,
        arguments=tuple(arguments or ()),
        kind=ProgramKind.MODULE if module else ProgramKind.COMMAND if no_python else ProgramKind.SCRIPT,
        num_threads=num_cpu_threads_per_process,
        min_machines=machines.machines[0] if machines.machines else None,
        gpu_flag=gpu_flag,
    )
    own = {
        "config_file": config_file,
        "quiet": quiet,
        "module": module,
        "no_python": no_python,
        "gpu": gpu,
        "multi_gpu": multi_gpu,
        "use_deepspeed": use_deepspeed,
        "num_cpu_threads_per_process": num_cpu_threads_per_process,
    }
    switches = _switches(use_deepspeed, gpu_flag, machines)
    raise typer.Exit(_launch(wanted, settings, switches, machines, own, dry_run))


def _launch(
    program: "Program",
    settings: dict[str, Any],
    switches: "dict[str, Said]",
    machines: "MachineOptions",
    own: dict[str, Any],
    dry_run: bool,
) -> int:
    """`own` are the flags beside `settings` and `machines`."""
    import os

    from rich.console import Console

    from shardwise.commands.launch_options import given
    from shardwise.config.run.gather import gather
    from shardwise.config.run.handover import pack
    from shardwise.config.run.nodes import check_nodes
    from shardwise.config.run.precedence import resolve
    from shardwise.launch.capsule import request_on
    from shardwise.launch.hosts import ON_EACH, fleet_from, own_rank
    from shardwise.launch.wishes import idle_settings, meeting_notes, request_from

    asked, notes = gather(given(settings), own["config_file"], os.environ)
    asked = asked.stronger(switches)
    resolved = resolve(asked)
    screen = Console(stderr=True, quiet=own["quiet"], soft_wrap=True)
    if machines.slurm_script is not None or machines.k8s_manifest is not None:
        from shardwise.commands.elsewhere import write_for_scheduler

        if resolved["num_processes"] is not None:
            check_nodes(resolved, resolved["num_processes"])
        flags = {**own, **settings, **machines.as_flags}
        write_for_scheduler(program, resolved.values, flags, machines, os.environ)
        return 0
    fleet = fleet_from(resolved.values, os.environ)
    request = request_from(resolved, program, fleet)
    for note in (*notes, *(fleet.notes if fleet else ()), *meeting_notes(resolved, request), *idle_settings(resolved)):
        screen.print(note, style="dim", markup=False, highlight=False)
    for warning in resolved.warnings:
        screen.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    if machines.of_a_launcher and (fleet is None or fleet.launcher == ON_EACH):
        raise ConfigError(
            f"{machines.of_a_launcher} was given, but no other machine is started from here. Leave it out, or choose a "
            "launcher and give it machines: --deepspeed_multinode_launcher, --deepspeed_hostfile."
        )
    if fleet is not None:
        check_nodes(resolved, sum(host.num_slots for host in fleet.hosts))
    if fleet is not None and fleet.launcher != ON_EACH:
        from shardwise.commands.elsewhere import launch_elsewhere

        return launch_elsewhere(fleet, request, pack(asked), machines, os.environ, dry_run, screen)
    if fleet is not None:
        request = request_on(fleet.hosts, own_rank(fleet.hosts, resolved.values["machine_rank"]), request)
    return _launch_here(request, resolved, pack(asked), dry_run, screen)


def _launch_here(request: "LaunchRequest", resolved: "Resolved", asked: str, dry_run: bool, screen: "Console") -> int:
    """Runs this machine's part of the run, which may be all of it."""
    import os

    from rich.console import Console

    from shardwise.config.run.nodes import check_nodes
    from shardwise.launch.job import notes_on, resolve_job
    from shardwise.launch.machine import this_machine

    job = resolve_job(request, this_machine())
    check_nodes(resolved, job.num_processes)
    for note in notes_on(request, job):
        screen.print(note, style="dim", markup=False, highlight=False)
    if dry_run:
        from shardwise.commands.dry_run import print_job

        print_job(job, resolved, os.environ)
        return 0

    from shardwise.launch.runner import run

    return run(job, asked, Console(stderr=True))


def _switches(use_deepspeed: bool, gpu_flag: str | None, machines: "MachineOptions") -> "dict[str, Said]":
    """What the flags say that are not settings themselves."""
    from shardwise.config.run.said import Origin, Said

    said = {"use_cpu": Said(False, Origin.FLAG, gpu_flag)} if gpu_flag else {}
    if machines.machines:
        said["num_machines"] = Said(machines.machines[1], Origin.FLAG, "--nnodes")
    if use_deepspeed:
        said["distributed_type"] = Said("DEEPSPEED", Origin.FLAG, "--use_deepspeed")
    elif gpu_flag == _WITHOUT_ZERO:
        said["distributed_type"] = Said("MULTI_GPU", Origin.FLAG, gpu_flag)
    return said
