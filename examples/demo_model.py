"""The model of ``train_gpt.py``: which architecture it trains, and how the trained model writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

from shardwise.errors import ConfigError

DEFAULT_SEQUENCE_LENGTH = 128
SMALLEST_VOCABULARY = 257  # all bytes, so that any text can be written, and the token that ends a text
# GPT-2 shapes by name; for a text of a few megabytes, a vocabulary below GPT-2's suits the small ones.
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128, "vocab_size": 512},
    "small": {"n_layer": 6, "n_embd": 256, "n_head": 4, "n_positions": 128, "vocab_size": 4096},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # a short run hardly reads a text twice


def read_model_config(model: str, sequence_length: int | None) -> tuple[PreTrainedConfig, int]:
    """The architecture of a preset or of a folder's ``config.json``, and the sequence length to train it with.

    A preset's context grows with the sequences that are asked for; an architecture of the user's own is left as it is.
    """
    if model in PRESETS:
        shape = dict(PRESETS[model])
        shape["n_positions"] = max(shape["n_positions"], sequence_length or 0)
        config: PreTrainedConfig = GPT2Config(**shape, **NO_DROPOUT, bos_token_id=0, eos_token_id=0)
    else:
        config = _read_folder(Path(model))
    context = getattr(config, "max_position_embeddings", None)  # absent where positions have no bound
    if sequence_length is None:
        sequence_length = min(DEFAULT_SEQUENCE_LENGTH, context or DEFAULT_SEQUENCE_LENGTH)
    if context is not None and sequence_length > context:
        raise ConfigError(f"--sequence-length is {sequence_length}, but the model in {model} reads {context} at most.")
    config.use_cache = False  # of keys and values: training has no use for it
    return config, sequence_length


def _read_folder(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {folder} is neither {', '.join(PRESETS)} nor a folder with a config.json. Give one of these."
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {folder}: its config.json cannot be read: {error}") from error
    vocabulary_size = getattr(config, "vocab_size", 0)
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"--model {folder} has a vocab_size of {vocabulary_size}, expected at least {SMALLEST_VOCABULARY}: "
            "a byte-level tokenizer has an entry for each byte."
        )
    return config


def build_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The architecture with random weights, the same on every rank."""
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError(f"--model: {config.model_type} is not a causal language model of transformers.") from error
    return model


@torch.no_grad()
def write_on(
    next_logits: Callable[[torch.Tensor], torch.Tensor],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_tokens: int,
    context: int,
    temperature: float,
    seed: int,
) -> str:
    """What the model writes after ``prompt``, drawn with a seed of its own: the same on every rank.

    ``next_logits`` maps ids [1, T], T <= context, to logits [V]. It is called ``num_tokens`` times whatever is drawn,
    because each call may be a collective.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    prompt_length = len(ids)
    for _ in range(num_tokens):
        logits = next_logits(torch.tensor([ids[-context:]])).float().cpu()
        # Entries of the model beyond the tokenizer's have never been seen.
        probabilities = torch.softmax(logits[: tokenizer.get_vocab_size()] / temperature, dim=0)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    written: str = tokenizer.decode(ids[prompt_length:])
    return written
