"""The folder that ``train_gpt.py`` leaves: weights, configuration and tokenizer as ``from_pretrained`` reads them."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from shardwise.errors import ConfigError

OWN_MARK = "train_gpt.json"  # what was run and what came of it; the file by which a result of the script is known


def check_replaceable(folder: Path) -> None:
    """ConfigError unless a result may stand at ``folder``: it replaces a former result and nothing else."""
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / OWN_MARK).is_file():
            raise ConfigError(
                f"--output-dir {folder} holds files that this script has not written (no {OWN_MARK} among them). "
                "Choose another folder, or empty it."
            )
    elif folder.exists() or folder.is_symlink():
        raise ConfigError(f"--output-dir {folder} is not a folder. Choose another.")
    standing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise ConfigError(f"--output-dir {folder} cannot be made: {standing} is not a folder that you may write to.")


def save_result(
    folder: Path,
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    summary: dict[str, Any],
) -> None:
    """Write everything beside ``folder``, then put it in place by renaming: there is never half a result.

    ``state`` holds whole tensors on the CPU by name. Of tied tensors only the first name is written, as
    ``transformers`` does; it ties them again when it reads.
    """
    folder = folder.absolute()
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in state]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as workplace:
        draft, former = Path(workplace) / "new", Path(workplace) / "old"
        draft.mkdir()
        save_file({name: state[name].contiguous() for name in names}, draft / "model.safetensors", {"format": "pt"})
        config = copy.deepcopy(model.config)
        config.use_cache = True  # who reads the result will want text from it
        config.architectures = [type(model).__name__]
        config.save_pretrained(draft)
        tokenizer.save(str(draft / "tokenizer.json"))
        (draft / OWN_MARK).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(former)
        try:
            draft.rename(folder)
        except OSError:
            if former.exists():
                former.rename(folder)  # what stood there stays
            raise
