"""The formats as PyTorch expressions: right on every device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shardwise.quantize.base import SMALLEST_SCALE, Quantizer

_CHUNK = 1 << 18
"""Elements that are worked on at a time: their fp32 copies stay in a core's cache."""


class Expressions(Quantizer):
    """By ordinary tensor operations, in fp32, a chunk of blocks at a time."""

    def encode(self, values: torch.Tensor, wire: torch.Tensor) -> None:
        """Scale, round, narrow."""
        codes, scales = self._parts(wire, values.shape[-1])
        for row in range(values.shape[0]):
            blocks = values[row].view(-1, self.block)
            for at in self._chunks(blocks.shape[0]):
                chunk = blocks[at].float()
                largest = torch.linalg.vector_norm(chunk, ord=float("inf"), dim=1)
                scale = torch.clamp_min(largest.div_(self.format.largest_code), SMALLEST_SCALE)
                scales[row, at] = scale
                self._write_codes(chunk * scale.reciprocal_()[:, None], codes[row].view(blocks.shape[0], -1)[at])

    def decode(self, wire: torch.Tensor, values: torch.Tensor, accumulate: bool = False) -> None:
        """Widen, scale."""
        codes, scales = self._parts(wire, values.shape[-1])
        for row in range(values.shape[0]):
            blocks = values[row].view(-1, self.block)
            for at in self._chunks(blocks.shape[0]):
                wide = self._read_codes(codes[row].view(blocks.shape[0], -1)[at]).mul_(scales[row, at, None])
                if accumulate:
                    blocks[at].add_(wide)
                else:
                    blocks[at].copy_(wide)

    def _parts(self, wire: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, bytes of codes] and [rows, number of blocks] fp32; views."""
        end = self.code_bytes(numel)
        return wire[:, :end], wire[:, end:].view(torch.float32)

    def _chunks(self, num_blocks: int) -> Iterator[slice]:
        step = max(1, _CHUNK // self.block)
        for begin in range(0, num_blocks, step):
            yield slice(begin, min(begin + step, num_blocks))

    def _write_codes(self, scaled: torch.Tensor, codes: torch.Tensor) -> None:
        """From [k, block] fp32, changed on the way, to [k, block * bits / 8] uint8."""
        if self.format.name == "fp8":
            # The product of value and inverse may round to just above the largest code, which e4m3 has no room for.
            scaled.clamp_(-self.format.largest_code, self.format.largest_code)
            codes.copy_(scaled.to(torch.float8_e4m3fn).view(torch.uint8))
            return
        whole = scaled.round_().to(torch.int8)
        if self.format.bits == 4:
            low, high = whole.view(torch.uint8).chunk(2, dim=1)
            torch.bitwise_or(low.bitwise_and_(15), high.bitwise_left_shift_(4), out=codes)
        else:
            codes.copy_(whole.view(torch.uint8))

    def _read_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """[k, block] fp32 of [k, block * bits / 8] uint8."""
        if self.format.name == "fp8":
            return codes.view(torch.float8_e4m3fn).float()
        signed = codes.view(torch.int8)
        if self.format.bits == 8:
            return signed.float()
        wide = torch.empty(codes.shape[0], self.block, device=codes.device)
        half = self.block // 2
        wide[:, :half] = signed.bitwise_left_shift(4).bitwise_right_shift_(4)  # arithmetic: the sign comes back
        wide[:, half:] = signed.bitwise_right_shift(4)
        return wide
