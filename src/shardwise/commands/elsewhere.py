"""`shardwise launch` where it starts nothing on this machine itself: other machines do, or a scheduler's file."""

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from shardwise.commands.machine_options import MachineOptions
from shardwise.config.run.said import Said
from shardwise.errors import ConfigError
from shardwise.launch.capsule import Capsule
from shardwise.launch.cluster_files import ClusterRun, manifest, sbatch_script
from shardwise.launch.hosts import Fleet
from shardwise.launch.job import Device, LaunchRequest, check_program
from shardwise.launch.starters import STARTERS, Start
from shardwise.launch.variables import forwarded, users_variables
from shardwise.launch.wishes import Program, asked_device

_SCREEN = Path("-")
# A manifest says these itself.
_PLACES = ("num_machines", "machine_rank", "main_process_ip", "main_process_port", "deepspeed_multinode_launcher")
_OF_LAUNCHERS = ("launcher_args", "forward_env")  # their work is done where a manifest is written


# --- other machines ---------------------------------------------------------------------------------------------------


def launch_elsewhere(
    fleet: Fleet,
    request: LaunchRequest,
    asked: str,
    options: MachineOptions,
    environ: Mapping[str, str],
    dry_run: bool,
    screen: Console,
) -> int:
    """Starts the run on the machines of `fleet` and waits for its end, or prints what would be run.

    `screen` is for notes. Raises ConfigError before anything is started.
    """
    check_program(request.kind, request.program)
    variables, files = users_variables(environ, Path.cwd())
    for file in files:
        screen.print(f"{file} adds to the variables of every machine.", style="dim", markup=False, highlight=False)
    variables = forwarded(environ, options.more_variables) | variables
    starter = STARTERS[fleet.launcher]
    capsule = Capsule(fleet.hosts, request, asked, str(Path.cwd()), variables)
    starts = starter.starts(capsule, options.more_arguments)
    if dry_run:
        _print_starts(fleet, capsule, starts)
        return 0
    starter.check_installed()

    from shardwise.launch.start import check_address, start

    if len(fleet.hosts) > 1:
        check_address(request.meeting.address)
    fewest = request.meeting.min_machines or len(fleet.hosts)
    return start(starts, Console(stderr=True), num_spare=len(fleet.hosts) - fewest)


def _print_starts(fleet: Fleet, capsule: Capsule, starts: tuple[Start, ...]) -> None:
    meeting = capsule.request.meeting
    for rank, host in enumerate(fleet.hosts):
        slots = ",".join(map(str, host.slots))
        print(f"machine {rank}: {host.name}, {host.num_slots} process(es), slots {slots}")
    if len(fleet.hosts) > 1:
        print(f"they meet at {meeting.address}:{meeting.port} ({meeting.backend})")
    print(f"variables: {' '.join(capsule.variables)}")
    for each in starts:
        settings = "".join(f"{name}={shlex.quote(value)} " for name, value in each.variables.items())
        print(settings + shlex.join(each.vector))


# --- files for a scheduler --------------------------------------------------------------------------------------------


def write_for_scheduler(
    program: Program,
    values: Mapping[str, Said],
    flags: Mapping[str, Any],
    options: MachineOptions,
    environ: Mapping[str, str],
) -> None:
    """Writes the file that --slurm_script or --k8s_manifest asks for; `flags` are those of this command."""
    if options.slurm_script is not None and options.k8s_manifest is not None:
        raise ConfigError("Both --slurm_script and --k8s_manifest were given. Write one at a time.")
    check_program(program.kind, program.name)
    run = _cluster_run(program, values, options, environ)
    tail = [program.name, *program.arguments]
    if options.slurm_script is not None:
        launcher = ["--deepspeed_multinode_launcher", "slurm"]
        kept = _flags(flags, omit=("deepspeed_multinode_launcher",))
        command = [sys.executable, "-m", "shardwise.commands.main", "launch", *kept, *launcher]
        _write(options.slurm_script, sbatch_script(run, [*command, *tail]), mode=0o755)
    elif options.k8s_manifest is not None:
        if not options.k8s_image:
            raise ConfigError("--k8s_manifest needs --k8s_image, a container image with shardwise and the script.")
        command = ["shardwise", "launch", *_flags(flags, omit=(*_PLACES, *_OF_LAUNCHERS))]
        text = manifest(options.manifest_kind, run, options.k8s_image, command, tail)
        _write(options.k8s_manifest, text, mode=0o644)


def _cluster_run(
    program: Program, values: Mapping[str, Said], options: MachineOptions, environ: Mapping[str, str]
) -> ClusterRun:
    machines, processes = values["num_machines"], values["num_processes"]
    if processes.value is None:
        raise ConfigError("nobody says how many processes run. Give --num_processes: it counts those of all machines.")
    if values["deepspeed_hostfile"].value is not None:
        raise ConfigError(
            f"deepspeed_hostfile is {values['deepspeed_hostfile']}, but a scheduler chooses the machines itself. "
            "Leave it out, and give --num_machines."
        )
    variables, _ = users_variables(environ, Path.cwd())
    mine = {name: value for name, value in variables.items() if name not in forwarded(environ)}
    named = {name: environ[name] for name in options.more_variables if name in environ}
    return ClusterRun(
        name=Path(program.name).stem,
        num_machines=machines.value,
        processes_per_machine=processes.value // machines.value,
        on_gpus=asked_device(values, program.gpu_flag) is not Device.CPU,
        directory=str(Path.cwd()),
        variables=mine | named,
    )


def _flags(flags: Mapping[str, Any], omit: tuple[str, ...]) -> Iterator[str]:
    for name, value in flags.items():
        if name not in omit and value is not None and value is not False:
            yield f"--{name}"
            if value is not True:
                yield str(value.absolute() if isinstance(value, Path) else value)


def _write(path: Path, text: str, mode: int) -> None:
    if path == _SCREEN:
        sys.stdout.write(text)
        return
    try:
        path.write_text(text)
        path.chmod(mode)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Give another path, or - for the screen."
        ) from None
