"""The questions in their order, as data.

A question about a setting takes its kind, its choices and its hint from the schema of the run.
The order is that of `accelerate config`, which people know. The torch dynamo question is left out: the engine has no
such setting.
"""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from shardwise.config.catalog import effect_of
from shardwise.config.effects import Acts
from shardwise.config.run.schema import PluginConfig, RunConfig
from shardwise.launch.machine import Machine
from shardwise.questionnaire.json_file import json_leaves_open, json_stage
from shardwise.questionnaire.question import NEEDED, Answers, Choice, Kind, Question, When

_KINDS = {bool: Kind.YES_NO, int: Kind.WHOLE, float: Kind.NUMBER}


def questions(machine: Machine) -> tuple[Question, ...]:
    """All questions, with the defaults that suit this machine."""
    return (*_place(machine), *_machines(), *_zero(), *_size(machine))


def _place(machine: Machine) -> tuple[Question, ...]:
    gpus = "multi-GPU" if machine.num_gpus else "multi-GPU (no GPU is seen here)"
    types = (Choice("NO", "No distributed training"), Choice("MULTI_CPU", "multi-CPU"), Choice("MULTI_GPU", gpus))
    usual = "MULTI_GPU" if machine.num_gpus > 1 else "NO" if machine.num_gpus else "MULTI_CPU"
    own_machine = (Choice("LOCAL_MACHINE", "This machine"),)
    return (
        _setting("compute_environment", "Where do you train?", "LOCAL_MACHINE", choices=own_machine),
        Question("machine_type", "Which type of machine is it?", Kind.CHOICE, usual, types),
        _setting("use_cpu", "Train on the CPU, even if there is a GPU?", not machine.num_gpus, when=(ONE_PROCESS,)),
    )


def _machines() -> tuple[Question, ...]:
    return (
        _setting("num_machines", "How many machines train together?", 1, when=(SEVERAL_PROCESSES,)),
        _setting("machine_rank", "Which of them is this machine, counted from 0?", 0, when=(SEVERAL_MACHINES,)),
        _setting("main_process_ip", "What is the IP address of machine 0?", when=(SEVERAL_MACHINES,)),
        _setting("main_process_port", "Which port of machine 0 do they meet at?", 29500, when=(SEVERAL_MACHINES,)),
        _setting("same_network", "Are all machines in one local network?", True, when=(SEVERAL_MACHINES,)),
        _setting("rdzv_backend", "Which rendezvous backend do they use?", "static", when=(APART,)),
        _setting("max_restarts", "How often may all ranks start anew after a fault?", 0, when=(SEVERAL_MACHINES,)),
        _setting("monitor_interval", "How many seconds are between two looks at the ranks?", 0.1, when=(RESTARTS,)),
        _setting("debug", "Check the collectives while running, for debugging?", False, hinted=True),
    )


