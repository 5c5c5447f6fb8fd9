"""The formats by Triton kernels: one launch each way, where the values are on a GPU.

This module needs Triton; `shardwise.quantize.choose` imports it where that is there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from shardwise.quantize.base import LARGEST_VALUE, SMALLEST_SCALE, Format, Quantizer
from shardwise.quantize.triton_kernels import decode_blocks, encode_blocks, sum_blocks

BYTES_OF_PROGRAM = 2048
"""Bytes of codes that one program handles at a time: 16 a thread of its four warps."""


class Kernels(Quantizer):
    """By kernels whose bits are those of `shardwise.quantize.expressions.Expressions`.

    Args:
        format: see `Quantizer`.
        block: see `Quantizer`.
    """

    def __init__(self, format: Format, block: int) -> None:
        super().__init__(format, block)
        num_bytes = self.code_bytes(block)
        lanes = triton.next_power_of_2(num_bytes)
        self._tile = max(1, BYTES_OF_PROGRAM // lanes)
        # What every launch is given: the compiled kernel's constants, in capitals, and how it is compiled.
        self.launch: dict[str, Any] = {
            "BYTES": num_bytes,
            "PARTS": 8 // format.bits,
            "FP8": format.name == "fp8",
            "LANES": lanes,
            "TILE": self._tile,
            "num_warps": 4,
            "enable_fp_fusion": False,
        }

    def encode(self, values: torch.Tensor, wire: torch.Tensor) -> None:
        """One pass over both."""
        if values.numel() == 0:
            return
        num_rows, num_blocks = values.shape[0], values.shape[1] // self.block
        codes, scales = self._parts(wire, num_blocks)
        with torch.cuda.device_of(values):
            encode_blocks[self._grid(num_blocks, num_rows)](
                values,
                codes,
                scales,
                values.stride(0),
                scales.stride(0),
                num_blocks,
                LARGEST_CODE=self.format.largest_code,
                SMALLEST_SCALE=SMALLEST_SCALE,
                LARGEST_VALUE=LARGEST_VALUE,
                SCALE_OF_LARGEST=self.format.scale_of_largest,
                **self.launch,
            )

    def decode(self, wire: torch.Tensor, values: torch.Tensor, accumulate: bool = False) -> None:
        """One pass over both."""
        if values.numel() == 0:
            return
        num_rows, num_blocks = values.shape[0], values.shape[1] // self.block
        codes, scales = self._parts(wire, num_blocks)
        with torch.cuda.device_of(values):
            decode_blocks[self._grid(num_blocks, num_rows)](
                codes.view(torch.int8),
                scales,
                values,
                scales.stride(0),
                values.stride(0),
                num_blocks,
                ACCUMULATE=accumulate,
                **self.launch,
            )

    def sum_decoded(self, wires: torch.Tensor, total: torch.Tensor) -> None:
        """The total is written once."""
        if total.numel() == 0:
            return
        num_blocks = total.shape[0] // self.block
        codes, scales = self._parts(wires, num_blocks)
        with torch.cuda.device_of(total):
            sum_blocks[self._grid(num_blocks, self.launch["PARTS"])](
                codes.view(torch.int8),
                scales,
                total,
                scales.stride(0),
                num_blocks,
                NUM_WIRES=wires.shape[0],
                **self.launch,
            )

    def _parts(self, wire: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, bytes of codes] uint8 and [rows, blocks] fp32; views."""
        end = self.code_bytes(num_blocks * self.block)
        return wire[:, :end], wire[:, end:].view(torch.float32)

    def _grid(self, num_blocks: int, second: int) -> tuple[int, int]:
        return triton.cdiv(num_blocks, self._tile), second
