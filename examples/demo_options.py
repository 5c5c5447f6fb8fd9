"""The options of ``train_gpt.py``: read, checked as a whole before anything starts, and joined with a user's JSON."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from demo_model import PRESETS
from demo_result import check_replaceable

from shardwise.config.messages import report
from shardwise.config.source import read_source
from shardwise.errors import ConfigError

EXAMPLES = """examples:
  shardwise launch examples/train_gpt.py
  shardwise launch --num_processes 4 examples/train_gpt.py --zero-stage 2 --steps 100
  shardwise launch examples/train_gpt.py --model gpt2 --train-file book.txt --config zero3.json
"""

# An option and the place in the JSON that says the same.
SAME_IN_CONFIG = {
    "zero_stage": ("zero_optimization", "stage"),
    "batch_size": ("train_micro_batch_size_per_gpu",),
    "learning_rate": ("optimizer", "params", "lr"),
    "bf16": ("bf16", "enabled"),
    "fp16": ("fp16", "enabled"),
}


@dataclass(frozen=True)
class Options:
    """What the user asked for; None where the script is free to choose."""

    model: str
    train_file: Path | None
    zero_stage: int | None
    config: Path | None
    steps: int
    batch_size: int | None
    sequence_length: int | None
    learning_rate: float | None
    bf16: bool
    fp16: bool
    output_dir: Path
    cache_dir: Path
    seed: int

    @property
    def own_tokenizer(self) -> Path | None:
        """The tokenizer of a --model folder that has one; it is used instead of a trained one."""
        file = Path(self.model) / "tokenizer.json"
        return file if self.model not in PRESETS and file.is_file() else None


def is_main_process() -> bool:
    """Whether this is the process that writes, as the launcher said; right before there is a process group, too."""
    return os.environ.get("RANK", "0") == "0"


class _Parser(argparse.ArgumentParser):
    """A parser whose faults are ConfigError, so that they take the one way that all mistakes take."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See --help.")

    def print_help(self, file: Any = None) -> None:
        if is_main_process():
            super().print_help(file)


def read_options(arguments: list[str]) -> Options:
    """The checked options; ConfigError names the option that cannot work."""
    parser = _Parser(
        prog="train_gpt.py",
        description="Train a GPT-2 from random weights on real text under ZeRO, then save it and let it write.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model, run, where = (parser.add_argument_group(title) for title in ("model and text", "training", "folders"))
    model.add_argument("--model", default="small", help="tiny, small (default), gpt2, or a folder with config.json")
    model.add_argument("--train-file", type=Path, help="your own UTF-8 text (default: Python's standard library)")
    model.add_argument("--sequence-length", type=int, help="tokens (default: 128, or the model's context if less)")
    run.add_argument("--zero-stage", type=int, help="0, 1, 2 or 3 (default: 3)")
    run.add_argument("--config", type=Path, help="a DeepSpeed JSON; what it leaves out or sets to auto is filled in")
    run.add_argument("--steps", type=int, default=200, help="optimizer steps (default: 200)")
    run.add_argument("--batch-size", type=int, help="sequences a rank and micro-batch (default: 8)")
    run.add_argument("--learning-rate", type=float, help="the peak, after warm-up (default: 1e-3)")
    run.add_argument("--bf16", action="store_true", help="train in bfloat16 (default: where a GPU has it)")
    run.add_argument("--fp16", action="store_true", help="train in float16 with a loss scale")
    run.add_argument("--seed", type=int, default=0, help="of weights, order of the text and sample (default: 0)")
    where.add_argument("--output-dir", type=Path, default=Path("outputs/train_gpt"), help="default: outputs/train_gpt")
    where.add_argument("--cache-dir", type=Path, default=Path("~/.cache/shardwise"), help="default: ~/.cache/shardwise")
    options = Options(**vars(parser.parse_args(arguments)))
    _check(options)
    return options


def _check(options: Options) -> None:
    if options.zero_stage not in (None, 0, 1, 2, 3):
        raise ConfigError(f"--zero-stage is {options.zero_stage}, expected 0, 1, 2 or 3.")
    # The loss of a sequence is about the tokens after its first.
    for name, bound in (("steps", 0), ("batch_size", 0), ("sequence_length", 1), ("learning_rate", 0)):
        value = vars(options)[name]
        if value is not None and not value > bound:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected more than {bound}.")
    if options.bf16 and options.fp16:
        raise ConfigError("Both --bf16 and --fp16 are given, but a run computes in one of them. Choose one.")
    if options.train_file is not None and not options.train_file.is_file():
        raise ConfigError(f"--train-file {options.train_file} is not a file. Give the path of a UTF-8 text.")
    check_replaceable(options.output_dir)


def join_config(defaults: dict[str, Any], options: Options) -> dict[str, Any]:
    """The JSON of ``--config``, with ``defaults`` where it is silent or says "auto"; the defaults alone without one.

    The file has the last word: an option of the command line that contradicts it is a ConfigError.
    """
    if options.config is None:
        return defaults
    own = _read_json(options.config)
    config = _fitting(defaults, own) | _without_auto(own, _answers(defaults))
    for option, path in SAME_IN_CONFIG.items():
        asked = vars(options)[option]
        if asked is not None and asked is not False:
            _put(config, path, asked, f"--{option.replace('_', '-')} {asked} contradicts {options.config}")
    return config


def _fitting(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The defaults that go with a file: none that would complete, or collide with, a choice which the file has made."""
    pointless = {key for key in own if own[key] != "auto"}
    if "optimizer" in own:  # a schedule is made for its optimizer
        pointless.add("scheduler")
    if own.get("train_batch_size", "auto") != "auto":  # the sequences a rank follow from it
        pointless.add("train_micro_batch_size_per_gpu")
    if own.keys() & {"bf16", "bfloat16", "fp16"}:
        pointless |= {"bf16", "fp16"}
    return {key: value for key, value in defaults.items() if key not in pointless}


def _answers(defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults, and what a schedule of another type may leave to "auto" besides."""
    learning_rate = defaults["optimizer"]["params"]["lr"]
    schedule = {**defaults["scheduler"]["params"], "warmup_min_lr": 0.0, "warmup_max_lr": learning_rate}
    return defaults | {"scheduler": {"params": schedule}}


def _without_auto(own: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any]:
    """``own`` with "auto" replaced wherever ``answers`` has the same key; what is left is for the engine to judge."""
    result = {}
    for key, value in own.items():
        answer = answers.get(key)
        if isinstance(value, dict):
            result[key] = _without_auto(value, answer if isinstance(answer, dict) else {})
        else:
            result[key] = answer if value == "auto" and answer is not None else value
    return result


def _put(config: dict[str, Any], path: tuple[str, ...], asked: Any, contradiction: str) -> None:
    """Set the key at ``path`` to what was asked for, unless the file has said something else there."""
    *blocks, key = path
    for depth, block in enumerate(blocks, start=1):
        inner = config.setdefault(block, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{contradiction}, where {'.'.join(path[:depth])} is {inner}. Leave one of them out.")
        config = inner
    if config.setdefault(key, asked) != asked:
        raise ConfigError(f"{contradiction}, where {'.'.join(path)} is {config[key]}. Leave one of them out.")


def _read_json(file: Path) -> dict[str, Any]:
    source = read_source(file)
    if not isinstance(source.data, dict):
        raise ConfigError(f"--config {file} holds a {type(source.data).__name__}, expected a block {{...}} of keys.")
    if source.faults:
        raise ConfigError(report(source.name, source.faults, source.lines))
    return source.data
