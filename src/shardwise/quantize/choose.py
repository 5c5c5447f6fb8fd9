"""Names of the configuration become a quantiser, once."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from shardwise.errors import ConfigError
from shardwise.layout import ALIGNMENT, MAX_BLOCK
from shardwise.quantize.base import FORMATS, Quantizer
from shardwise.quantize.expressions import Expressions


def build_quantizer(format: str, block: int, device: torch.device | str = "cpu") -> Quantizer:
    """The quantiser of a format.

    Args:
        format: "int8", "int4" or "fp8".
        block: values that share a scale.
        device: where the values are. No bit depends on it.

    Raises:
        ConfigError: the format is unknown, or the block does not fit.
    """
    if format not in FORMATS:
        raise ConfigError(f"quantisation format {format!r} is unknown. Expected one of {', '.join(FORMATS)}.")
    if block % ALIGNMENT or not 0 < block <= MAX_BLOCK:
        near = min(max(round(block / ALIGNMENT), 1), MAX_BLOCK // ALIGNMENT) * ALIGNMENT
        raise ConfigError(
            f"a quantisation block of {block} elements does not fit: expected a multiple of {ALIGNMENT} from "
            f"{ALIGNMENT} to {MAX_BLOCK}, such as {near}."
        )
    if torch.device(device).type == "cuda" and find_spec("triton") is not None:
        from shardwise.quantize.kernels import Kernels  # Triton is imported where it is used

        return Kernels(FORMATS[format], block)
    return Expressions(FORMATS[format], block)
