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
from shardwise.launch.job import Device, LaunchRequest, Meeting, ProgramKind

BY_HAND = "standard"
_ON_OTHER_MACHINES = ("deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter")
_HOW = (
    f"Run the same command on each machine, with --deepspeed_multinode_launcher {BY_HAND} and its own --machine_rank."
)


@dataclass(frozen=True)
class Program:
    """What no file says: the program, and how this command is to run it."""

    name: str
    arguments: tuple[str, ...] = ()
    kind: ProgramKind = ProgramKind.SCRIPT
    num_threads: int | None = None
    max_restarts: int = 0
    gpu_flag: str | None = None  # the flag that insists on GPUs, if one was given


def request_from(resolved: Resolved, program: Program) -> LaunchRequest:
    """What the settings ask of the launcher; ConfigError with everything in them that no launch can do."""
    values = resolved.values
    gpu_flag = program.gpu_flag
    if gpu_flag is None and values["gpu_ids"].origin is Origin.FLAG and _ids(values["gpu_ids"]):
        gpu_flag = values["gpu_ids"].place
    faults = [*_device_faults(values, gpu_flag), *_process_faults(values), *_machine_faults(values)]
    if faults:
        raise ConfigError("\n".join(faults))
    places = {name: said.place for name, said in values.items() if said.origin is not Origin.DEFAULT}
    alone = values["distributed_type"].value == "NO" and values["num_processes"].value is None
    return LaunchRequest(
        program=program.name,
        arguments=program.arguments,
        kind=program.kind,
        device=_device(values, gpu_flag),
        num_processes=1 if alone else values["num_processes"].value,
        num_threads_per_process=program.num_threads,
        max_restarts=program.max_restarts,
        meeting=_meeting(values),
        gpu_ids=_ids(values["gpu_ids"]),
        made_for_gpus=tuple(_made_for_gpus(values)),
        places=places | ({"gpu": gpu_flag} if gpu_flag else {}),
    )


# --- device -----------------------------------------------------------------------------------------------------------


def _device(values: Mapping[str, Said], gpu_flag: str | None) -> Device | None:
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


def _process_faults(values: Mapping[str, Said]) -> Iterator[str]:
    kind, processes, machines = values["distributed_type"], values["num_processes"], values["num_machines"]
    count = processes.value
    typed = processes.origin is Origin.FLAG and kind.origin is not Origin.FLAG
    if kind.value == "NO" and count is not None and count > 1 and not typed:
        yield (
            f"distributed_type is {kind}, which is one process, but num_processes is {processes}. "
            "Write MULTI_GPU, MULTI_CPU or DEEPSPEED, or num_processes: 1."
        )
    if count is None and machines.value > 1:
        yield (
            f"num_machines is {machines}, and nobody says how many processes they run. "
            "Give --num_processes, the same on each: it counts those of all machines."
        )


def _machine_faults(values: Mapping[str, Said]) -> Iterator[str]:
    machines = values["num_machines"]
    if machines.value == 1:
        return
    starter = values["deepspeed_multinode_launcher"]
    if starter.origin is not Origin.DEFAULT and starter.value != BY_HAND:
        yield f"deepspeed_multinode_launcher is {starter}: no process is started on another machine from here. {_HOW}"
    for name in _ON_OTHER_MACHINES:
        if values[name].value is not None:
            yield f"{name} is {values[name]}: no list of machines is read. Leave it out, or give --{name} null. {_HOW}"
    for name, what in (("main_process_ip", "an address of machine 0"), ("main_process_port", "a free port of it")):
        if not values[name].value:
            yield f"num_machines is {machines}, and they need --{name}, the same on each: {what} that all can reach."


def _meeting(values: Mapping[str, Said]) -> Meeting:
    port = values["main_process_port"].value or 0
    num_machines = values["num_machines"].value
    if num_machines == 1:
        return Meeting(port=port)
    backend = values["rdzv_backend"]
    by_rendezvous = backend.origin is Origin.DEFAULT and not values["same_network"].value
    chosen = "c10d" if by_rendezvous else backend.value
    return Meeting(num_machines, values["machine_rank"].value, values["main_process_ip"].value, port, chosen)


# --- settings that change nothing -------------------------------------------------------------------------------------


def idle_settings(resolved: Resolved) -> Iterator[str]:
    """Notes on settings that somebody has given another value than the default, without an effect."""
    for name, said in resolved.values.items():
        block = PluginConfig if name in PluginConfig.model_fields else RunConfig
        effect = effect_of(block.model_fields[name])
        if isinstance(effect, NoEffect) and effect.warns and said.value != default_of(name):
            yield f"{name}: {said} has no effect: {effect.reason}."
