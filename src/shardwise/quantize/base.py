"""What quantised values look like where they travel or rest, and how far they are from the values that they stand for.

A row of ``n`` values, ``n`` a multiple of the block, becomes ``wire_bytes(n)`` bytes::

    codes, n * bits / 8 bytes | scales, one fp32 a block

A block's scale is its largest magnitude over the format's largest code (symmetric, zero stays zero, both ends are
exact), so its values lie evenly around zero and nothing is clipped. Two 4-bit codes share a byte: byte j of a block of
B values holds value j in its low half and value j + B/2 in its high half.

A block that holds a NaN or an infinity decodes to values of which none is finite: what was wrong stays visible, and
blocks beside it are as they were.

The formats are those of blockwise quantisation as ZeRO++ uses it (Wang et al., "ZeRO++: Extremely Efficient Collective
Communication for Giant Model Training" (2023), sections 3.1 and 3.3); fp8 is OCP's e4m3 under a scale a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from shardwise.layout import ALIGNMENT, MAX_BLOCK

SCALE_BYTES = 4
SMALLEST_SCALE = 2.0**-126
"""The smallest normal fp32: below it a scale would have no inverse."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a value in few bits."""

    name: str
    bits: int
    largest_code: float
    worst_error: float
    """Distance of a decoded value from the true one, over the largest magnitude of its block."""


FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        Format("int8", 8, 127.0, 1 / 254),
        Format("int4", 4, 7.0, 1 / 14),
        # Codes near 448 are 32 apart; smaller values are nearer: within 1/16 of themselves.
        Format("fp8", 8, 448.0, 1 / 28),
    )
}
"""By name."""


class Quantizer(ABC):
    """Encodes and decodes rows of values in one format.

    Args:
        format: one of `FORMATS`.
        block: values that share a scale, a multiple of `shardwise.layout.ALIGNMENT` up to `MAX_BLOCK`.
    """

    def __init__(self, format: Format, block: int) -> None:
        assert block % ALIGNMENT == 0 and 0 < block <= MAX_BLOCK
        self.format = format
        self.block = block

    def code_bytes(self, numel: int) -> int:
        """Bytes of the codes of a row of ``numel`` values."""
        assert numel % self.block == 0
        return numel * self.format.bits // 8

    def wire_bytes(self, numel: int) -> int:
        """Bytes of a row of ``numel`` values, scales included."""
        return self.code_bytes(numel) + numel // self.block * SCALE_BYTES

    def error_bound(self, largest: float) -> float:
        """What a value of a block with ``largest`` magnitude differs by at most once it is decoded to fp32.

        Half a step; a millionth more for the rounding of scale and product; and what is lost where values are so small
        that no step is small enough.
        """
        return largest * self.format.worst_error * (1 + 1e-6) + SMALLEST_SCALE

    @abstractmethod
    def encode(self, values: torch.Tensor, wire: torch.Tensor) -> None:
        """Write ``values`` [rows, n], of any floating dtype, to ``wire`` [rows, wire_bytes(n)] of uint8.

        Both are contiguous.
        """

    @abstractmethod
    def decode(self, wire: torch.Tensor, values: torch.Tensor, accumulate: bool = False) -> None:
        """``values`` [rows, n] = (or += if ``accumulate``) what ``wire`` [rows, wire_bytes(n)] says.

        Rows need not be neighbours, their elements must. The product of code and scale is fp32, and is rounded once
        where ``values`` is narrower.
        """
