"""What makes weights a directory that ``from_pretrained`` reads: the settings beside them, in the weights' dtype."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from shardwise.checkpoint.manifest import replace_file
from shardwise.errors import CheckpointError, ConfigError

CONFIG = "config.json"
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""What lies beside weights: settings, tokenizers, chat templates."""


@runtime_checkable
class Pretrained(Protocol):
    """A model of transformers, as far as it is needed here."""

    config: Any

    def can_generate(self) -> bool:
        """Whether its generation settings mean anything."""


@runtime_checkable
class Generating(Pretrained, Protocol):
    """One that generates."""

    generation_config: Any


def pretrained(model: nn.Module) -> Pretrained:
    """The model, if it is one of transformers.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(model, Pretrained):
        raise ConfigError(
            f"export_pretrained() got a {type(model).__name__}, which has no config of transformers. Expected a "
            "PreTrainedModel; write_weights() writes the weights of any model."
        )
    return model


def write_settings(model: nn.Module, dtype: torch.dtype, directory: Path) -> None:
    """Write a model's config and generation settings; call it on one process.

    Args:
        model: of transformers.
        dtype: that its weights are written in.
        directory: where they go.
    """
    found = pretrained(model)
    config = copy.deepcopy(found.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(directory)
    if found.can_generate() and isinstance(found, Generating):
        found.generation_config.save_pretrained(directory)


def check_settings(like: Path, output: Path) -> dict[str, Any]:
    """The config of ``like``, before anything is written to ``output``.

    Raises:
        CheckpointError: it has no config, or the output is one file.
    """
    if output.suffix in (".bin", ".pt", ".pth", ".safetensors") and not output.is_dir():
        raise CheckpointError(f"{output} is one file: settings go beside weights in a directory. Name one.")
    try:
        config = json.loads((like / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{like} has no {CONFIG} that can be read ({error}). Expected a directory of save_pretrained."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{like / CONFIG} is no JSON object. Expected a directory of save_pretrained.")
    return config


def copy_settings(like: Path, dtype: str, directory: Path) -> None:
    """Copy what lies beside the weights of another directory; the config gets the new weights' dtype.

    Args:
        like: a directory that ``save_pretrained`` has written.
        dtype: fp32, fp16 or bf16, that the new weights are in.
        directory: of the new weights.

    Raises:
        CheckpointError: it has no config.
    """
    config = check_settings(like, directory)
    paths = sorted({path for pattern in _BESIDE for path in like.glob(pattern) if path.is_file()})
    names = [path.name for path in paths if path.name != CONFIG and not path.name.endswith(".index.json")]
    for name in names:
        shutil.copyfile(like / name, directory / name)
    text = json.dumps(_with_dtype(config, _DTYPES[dtype]), indent=2) + "\n"
    replace_file(directory / CONFIG, text.encode())


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Also in the configs of its parts. Its name was ``torch_dtype`` before it was ``dtype``."""
    named = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {
        **{key: _with_dtype(value, dtype) if _is_config(value) else value for key, value in config.items()},
        **dict.fromkeys(named, dtype),
    }


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value
