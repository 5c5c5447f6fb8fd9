"""What quantised values look like where they travel or rest, and how far they are from the values that they stand for.

A row of ``n`` values, ``n`` a multiple of the block, becomes ``wire_bytes(n)`` bytes::

    codes, n * bits / 8 bytes | scales, one fp32 a block

A block's scale is its largest magnitude over the format's largest code (symmetric: zero stays zero), so its values lie
evenly around zero and nothing is clipped. The value of largest magnitude comes back as it was but for the last bit of
an fp32, which is the scale's own rounding: exactly, in 16-bit dtypes (unless it is so small that `SMALLEST_SCALE` is
too coarse for it). Two 4-bit codes share a byte: byte j of a block of B values holds value j in its low half and value
j + B/2 in its high half, each in two's complement.

A block that holds a NaN or an infinity decodes to values of which none is finite: what was wrong stays visible, and
blocks beside it are as they were. Its codes are whatever the processor makes of a NaN; the bits of every other block
are the same on all devices, however the work is cut.

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
LARGEST_VALUE = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a value in few bits."""

    name: str
    bits: int
    largest_code: float
    worst_error: float
    """Distance of a decoded value from the true one, over the largest magnitude of its block."""

    @property
    def scale_of_largest(self) -> float:
        """Of a block that reaches `LARGEST_VALUE`: a bit less than by the rule, which may decode to infinity."""
        return LARGEST_VALUE / self.largest_code * (1 - 2**-23)


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

    def error_bound(self, largest: float, dtype: torch.dtype = torch.float32) -> float:
        """What a finite value of a block with ``largest`` magnitude differs by at most once it is decoded to ``dtype``.

        The sum of: half a step between codes; the roundings to fp32 of scale, inverse and two products (2^-24 of the
        largest magnitude each, and one more for their products); what is lost where values are so small that no step is
        small enough; and for a narrower ``dtype`` that dtype's own rounding. Infinite where ``dtype`` may overflow.
        """
        in_fp32 = largest * (self.format.worst_error + 5 * 2**-24) + SMALLEST_SCALE
        if dtype is torch.float32:
            return in_fp32
        limits = torch.finfo(dtype)
        if largest > limits.max:
            return float("inf")
        return in_fp32 + (largest + in_fp32) * limits.eps / 2 + limits.smallest_normal * limits.eps / 2

    @abstractmethod
    def encode(self, values: torch.Tensor, wire: torch.Tensor) -> None:
        """Write ``values`` [rows, n], fp32, bf16 or fp16, to ``wire`` [rows, wire_bytes(n)] of uint8.

        Rows may lie anywhere (of ``wire``: at multiples of `SCALE_BYTES`), the elements of one must be neighbours; so
        too below. Calls from several threads do not disturb one another.
        """

    @abstractmethod
    def decode(self, wire: torch.Tensor, values: torch.Tensor, accumulate: bool = False) -> None:
        """``values`` [rows, n] = (or += if ``accumulate``) what ``wire`` [rows, wire_bytes(n)] says.

        The product of code and scale is rounded to fp32, and once more where ``values`` is narrower; a sum is taken in
        fp32 before that.
        """

    def sum_decoded(self, wires: torch.Tensor, total: torch.Tensor) -> None:
        """``total`` [n] of fp32 = the sum over rows of what ``wires`` [k, wire_bytes(n)] say, from the first row on.

        The bits are those of `decode` of the first row and of accumulating the others in their order.
        """
        for index in range(wires.shape[0]):
            self.decode(wires[index : index + 1], total[None], accumulate=index > 0)
