"""The schema of the YAML that describes a run.

The keys of `deepspeed_config` are also the fields of DeepSpeedPlugin and flags of `shardwise launch`; most keys of the
top level are flags, too. The names and the layout are those of Accelerate's config files
(huggingface.co/docs/accelerate/usage_guides/deepspeed).
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from shardwise.config.effects import Acts, NoEffect, Unsupported
from shardwise.config.values import Block, Count, Foreign, Name, NonNegative, Positive, PositiveCount, Stage


def _as_choice(value: Any) -> Any:
    """YAML 1.1 reads a bare ``no`` as false, and an empty value as null; people mean the words."""
    if value is False:
        return "no"
    return value


def _none_word(value: Any) -> Any:
    return "none" if value is None else value


def _no_path(value: Any) -> Any:
    """Accelerate's documented way to say that no path is given."""
    return None if isinstance(value, str) and value.lower() == "none" else value


def _switch(value: Any) -> Any:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _comma_list(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _text(value: Any) -> Any:
    """Lists of numbers such as ``gpu_ids: 0,1`` are numbers to YAML when there is only one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _asks_nothing(value: Any) -> bool:
    return not value


def _no_dynamo(value: Any) -> bool:
    return not value or str(value).lower() == "no"


Switch = Annotated[bool, BeforeValidator(_switch)]
Device = Annotated[Literal["none", "cpu", "nvme"], BeforeValidator(_none_word)]
OptionalPath = Annotated[str | None, BeforeValidator(_no_path)]
CommaList = Annotated[tuple[Name, ...], BeforeValidator(_comma_list)]
Precision = Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(_as_choice)]
Text = Annotated[str | None, BeforeValidator(_text)]
Port = Annotated[int, Field(ge=0, le=65535)]

MultinodeLauncher = Literal["pdsh", "standard", "openmpi", "mpich", "mvapich", "impi", "slurm", "nossh", "ssh"]

_FOREIGN = Unsupported("this way of training is not here; ZeRO stage 3 shards what it shards", neutral=_asks_nothing)
_TPU = Unsupported("there is no TPU support", neutral=_asks_nothing)


class PluginConfig(Block):
    """What a run asks of ZeRO: the section `deepspeed_config`, the fields of DeepSpeedPlugin, flags of `launch`."""

    zero_stage: Annotated[
        Stage, Acts("sharded over ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters")
    ] = 2
    gradient_accumulation_steps: Annotated[
        PositiveCount | None,
        Acts("micro-batches a step; null leaves it to Accelerator(gradient_accumulation_steps=…)", auto="the script's"),
    ] = None
    gradient_clipping: Annotated[
        NonNegative | None, Acts("clip gradients to this global norm; null is no clipping", auto="no clipping")
    ] = None
    offload_optimizer_device: Annotated[Device, Acts("where optimizer state rests, from stage 1 on")] = "none"
    offload_optimizer_nvme_path: Annotated[OptionalPath, Acts("directory for offload_optimizer_device: nvme")] = None
    offload_param_device: Annotated[Device, Acts("where parameters rest, at stage 3")] = "none"
    offload_param_nvme_path: Annotated[OptionalPath, Acts("directory for offload_param_device: nvme")] = None
    zero3_init_flag: Annotated[
        Switch | None,
        Acts("build models in pieces under accelerator.init_context(), at stage 3; null is true there"),
    ] = None
    zero3_save_16bit_model: Annotated[Switch, Acts("gather whole 16-bit weights on saving, at stage 3")] = False
    deepspeed_moe_layer_cls_names: Annotated[
        CommaList, Acts("class names of mixture-of-experts layers, each kept one unit; comma-separated")
    ] = ()
    num_nodes_simulated: Annotated[
        PositiveCount | None,
        Acts("treat the processes as if they were on so many nodes, neighbours together: to try ZeRO++ on one machine"),
    ] = None
    deepspeed_config_file: Annotated[OptionalPath, Acts("a DeepSpeed JSON; what it says is its own word")] = None
    deepspeed_hostfile: Annotated[
        OptionalPath, Acts("a file of machines, a line for each such as worker-1 slots=4; they are started from here")
    ] = None
    deepspeed_exclusion_filter: Annotated[
        Text, Acts("the hostfile without these machines or slots, such as worker-1@worker-2:0,2")
    ] = None
    deepspeed_inclusion_filter: Annotated[
        Text, Acts("only these machines and slots of the hostfile, such as worker-1@worker-2:0,2")
    ] = None
    deepspeed_multinode_launcher: Annotated[
        MultinodeLauncher | None,
        Acts(
            "what starts the run on other machines; null is pdsh where there is a hostfile, else standard: you do, "
            "by the same command on each"
        ),
    ] = None


class RunConfig(Block):
    """The whole YAML."""

    compute_environment: Annotated[Literal["LOCAL_MACHINE"], Acts("the machines are one's own")] = "LOCAL_MACHINE"
    distributed_type: Annotated[
        Name | None, Acts("NO, MULTI_CPU, MULTI_GPU or DEEPSPEED; null is found from the other keys")
    ] = None
    num_processes: Annotated[PositiveCount | None, Acts("ranks of the run, over all machines")] = None
    num_machines: Annotated[PositiveCount, Acts("machines of the run")] = 1
    machine_rank: Annotated[Count, Acts("which of the machines this is, from 0")] = 0
    main_process_ip: Annotated[str | None, Acts("address of machine 0, as the others reach it")] = None
    main_process_port: Annotated[
        Port | None, Acts("port where ranks meet; null or 0 is a free one, on a single machine")
    ] = None
    same_network: Annotated[Switch, Acts("false: machines meet through rdzv_backend")] = True
    rdzv_backend: Annotated[Literal["static", "c10d"], Acts("how machines find each other")] = "static"
    max_restarts: Annotated[Count, Acts("how often every rank starts anew when one has failed")] = 0
    monitor_interval: Annotated[Positive, Acts("seconds between two looks at the ranks")] = 0.1
    health_timeout: Annotated[
        Positive, Acts("seconds after which a silent machine, or a stopped rank, ends the run")
    ] = 60.0
    gpu_ids: Annotated[Text, Acts("the GPUs to use, such as 0,2; null or all is every one")] = None
    use_cpu: Annotated[Switch, Acts("run on the CPU, also where GPUs are")] = False
    mixed_precision: Annotated[Precision, Acts("compute dtype: no is fp32, fp16, bf16")] = "no"
    debug: Annotated[Switch, Acts("check shapes of collectives and log more")] = False
    deepspeed_config: PluginConfig = Field(default_factory=PluginConfig)

    fp16: Annotated[Switch | None, Acts("the old form of mixed_precision: fp16")] = None
    dynamo_config: Annotated[
        Foreign | None, Unsupported("compile the model's blocks with torch.compile", neutral=_asks_nothing)
    ] = None
    dynamo_backend: Annotated[Any, Unsupported("compile the model's blocks with torch.compile", neutral=_no_dynamo)] = (
        None
    )
    main_training_function: Annotated[Name, NoEffect("only notebooks and TPUs call it by name", warns=False)] = "main"
    enable_cpu_affinity: Annotated[Switch, NoEffect("the system places processes")] = False
    downcast_bf16: Annotated[Any, NoEffect("only TPUs read it", warns=False)] = "no"
    fsdp_config: Annotated[Foreign | None, _FOREIGN] = None
    megatron_lm_config: Annotated[Foreign | None, _FOREIGN] = None
    parallelism_config: Annotated[Foreign | None, _FOREIGN] = None
    tp_config: Annotated[Foreign | None, _FOREIGN] = None
    fp8_config: Annotated[Foreign | None, Unsupported("parameters compute in fp16, bf16 or fp32", _asks_nothing)] = None
    ipex_config: Annotated[Foreign | None, _FOREIGN] = None
    mpirun_config: Annotated[Foreign | None, Unsupported("deepspeed_multinode_launcher names it", _asks_nothing)] = None
    tpu_name: Annotated[Any, _TPU] = None
    tpu_zone: Annotated[Any, _TPU] = None
    tpu_env: Annotated[Any, _TPU] = None
    tpu_use_cluster: Annotated[Any, _TPU] = None
    tpu_use_sudo: Annotated[Any, _TPU] = None
    commands: Annotated[Any, _TPU] = None
    command_file: Annotated[Any, _TPU] = None
