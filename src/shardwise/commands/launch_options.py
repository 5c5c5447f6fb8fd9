"""The options of `shardwise launch` that are settings of a run: made from the schema, which says what each one does."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.markup import escape

from shardwise.commands.machine_options import PANEL, parameters
from shardwise.config.catalog import effect_of
from shardwise.config.effects import Acts
from shardwise.config.run.schema import PluginConfig, RunConfig

PROCESSES, ZERO, MACHINES = "Processes", "ZeRO", PANEL

_MULTINODE = (
    "deepspeed_multinode_launcher",
    "deepspeed_hostfile",
    "deepspeed_exclusion_filter",
    "deepspeed_inclusion_filter",
)
PANELS: Mapping[str, tuple[str, ...]] = {
    PROCESSES: (
        "num_processes",
        "gpu_ids",
        "use_cpu",
        "mixed_precision",
        "max_restarts",
        "debug",
        "enable_cpu_affinity",
        "main_training_function",
    ),
    ZERO: tuple(name for name in PluginConfig.model_fields if name not in _MULTINODE),
    MACHINES: (
        "num_machines",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
        "same_network",
        "rdzv_backend",
        *_MULTINODE,
        "monitor_interval",
        "health_timeout",
    ),
}
_NARROW = 8  # columns
_OTHER_NAMES = {"num_processes": ("-n",), "use_cpu": ("--cpu",)}
# As in Accelerate these take no value: given, they say yes.
_WITHOUT_VALUE = frozenset({"use_cpu", "debug", "enable_cpu_affinity", "same_network"})
_CHOSEN_AT_LAUNCH = {"num_processes": "one per GPU; without a GPU 2, or 1 on a single core", "gpu_ids": "all"}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, which takes settings by name, as typer shall see it: with an option for each of them."""

    @functools.wraps(command)
    def called(**options: Any) -> None:
        command(**options)

    own = inspect.signature(command, eval_str=True)
    named = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in own.parameters.values()
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    called.__signature__ = own.replace(parameters=[*named, *_parameters(), *parameters()])  # type: ignore[attr-defined]
    return called


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, as a YAML would hold them."""
    from shardwise.config.run.yaml_text import read_scalar  # it loads the YAML parser, which --help does not need

    return {
        name: value if isinstance(value, bool) or _keeps_its_text(name, value) else read_scalar(value)
        for name, value in options.items()
        if value is not None and value is not False
    }


def _parameters() -> Iterator[inspect.Parameter]:
    for panel, names in PANELS.items():
        for name in names:
            bare = name in _WITHOUT_VALUE
            option = typer.Option(
                f"--{name}",
                *_OTHER_NAMES.get(name, ()),
                help=escape(_meaning(name)),
                metavar=None if bare else _metavar(_field(name).annotation),
                rich_help_panel=panel,
                show_default=False if bare else _shown_default(name),
            )
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if bare else None,
                annotation=Annotated[bool, option] if bare else Annotated[str | None, option],
            )


def _field(name: str) -> Any:
    return (PluginConfig if name in PluginConfig.model_fields else RunConfig).model_fields[name]


def _meaning(name: str) -> str:
    effect = effect_of(_field(name))
    text = effect.meaning if isinstance(effect, Acts) else f"no effect: {effect.reason}"
    words = _choices(_field(name).annotation)
    if len("|".join(words)) > _NARROW:
        text += f" (one of {', '.join(words)})"
    return f"{text[0].upper()}{text[1:]}."


def _shown_default(name: str) -> str | bool:
    value = _field(name).get_default(call_default_factory=True, validated_data={})
    if name in _CHOSEN_AT_LAUNCH:
        return _CHOSEN_AT_LAUNCH[name]
    if value is None or value == ():
        return False
    return str(value).lower() if isinstance(value, bool) else str(value)


def _metavar(annotation: Any) -> str:
    """What a value looks like, in a word; a wide one would leave no room for names on a narrow screen."""
    kind = _kind(annotation)
    if get_origin(kind) is Literal:
        words = "|".join(_choices(kind))
        return words if len(words) <= _NARROW else "WORD"
    return {bool: "yes|no", int: "NUMBER", float: "NUMBER", str: "TEXT"}.get(kind, "NAMES")


def _choices(annotation: Any) -> tuple[str, ...]:
    kind = _kind(annotation)
    return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def _kind(annotation: Any) -> Any:
    """The type inside `Annotated` and `X | None`."""
    if get_origin(annotation) in (None, Literal, tuple):
        return annotation
    return _kind(get_args(annotation)[0])


def _keeps_its_text(name: str, value: str) -> bool:
    """Whether a value is text whatever it looks like: a path may be called 1; but null is nothing everywhere."""
    kind = _kind(_field(name).annotation)
    return (kind is str or get_origin(kind) is tuple) and value != "null"
