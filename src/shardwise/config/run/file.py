"""From a run's YAML, or from flags, to checked mentions of settings."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

from shardwise.config.catalog import names_in
from shardwise.config.load import Checked, check, given_keys
from shardwise.config.messages import Fault, Path, nearest
from shardwise.config.run.said import Origin, Said
from shardwise.config.run.schema import PluginConfig, RunConfig
from shardwise.config.run.yaml_text import parse_yaml
from shardwise.config.source import Source, parse
from shardwise.errors import ConfigError

SECTION = "deepspeed_config"
DISTRIBUTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED")
_ELSEWHERE = {
    "FSDP": "distributed_type: DEEPSPEED with zero_stage: 3 shards the same states",
    "MEGATRON_LM": "there is no tensor or pipeline parallelism; distributed_type: DEEPSPEED shards model states",
    "XLA": "there is no TPU support",
    "TPU": "there is no TPU support",
}


def read_run_file(path: FilePath) -> Checked[RunConfig]:
    """Read and check a YAML, or the same in JSON where the name ends in ``.json``.

    Raises ConfigError with all faults of the file, each with its line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(
            f"The config file {path} cannot be read: {error.strerror}. Give --config_file a file."
        ) from None
    source = parse(text, str(path)) if path.suffix == ".json" else parse_yaml(text, str(path))
    return checked_run(source)


def checked_run(source: Source) -> Checked[RunConfig]:
    """Check a run's settings; ConfigError with all faults."""
    checked = check_run(source)
    checked.raise_faults([*checked.faults, *checked.refused])
    return checked


def check_run(source: Source) -> Checked[RunConfig]:
    """Check a run's settings; the faults are the caller's to judge."""
    if source.data is None:
        source.data = {}  # an empty file
    return check(source, RunConfig, _broken_rules)


def mentions_of(checked: Checked[RunConfig], origin: Origin, place_of: Callable[[Path], str]) -> dict[str, Said]:
    """What was said, by the name of the setting; `place_of` a path as written says where."""
    mentions = {}
    for path, value, _ in given_keys(checked.block):
        mentions[str(path[-1])] = Said(value, origin, place_of(checked.findings.path_as_written(path)))
    old = mentions.pop("fp16", None)
    if old is not None and old.value and "mixed_precision" not in mentions:
        mentions["mixed_precision"] = Said("fp16", origin, old.place)
    return mentions


def file_mentions(checked: Checked[RunConfig]) -> dict[str, Said]:
    """What a file says, with its lines."""
    name, lines = checked.source.name, checked.source.lines

    def place_of(path: Path) -> str:
        return f"{name}, line {lines[path]}" if path in lines else name

    return mentions_of(checked, Origin.FILE, place_of)


def flag_mentions(flags: Mapping[str, Any]) -> dict[str, Said]:
    """What flags say; `flags` holds each given one by the name of its setting, as a YAML would hold it.

    Raises ConfigError with all faults, in the spelling of the command line.
    """
    return _mentions("The command line", flags, Origin.FLAG, lambda name: f"--{name}")


def code_mentions(owner: str, arguments: Mapping[str, Any]) -> dict[str, Said]:
    """What a script says by the arguments of `owner`, such as DeepSpeedPlugin; ConfigError with all faults."""
    return _mentions(owner, arguments, Origin.CODE, lambda name: f"{owner}({name}=...)")


def _mentions(
    source: str, settings: Mapping[str, Any], origin: Origin, place_of: Callable[[str], str]
) -> dict[str, Said]:
    section = {name: value for name, value in settings.items() if name in PluginConfig.model_fields}
    data = {name: value for name, value in settings.items() if name not in section}
    checked = check(Source(source, data | ({SECTION: section} if section else {})), RunConfig, _broken_rules)
    faults = [*checked.faults, *checked.refused]
    if faults:
        rows = (f"\n  {place_of(_setting_at(fault.path))}: {fault.text}" for fault in faults)
        raise ConfigError(f"{source} has {len(faults)} fault{'s' * (len(faults) > 1)}:{''.join(rows)}")
    return mentions_of(checked, origin, lambda path: place_of(str(path[-1])))


def _setting_at(path: Path) -> str:
    """The setting that a path leads to, or into."""
    return str(path[1] if path[0] == SECTION and path[1:] else path[0])


def setting_names() -> Iterator[str]:
    """Every setting of a run, in the order of the schema."""
    for name in RunConfig.model_fields:
        if name == SECTION:
            yield from names_in(PluginConfig)
        elif name != "fp16":
            yield name


def default_of(name: str) -> Any:
    """The value of a setting that nobody mentions."""
    block = PluginConfig if name in PluginConfig.model_fields else RunConfig
    return block.model_fields[name].get_default(call_default_factory=True, validated_data={})


def _broken_rules(run: RunConfig) -> Iterable[Fault]:
    kind = run.distributed_type
    if kind is not None and kind not in DISTRIBUTED_TYPES:
        reason = _ELSEWHERE.get(kind)
        meant = nearest(kind, DISTRIBUTED_TYPES)
        hint = f"it is not supported: {reason}" if reason else f'did you mean "{meant}"?' if meant else ""
        yield Fault(
            ("distributed_type",), f'found "{kind}", expected one of {", ".join(DISTRIBUTED_TYPES)}. {hint}'.rstrip()
        )
    section = run.deepspeed_config.model_fields_set
    if kind in DISTRIBUTED_TYPES and kind != "DEEPSPEED" and section:
        yield Fault(
            (SECTION,),
            f"holds {', '.join(sorted(section))}, which distributed_type: {kind} leaves unread. "
            "Write distributed_type: DEEPSPEED, or remove them.",
        )
    if run.fp16 and "mixed_precision" in run.model_fields_set and run.mixed_precision != "fp16":
        yield Fault(
            ("fp16",), f'found true, and mixed_precision is "{run.mixed_precision}"; expected one of them. Remove fp16.'
        )
