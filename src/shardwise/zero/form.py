"""What a parameter's shard rests as: values, or codes of them.

``Values``  in a floating dtype.
``Codes``   quantised, for parameters that no optimizer steps: a half to an eighth of the bytes, at rest and on the way.
            Quantising the values that codes stand for gives the same codes again, so saving and loading change nothing.
"""

from __future__ import annotations

from typing import Protocol

import torch

from shardwise.comm.base import CollectiveId, Communicator, Done, Pending
from shardwise.quantize import Quantizer, build_quantizer


class Form(Protocol):
    """How elements rest."""

    dtype: torch.dtype
    """Of the array that rests."""

    def numel(self, num_values: int) -> int:
        """Length of the array that stands for so many values of a shard."""

    def encoded(self, values: torch.Tensor) -> torch.Tensor:
        """[numel(n)] what rests of ``values`` [n], but for its dtype; may be ``values`` itself."""

    def near(self, comm: Communicator, resting: torch.Tensor) -> torch.Tensor:
        """``resting``, which a store lends in host memory, where ``gather`` takes it."""

    def gather(
        self, comm: Communicator, identity: CollectiveId, whole: torch.Tensor, resting: torch.Tensor, exact: bool
    ) -> Pending:
        """Fill ``whole`` [N] with the values of every rank's ``resting``, which comes from ``comm.allocate``.

        ``exact``: of what rests nothing is lost but what the dtype of ``whole`` has no room for.
        """


class Values:
    """As they are, in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def numel(self, num_values: int) -> int:
        """As many."""
        return num_values

    def encoded(self, values: torch.Tensor) -> torch.Tensor:
        """As they are."""
        return values

    def near(self, comm: Communicator, resting: torch.Tensor) -> torch.Tensor:
        """On the device, but where the whole is a copy that brings it there."""
        return resting if comm.size == 1 else resting.to(comm.device, non_blocking=True)

    def gather(
        self, comm: Communicator, identity: CollectiveId, whole: torch.Tensor, resting: torch.Tensor, exact: bool
    ) -> Pending:
        """Straight into place."""
        if comm.size == 1:
            whole.copy_(resting, non_blocking=True)
            return Done()
        return comm.all_gather(identity, whole, resting, exact)


class Codes:
    """By a quantiser.

    Args:
        format: of `shardwise.quantize`.
        block: values that share a scale.
        device: where parameters compute; codes and values may also be on the CPU, where stores are.
    """

    dtype = torch.uint8
    value_dtype = torch.float32
    """In which the values that codes stand for lose nothing."""

    def __init__(self, format: str, block: int, device: torch.device) -> None:
        self._on_the_cpu = build_quantizer(format, block)
        self._on_the_device = build_quantizer(format, block, device)

    def _quantizer(self, values: torch.Tensor) -> Quantizer:
        return self._on_the_cpu if values.device.type == "cpu" else self._on_the_device

    def numel(self, num_values: int) -> int:
        """Bytes of codes and scales."""
        return self._on_the_cpu.wire_bytes(num_values)

    def encoded(self, values: torch.Tensor) -> torch.Tensor:
        """Rounds."""
        codes = torch.empty(self.numel(values.numel()), dtype=self.dtype, device=values.device)
        self._quantizer(values).encode(values[None], codes[None])
        return codes

    def decode(self, codes: torch.Tensor, values: torch.Tensor) -> None:
        """Fill ``values`` [n] with what ``codes`` [numel(n)] stand for; exact in fp32."""
        self._quantizer(values).decode(codes[None], values[None])

    def near(self, comm: Communicator, resting: torch.Tensor) -> torch.Tensor:
        """Codes are decoded on the device."""
        return resting.to(comm.device, non_blocking=True)

    def gather(
        self, comm: Communicator, identity: CollectiveId, whole: torch.Tensor, resting: torch.Tensor, exact: bool
    ) -> Pending:
        """Codes travel, and become values when all are here."""
        if comm.size == 1:
            self.decode(resting, whole)
            return Done()
        rows = comm.borrow(comm.size * resting.numel(), self.dtype)
        return _Decoding(self._on_the_device, comm, comm.all_gather(identity, rows, resting, exact), rows, whole)


class _Decoding:
    """A gather of codes under way."""

    def __init__(
        self, quantizer: Quantizer, comm: Communicator, pending: Pending, rows: torch.Tensor, whole: torch.Tensor
    ) -> None:
        self._quantizer = quantizer
        self._comm = comm
        self._pending: Pending | None = pending
        self._rows = rows
        self._whole = whole

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            size = self._comm.size
            self._quantizer.decode(self._rows.view(size, -1), self._whole.view(size, -1))
            self._comm.give_back(self._rows)