def _zero() -> tuple[Question, ...]:
    own = (ZERO, NO_JSON)
    with_hostfile = (ZERO, WITH_HOSTFILE)
    return (
        _lead("use_deepspeed", "Do you want to use DeepSpeed (ZeRO: model states sharded over the processes)?"),
        _lead("use_deepspeed_config_file", "Do you want to name a JSON file with a DeepSpeed config?", ZERO),
        _setting(
            "deepspeed_config_file",
            "What is the path of the JSON file?",
            kind=Kind.PATH,
            when=(ZERO, JSON),
            hinted=True,
        ),
        _setting("zero_stage", "Which stage of ZeRO?", 2, when=own, choices=_STAGES),
        _setting("offload_optimizer_device", "Offload the optimizer state to where?", "none", when=(*own, STAGE_1)),
        _setting("offload_param_device", "Offload the parameters to where?", "none", when=(*own, STAGE_3)),
        _nvme_path("param", "parameters"),
        _nvme_path("optimizer", "optimizer state"),
        _setting("gradient_accumulation_steps", "How many gradient accumulation steps?", 1, when=own, hinted=True),
        _lead("clip_gradients", "Do you want gradient clipping?", *own),
        _setting("gradient_clipping", "What is the largest gradient norm?", 1.0, when=(*own, _yes("clip_gradients"))),
        _setting("zero3_save_16bit_model", "Save whole 16-bit weights at stage 3?", False, when=(*own, STAGE_3)),
        _setting(
            "zero3_init_flag",
            "Enable zero.Init, to build massive models at stage 3?",
            False,
            when=(ZERO, MAYBE_STAGE_3),
        ),
        _lead("use_moe", "Does the model have Mixture-of-Experts layers (MoE)?", ZERO, NO_LEAVES_IN_JSON),
        _setting(
            "deepspeed_moe_layer_cls_names",
            "Which MoE layers are there?",
            when=(ZERO, NO_LEAVES_IN_JSON, _yes("use_moe")),
            hinted=True,
        ),
        _setting(
            "deepspeed_multinode_launcher",
            "Which launcher starts the processes on the machines?",
            "standard",
            when=(ZERO, SEVERAL_MACHINES),
            choices=_launchers(),
            hinted=True,
        ),
        _setting(
            "deepspeed_hostfile",
            "What is the path of the hostfile, with a line such as worker-1 slots=4 for each machine?",
            kind=Kind.PATH,
            when=with_hostfile,
        ),
        _lead("use_exclusion_filter", "Do you want to leave out machines of the hostfile?", *with_hostfile),
        _setting(
            "deepspeed_exclusion_filter",
            "Which machines or slots are left out, such as worker-1@worker-2:0,2?",
            when=(*with_hostfile, _yes("use_exclusion_filter")),
        ),
        _lead("use_inclusion_filter", "Do you want to name those that are used?", *with_hostfile, NOTHING_LEFT_OUT),
        _setting(
            "deepspeed_inclusion_filter",
            "Which machines or slots are used, such as worker-1@worker-2:0,2?",
            when=(*with_hostfile, NOTHING_LEFT_OUT, _yes("use_inclusion_filter")),
        ),
    )


def _size(machine: Machine) -> tuple[Question, ...]:
    def all_gpus(answers: Answers) -> int:
        return max(1, machine.num_gpus) * int(answers.get("num_machines", 1))

    def two_each(answers: Answers) -> int:
        return 2 * int(answers.get("num_machines", 1))

    return (
        _setting("num_processes", "How many GPU(s), over all machines?", all_gpus, when=(ON_GPUS,)),
        _setting("num_processes", "How many CPU processes, over all machines?", two_each, when=(ON_CPUS,)),
        _setting("gpu_ids", "Which GPU(s) of this machine, such as 0,1?", "all", when=(NO_ZERO, WITH_GPU)),
        _setting("mixed_precision", "Do you want mixed precision?", "no", when=(NO_JSON_AT_ALL,), hinted=True),
    )


# --- the forms of questions -------------------------------------------------------------------------------------------


def _setting(
    key: str,
    text: str,
    default: Any = NEEDED,
    *,
    when: tuple[When, ...] = (),
    choices: tuple[Choice, ...] = (),
    kind: Kind | None = None,
    hinted: bool = False,
) -> Question:
    """A question about a setting of the run: kind and choices are its field's, and so is the hint, if wanted."""
    field = _field(key)
    options = choices or tuple(Choice(value, str(value)) for value in _literals(field))
    effect = effect_of(field)
    hint = effect.meaning if hinted and isinstance(effect, Acts) else ""
    return Question(key, text, kind or _kind(field), default, options, when, hint)


def _lead(key: str, text: str, *when: When) -> Question:
    """A question whose answer is no setting: it leads to others."""
    return Question(key, text, Kind.YES_NO, False, asked_when=when)


def _nvme_path(part: str, states: str) -> Question:
    device = f"offload_{part}_device"
    to_nvme = When(f"{device} nvme", lambda answers: answers.get(device) == "nvme")
    text = f"Which directory of the NVMe drive takes the {states}?"
    return _setting(f"offload_{part}_nvme_path", text, "/nvme", kind=Kind.PATH, when=(ZERO, NO_JSON, to_nvme))


