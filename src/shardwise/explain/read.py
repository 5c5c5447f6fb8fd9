"""From the words of the command line to what was asked for: flags, a run's YAML, a DeepSpeed JSON, in any order."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.config.catalog import names_in
from shardwise.config.messages import shown
from shardwise.config.run.file import file_mentions, flag_mentions, read_run_file
from shardwise.config.run.gather import gather
from shardwise.config.run.said import Asked, Origin, Said
from shardwise.config.run.schema import RunConfig
from shardwise.config.run.yaml_text import read_scalar
from shardwise.config.schema import EngineConfig
from shardwise.config.source import Source, read_source
from shardwise.errors import ConfigError

_WORDS_OF_A_SWITCH = ("true", "false", "yes", "no", "1", "0")
_SWITCHES = ("use_cpu", "debug", "same_network", "enable_cpu_affinity")  # they may stand without a value
_SHORT_FORMS: Mapping[str, tuple[str, Any]] = {  # flags of `launch` that are another way to say a setting
    "cpu": ("use_cpu", True),
    "use_deepspeed": ("distributed_type", "DEEPSPEED"),
    "multi_gpu": ("distributed_type", "MULTI_GPU"),
}


def split(words: Sequence[str]) -> tuple[dict[str, Any], list[Path]]:
    """Tell flags (``--zero_stage 3``, ``--zero-stage=3``) from files; flags by the name of the setting."""
    flags: dict[str, Any] = {}
    files: list[Path] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            files.append(Path(word))
            continue
        if not word.startswith("--"):
            raise ConfigError(f"{word} is no option of explain. See `shardwise explain --help`.")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if equals:
            flags[name] = read_scalar(value)
        elif name in _SHORT_FORMS:
            setting, meant = _SHORT_FORMS[name]
            flags[setting] = meant
        elif name in _SWITCHES and not (rest and rest[0].lower() in _WORDS_OF_A_SWITCH):
            flags[name] = True
        elif rest:
            flags[name] = read_scalar(rest.pop(0))
        else:
            raise ConfigError(f"{word} stands last and has no value. Write {word}=VALUE.")
    return flags, files


def read(files: Sequence[Path], flags: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[Asked, tuple[str, ...]]:
    """What the named files and flags ask for, and notes for the screen; without a file, the default place is read.

    A DeepSpeed JSON named alone is explained alone: the default YAML is another run's.
    """
    run_file, engine_file = _sorted_by_kind(files)
    if run_file is None and engine_file is None:
        return gather(flags, None, environ)
    if engine_file is None:
        return gather(flags, run_file, environ)
    mentions = file_mentions(read_run_file(run_file)) if run_file is not None else {}
    asked = Asked({name: (said,) for name, said in mentions.items()}, None, str(run_file) if run_file else None)
    named = {"deepspeed_config_file": Said(str(engine_file), Origin.FLAG, "named here")}
    asked = asked.stronger(flag_mentions(flags)).stronger(named)
    return Asked(asked.mentions, read_source(engine_file), asked.file), ()


def _sorted_by_kind(files: Sequence[Path]) -> tuple[Path | None, Path | None]:
    run_files = [file for file in files if _is_run_file(file)]
    engine_files = [file for file in files if file not in run_files]
    for found, kind in ((run_files, "runs (YAML)"), (engine_files, "DeepSpeed JSON")):
        if len(found) > 1:
            raise ConfigError(f"{len(found)} configs of {kind} were named: {', '.join(map(str, found))}. Name one.")
    return (run_files[0] if run_files else None), (engine_files[0] if engine_files else None)


def _is_run_file(file: Path) -> bool:
    """YAML is a run's; JSON may be either, so its keys decide."""
    if file.suffix in (".yaml", ".yml"):
        return True
    try:
        source = read_source(file)
    except ConfigError:
        if file.is_file() and file.suffix != ".json":
            return True  # YAML under another name: the reader of YAML says what is wrong with it
        raise
    keys = _keys(source)
    return len(keys & names_in(RunConfig).keys()) > len(keys & names_in(EngineConfig).keys())


def _keys(source: Source) -> set[str]:
    if not isinstance(source.data, Mapping):
        raise ConfigError(f"{source.name} holds {shown(source.data)}, expected a block {{...}} of keys.")
    return {key for key in source.data if isinstance(key, str)}
