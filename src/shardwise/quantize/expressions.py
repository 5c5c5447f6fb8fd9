"""The formats as PyTorch expressions: right on every device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shardwise.quantize.base import LARGEST_VALUE, SCALE_BYTES, SMALLEST_SCALE, Format, Quantizer

CHUNK_OF_CORE = 1 << 18
"""Elements that a core works on at a time: their fp32 copies stay in its caches, and a pass outlasts its call."""
CHUNK_OF_DEVICE = 1 << 24
"""Elsewhere a pass is a launch: few long ones, and scratch memory that is small beside a model."""
FP8_INTO_FP16 = 2.0**8
"""What a value is divided by whose e4m3 bits are read as fp16: 2 to the power of the difference of the biases."""


@dataclass(frozen=True, slots=True)
class _Wire:
    """Views of encoded rows, block by block."""

    codes: torch.Tensor
    """[rows, blocks, bytes of a block's codes] uint8."""
    scales: torch.Tensor
    """[rows, blocks] fp32."""

    def part(self, rows: slice, blocks: slice) -> _Wire:
        """Some blocks of some rows."""
        return _Wire(self.codes[rows, blocks], self.scales[rows, blocks])


class Expressions(Quantizer):
    """By ordinary tensor operations, in fp32, a chunk at a time: no pass but the first and the last meets memory.

    Args:
        format: see `Quantizer`.
        block: see `Quantizer`.
        chunk: elements of a chunk; by default what suits the device. No bit depends on it.
    """

    def __init__(self, format: Format, block: int, chunk: int | None = None) -> None:
        super().__init__(format, block)
        self._chunk = chunk

    def encode(self, values: torch.Tensor, wire: torch.Tensor) -> None:
        """Scale, round, narrow."""
        if values.numel() == 0:
            return
        blocks, encoded = self._blocks(values), self._parts(wire)
        scratch = self._scratch(blocks)
        # On the device: CUDA would multiply by the inverse of a number of the host's, which rounds otherwise.
        largest_code = torch.full((), self.format.largest_code, device=values.device)
        for rows, at in self._chunks(blocks):
            chunk, into = blocks[rows, at], encoded.part(rows, at)
            wide = scratch[: chunk.numel()].view(chunk.shape)
            if chunk.dtype is not torch.float32:
                chunk = wide.copy_(chunk)
            scale = self._scale_of(chunk, largest_code)
            into.scales.copy_(scale)
            torch.mul(chunk, scale.reciprocal_()[..., None], out=wide)
            self._write_codes(wide, into.codes)

    def decode(self, wire: torch.Tensor, values: torch.Tensor, accumulate: bool = False) -> None:
        """Widen, scale."""
        if values.numel() == 0:
            return
        blocks, encoded = self._blocks(values), self._parts(wire)
        scratch = self._scratch(blocks)
        for rows, at in self._chunks(blocks):
            chunk = blocks[rows, at]
            if chunk.dtype is torch.float32 and not accumulate:
                self._read(encoded.part(rows, at), chunk)
                continue
            wide = scratch[: chunk.numel()].view(chunk.shape)
            self._read(encoded.part(rows, at), wide)
            if accumulate:
                chunk.add_(wide)
            else:
                chunk.copy_(wide)

    def sum_decoded(self, wires: torch.Tensor, total: torch.Tensor) -> None:
        """As the base class does it, but with a chunk of the total kept in the cache for all rows."""
        if total.numel() == 0:
            return
        blocks, encoded = self._blocks(total[None]), self._parts(wires)
        scratch = self._scratch(blocks)
        for _, at in self._chunks(blocks):
            chunk = blocks[:, at]
            self._read(encoded.part(slice(0, 1), at), chunk)
            wide = scratch[: chunk.numel()].view(chunk.shape)
            for index in range(1, wires.shape[0]):
                self._read(encoded.part(slice(index, index + 1), at), wide)
                chunk.add_(wide)

    def _blocks(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, blocks, block]; a view."""
        return values.view(values.shape[0], values.shape[1] // self.block, self.block)

    def _parts(self, wire: torch.Tensor) -> _Wire:
        bytes_of_block = self.code_bytes(self.block)
        num_blocks = wire.shape[1] // (bytes_of_block + SCALE_BYTES)
        end = num_blocks * bytes_of_block
        return _Wire(wire[:, :end].view(wire.shape[0], num_blocks, bytes_of_block), wire[:, end:].view(torch.float32))

    def _chunk_of(self, device: torch.device) -> int:
        if self._chunk is not None:
            return self._chunk
        return CHUNK_OF_CORE * torch.get_num_threads() if device.type == "cpu" else CHUNK_OF_DEVICE

    def _scratch(self, blocks: torch.Tensor) -> torch.Tensor:
        """fp32 for a chunk. Each call takes its own, and many passes pay for it."""
        numel = min(blocks.numel(), max(self._chunk_of(blocks.device), self.block))
        return torch.empty(numel, dtype=torch.float32, device=blocks.device)

    def _chunks(self, blocks: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """Rows and blocks of one chunk after the other: some whole rows, or a part of one."""
        num_rows, num_blocks = blocks.shape[:2]
        blocks_at_once = max(1, self._chunk_of(blocks.device) // self.block)
        rows_at_once = max(1, blocks_at_once // max(1, num_blocks))
        for row in range(0, num_rows, rows_at_once):
            for begin in range(0, num_blocks, blocks_at_once):
                yield slice(row, row + rows_at_once), slice(begin, begin + blocks_at_once)

    def _scale_of(self, chunk: torch.Tensor, largest_code: torch.Tensor) -> torch.Tensor:
        """[rows, blocks] of [rows, blocks, block] fp32."""
        # Two passes, yet many times as fast on the CPU as one that takes the magnitudes (vector_norm, aminmax).
        largest = torch.maximum(chunk.amax(dim=-1), chunk.amin(dim=-1).neg_())
        reaches_the_end = largest == LARGEST_VALUE
        return (
            largest.div_(largest_code)
            .clamp_min_(SMALLEST_SCALE)
            .masked_fill_(reaches_the_end, self.format.scale_of_largest)
        )

    def _write_codes(self, scaled: torch.Tensor, codes: torch.Tensor) -> None:
        """From [..., block] fp32, changed on the way, to [..., block * bits / 8] uint8."""
        if self.format.name == "fp8":
            # The product of value and inverse may be a little above the largest code, to which it then rounds.
            codes.view(torch.float8_e4m3fn).copy_(scaled)
            return
        whole = scaled.round_()
        if self.format.bits == 8:
            codes.view(torch.int8).copy_(whole)
            return
        low, high = whole.chunk(2, dim=-1)
        # low + 16 high fits a signed byte. Adding 8 to both codes makes halves that do not borrow from one another;
        # turning the top bit of each half subtracts the 8 again, in two's complement.
        codes.view(torch.int8).copy_(low.add_(high, alpha=16))
        codes.add_(0x88).bitwise_xor_(0x88)

    def _read(self, encoded: _Wire, wide: torch.Tensor) -> None:
        """To ``wide`` [rows, blocks, block] fp32."""
        scales = encoded.scales[..., None]
        signed = encoded.codes.view(torch.int8)
        if self.format.name == "fp8":
            # The bits of e4m3, moved to their places in fp16: many times as fast on the CPU as torch's own conversion.
            half = signed.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)  # the sign came along twice
            torch.mul(wide.copy_(half.view(torch.float16)), scales * FP8_INTO_FP16, out=wide)
            return
        if self.format.bits == 8:
            wide.copy_(signed)
        else:
            low, high = wide.chunk(2, dim=-1)
            low.copy_(signed.bitwise_left_shift(4).bitwise_right_shift_(4))  # arithmetic: the sign comes back
            high.copy_(signed.bitwise_right_shift(4))
        wide.mul_(scales)