def _field(key: str) -> FieldInfo:
    block = PluginConfig if key in PluginConfig.model_fields else RunConfig
    return block.model_fields[key]


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, None left aside."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(part for part in get_args(annotation) if part is not NoneType)
    return (annotation,)


def _literals(field: FieldInfo) -> tuple[Any, ...]:
    (only,) = _options(field.annotation)
    return get_args(only) if get_origin(only) is Literal else ()


def _kind(field: FieldInfo) -> Kind:
    if _literals(field):
        return Kind.CHOICE
    (only,) = _options(field.annotation)
    while hasattr(only, "__metadata__"):  # Annotated inside a union
        only = get_args(only)[0]
    return _KINDS.get(only, Kind.WORDS)


def _launchers() -> tuple[Choice, ...]:
    names = _literals(_field("deepspeed_multinode_launcher"))
    others = (Choice(name, name) for name in names if name != "standard")
    return (Choice("standard", "standard"), *others)


# --- when they are asked ----------------------------------------------------------------------------------------------


def _yes(key: str) -> When:
    return When(f"{key}: yes", lambda answers: answers.get(key) is True)


def _stage_at_least(stage: int) -> When:
    words = f"zero_stage {stage}" if stage == 3 else f"zero_stage {stage} or higher"
    return When(words, lambda answers: answers.get("zero_stage", -1) >= stage)


ONE_PROCESS = When("machine_type NO", lambda answers: answers.get("machine_type") == "NO")
SEVERAL_PROCESSES = When("machine_type MULTI_CPU or MULTI_GPU", lambda answers: answers.get("machine_type") != "NO")
SEVERAL_MACHINES = When("num_machines 2 or more", lambda answers: answers.get("num_machines", 1) > 1)
WITH_HOSTFILE = When(
    "deepspeed_multinode_launcher other than standard and slurm",
    lambda answers: answers.get("deepspeed_multinode_launcher", "standard") not in ("standard", "slurm"),
)
RESTARTS = When("max_restarts 1 or more", lambda answers: answers.get("max_restarts", 0) > 0)
NOTHING_LEFT_OUT = When("use_exclusion_filter: no", lambda answers: answers.get("use_exclusion_filter") is False)
APART = When("same_network: no", lambda answers: answers.get("same_network") is False)
ZERO = _yes("use_deepspeed")
NO_ZERO = When("use_deepspeed: no", lambda answers: answers.get("use_deepspeed") is False)
JSON = _yes("use_deepspeed_config_file")
NO_JSON = When("use_deepspeed_config_file: no", lambda answers: answers.get("use_deepspeed_config_file") is False)
NO_JSON_AT_ALL = When("no deepspeed_config_file", lambda answers: "deepspeed_config_file" not in answers)
STAGE_1, STAGE_3 = _stage_at_least(1), _stage_at_least(3)
MAYBE_STAGE_3 = When(
    "stage 3",
    lambda answers: answers.get("zero_stage", json_stage(answers.get("deepspeed_config_file"))) in (3, "auto"),
)
NO_LEAVES_IN_JSON = When(
    "a JSON that leaves leaf_module.classes open",
    lambda answers: json_leaves_open(answers.get("deepspeed_config_file"), "deepspeed_moe_layer_cls_names"),
)
ON_GPUS = When("machine_type MULTI_GPU", lambda answers: answers.get("machine_type") == "MULTI_GPU")
ON_CPUS = When("machine_type MULTI_CPU", lambda answers: answers.get("machine_type") == "MULTI_CPU")
WITH_GPU = When("a GPU", lambda answers: answers.get("machine_type") == "MULTI_GPU" or answers.get("use_cpu") is False)

_STAGES = (
    Choice(0, "0: nothing is sharded"),
    Choice(1, "1: the optimizer state"),
    Choice(2, "2: also the gradients"),
    Choice(3, "3: also the parameters"),
)
