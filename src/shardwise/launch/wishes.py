"""From the settings of a run to what is asked of the launcher."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardwise.config.catalog import effect_of
from shardwise.config.effects import NoEffect
from shardwise.config.run.file import default_of
from shardwise.config.run.resolved import Resolved
from shardwise.config.run.said import Origin, Said
from shardwise.config.run.schema import PluginConfig, RunConfig
from shardwise.errors import ConfigError
from shardwise.launch.hosts import DEFAULT_PORT, GO_ON_WITH_FEWER, Fleet, first_address, idle_lists
from shardwise.launch.job import Device, FaultPolicy, LaunchRequest, Meeting, ProgramKind


@dataclass(frozen=True)
class Program:
    """What no file says: the program, and how this command is to run it."""

    name: str
    arguments: tuple[str, ...] = ()
    kind: ProgramKind = ProgramKind.SCRIPT
    num_threads: int | None = None
    min_machines: int | None = None  # with which the run may go on; None: all of them
    gpu_flag: str | None = None  # the flag that insists on GPUs, if one was given


def request_from(resolved: Resolved, program: Program, fleet: Fleet | None = None) -> LaunchRequest:
    """What the settings ask of the launcher; ConfigError with everything in them that no launch can do.

    `fleet` is what `hosts.fleet_from` makes of the settings: the machines, where the command itself reaches them.
    """
    values = resolved.values
    gpu_flag = program.gpu_flag
    if gpu_flag is None and values["gpu_ids"].origin is Origin.FLAG and _ids(values["gpu_ids"]):
        gpu_flag = values["gpu_ids"].place
    faults = [
        *_device_faults(values, gpu_flag),
        *_process_faults(values, fleet),
        *_machine_faults(values, program, fleet),
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    places = {name: said.place for name, said in values.items() if said.origin is not Origin.DEFAULT}
    alone = values["distributed_type"].value == "NO" and values["num_processes"].value is None
    return LaunchRequest(
        program=program.name,
        arguments=program.arguments,
        kind=program.kind,
        device=asked_device(values, gpu_flag),
        num_processes=1 if alone else values["num_processes"].value,
        num_threads_per_process=program.num_threads,
        max_restarts=values["max_restarts"].value,
        faults=FaultPolicy(values["monitor_interval"].value, values["health_timeout"].value),
        meeting=_meeting(values, program, fleet),
        gpu_ids=_ids(values["gpu_ids"]),
        made_for_gpus=tuple(_made_for_gpus(values)),
        places=places | ({"gpu": gpu_flag} if gpu_flag else {}),
    )


# --- device -----------------------------------------------------------------------------------------------------------


def asked_device(values: Mapping[str, Said], gpu_flag: str | None) -> Device | None:
    """The device that was insisted on; None leaves it to the machine."""
    if gpu_flag is not None:
        return Device.GPU
    if values["use_cpu"].value or values["distributed_type"].value == "MULTI_CPU":
        return Device.CPU
    return None


def _device_faults(values: Mapping[str, Said], gpu_flag: str | None) -> Iterator[str]:
    use_cpu, kind, ids = values["use_cpu"], values["distributed_type"], values["gpu_ids"]
    if gpu_flag is not None and use_cpu.value:
        yield f"use_cpu is {use_cpu}, but {gpu_flag} was given. Leave one of them out."
    if gpu_flag is not None and kind.value == "MULTI_CPU":
        yield f"distributed_type is {kind}, but {gpu_flag} was given. Leave one of them out."
    named = _ids(ids)
    if len(set(named)) != len(named):
        yield f"gpu_ids is {ids}: a GPU is named twice."


def _ids(said: Said) -> tuple[str, ...]:
    if said.value is None or str(said.value).strip().lower() in ("", "all"):
        return ()
    return tuple(part.strip() for part in str(said.value).split(",") if part.strip())


def _made_for_gpus(values: Mapping[str, Said]) -> Iterator[str]:
    """What a YAML from a machine with GPUs says, which may also run where there is none."""
    kind, ids, use_cpu = values["distributed_type"], values["gpu_ids"], values["use_cpu"]
    if kind.value == "MULTI_GPU":
        yield f"distributed_type is {kind}"
    if _ids(ids):
        yield f"gpu_ids is {ids}"
    if use_cpu.origin is Origin.FILE and not use_cpu.value:
        yield f"use_cpu is {use_cpu}"


# --- processes and machines -------------------------------------------------------------------------------------------


def _process_faults(values: Mapping[str, Said], fleet: Fleet | None) -> Iterator[str]:
    kind, processes, machines = values["distributed_type"], values["num_processes"], values["num_machines"]
    count = processes.value
    typed = processes.origin is Origin.FLAG and kind.origin is not Origin.FLAG
    if kind.value == "NO" and count is not None and count > 1 and not typed:
        yield (
            f"distributed_type is {kind}, which is one process, but num_processes is {processes}. "
            "Write MULTI_GPU, MULTI_CPU or DEEPSPEED, or num_processes: 1."
        )
    if count is None and machines.value > 1 and fleet is None:
        yield (
            f"num_machines is {machines}, and nobody says how many processes they run. "
            "Give --num_processes, the same on each: it counts those of all machines."
        )


def _machine_faults(values: Mapping[str, Said], program: Program, fleet: Fleet | None) -> Iterator[str]:
    machines, backend = values["num_machines"], values["rdzv_backend"]
    count = machines.value if fleet is None else len(fleet.hosts)
    fewest = program.min_machines
    if fewest is not None and not 1 <= fewest <= count:
        yield f"--nnodes allows no fewer than {_machines(fewest)}, and there are {count}. Give 1 to {count}."
    elif fewest is not None and fewest < count and not values["max_restarts"].value:
        yield f"--nnodes allows {_machines(fewest)}, but a run goes on with fewer by a restart. Give --max_restarts."
    if count == 1:
        return
    if fewest is not None and fewest < count and fleet is not None and fleet.launcher not in GO_ON_WITH_FEWER:
        yield (
            f"--nnodes allows {_machines(fewest)}, but {fleet.launcher} does not let a run go on when it loses one. "
            f"Choose --deepspeed_multinode_launcher {GO_ON_WITH_FEWER[-1]}."
        )
    restarts = values["max_restarts"]
    if restarts.value and backend.origin is Origin.FLAG and backend.value == "static":
        yield (
            f"rdzv_backend is {backend}, by which machines meet only once, but max_restarts is {restarts}. "
            "Leave one of them out; c10d is what restarts need."
        )
    if fleet is not None:
        return
    for name, what in (("main_process_ip", "an address of machine 0"), ("main_process_port", "a free port of it")):
        if not values[name].value:
            yield f"num_machines is {machines}, and they need --{name}, the same on each: {what} that all can reach."


def _machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"


def _meeting(values: Mapping[str, Said], program: Program, fleet: Fleet | None) -> Meeting:
    port = values["main_process_port"].value or 0
    num_machines = values["num_machines"].value if fleet is None else len(fleet.hosts)
    if num_machines == 1:
        return Meeting(port=port)
    backend = values["rdzv_backend"]
    by_rendezvous = backend.origin is Origin.DEFAULT and not values["same_network"].value
    meet_again = values["max_restarts"].value > 0
    chosen = "c10d" if by_rendezvous or meet_again else backend.value
    fewest = program.min_machines if program.min_machines != num_machines else None
    if fleet is None:
        rank, address = values["machine_rank"].value, values["main_process_ip"].value
        return Meeting(num_machines, rank, address, port, chosen, fewest)
    # The machine's rank is filled in on each.
    address = first_address(fleet.hosts, values["main_process_ip"])
    return Meeting(num_machines, 0, address, port or DEFAULT_PORT, chosen, fewest)


def meeting_notes(resolved: Resolved, request: LaunchRequest) -> Iterator[str]:
    """Notes on what was not followed to the letter."""
    backend, meeting = resolved.values["rdzv_backend"], request.meeting
    if backend.origin is not Origin.DEFAULT and meeting.backend != backend.value and meeting.num_machines > 1:
        yield f"rdzv_backend: {backend}, but machines meet by c10d, as restarts need it."


# --- settings that change nothing -------------------------------------------------------------------------------------


def idle_settings(resolved: Resolved) -> Iterator[str]:
    """Notes on settings that somebody has given another value than the default, without an effect."""
    for name, said in resolved.values.items():
        block = PluginConfig if name in PluginConfig.model_fields else RunConfig
        effect = effect_of(block.model_fields[name])
        if isinstance(effect, NoEffect) and effect.warns and said.value != default_of(name):
            yield f"{name}: {said} has no effect: {effect.reason}."
    yield from idle_lists(resolved.values)
