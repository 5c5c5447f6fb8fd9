"""How rank 0 hands every other rank its batch: one number to all, then one scatter of bytes.

A batch travels as it is, whatever objects it consists of: it is pickled, except that tensors are left out of the pickle
and follow it as raw bytes. The receiver's tensors are views into what came. Every round starts with the length of its
messages, so a rank never has to know what comes; a negative length says that rank 0 could not read on and why is in its
own log, so nobody waits for a batch that will never come. A rank that asks for no batch is found by the roll call.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from shardwise import roll_call
from shardwise.errors import StateError

READER = 0
"""The rank of the group that reads the data."""

READER_FAILED = -1
ALIGNMENT = 16
"""Bytes: a tensor of any dtype may start there."""


def carrying_device(group: ProcessGroup | None) -> torch.device:
    """Where a tensor has to be for the group to carry it: the host, unless the group has a GPU backend alone."""
    has_cpu = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if has_cpu else torch.device("cuda", torch.cuda.current_device())


class Channel(Protocol):
    """Hands out what rank 0 has read."""

    def scatter(self, parts: Sequence[Any] | None) -> Any:
        """Rank 0 gives one part a rank, the others None; every rank gets its part."""

    def fail(self) -> None:
        """Rank 0 says that there is no part, because of an error of its own."""


class LocalChannel:
    """A world of one rank."""

    def scatter(self, parts: Sequence[Any] | None) -> Any:
        """The only part."""
        assert parts is not None  # the only rank is the reader
        return parts[0]

    def fail(self) -> None:
        """Nobody waits."""


class GroupChannel:
    """Scatters over a process group; every rank of it calls the same methods in the same order."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self._meets = group is None  # the roll call is one of all ranks
        self._rank = dist.get_rank(group)
        self._world = dist.get_world_size(group)
        self._reader = READER if group is None else dist.get_global_rank(group, READER)
        self._device = carrying_device(group)

    def scatter(self, parts: Sequence[Any] | None) -> Any:
        """Rank 0 gives one part a rank, the others None; every rank gets its part.

        Raises:
            StateError: rank 0 has failed.
        """
        nothing = torch.empty(0, dtype=torch.uint8)  # for rank 0 itself
        messages = [nothing if rank == READER else pack(part) for rank, part in enumerate(parts or ())]
        length = self._agree_on_length(max((message.numel() for message in messages), default=0))
        if length == READER_FAILED:
            raise StateError(
                f"rank {self._rank} waits for a batch that rank 0 could not read: see the error of rank 0."
            )
        mine = torch.empty(length, dtype=torch.uint8, device=self._device)
        padded = [_padded(message, length).to(self._device) for message in messages]
        # [W, length] on rank 0 -> [length] on each
        dist.scatter(mine, padded or None, src=self._reader, group=self._group)
        return parts[READER] if parts is not None else unpack(mine.cpu())

    def fail(self) -> None:
        """Rank 0 says that there is no part, because of an error of its own."""
        self._agree_on_length(READER_FAILED)

    def _agree_on_length(self, length: int) -> int:
        if self._meets:
            roll_call.answer("the next batch of a loader that rank 0 reads for all")
        agreed = torch.tensor(length, dtype=torch.int64, device=self._device)
        dist.broadcast(agreed, src=self._reader, group=self._group)
        return int(agreed.item())


def _padded(message: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(message, (0, length - message.numel()))


class _Pickler(pickle.Pickler):
    """Leaves plain tensors out and keeps them beside the pickle."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.num_bytes = 0

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.is_quantized or obj.requires_grad:
            return None  # pickled like any other object
        offset = self.num_bytes
        self.tensors.append(obj)
        self.num_bytes = _align(offset + obj.numel() * obj.element_size())
        return (offset, obj.dtype, tuple(obj.shape))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensor_bytes: Tensor) -> None:
        super().__init__(file)
        self._bytes = tensor_bytes

    def persistent_load(self, pid: Any) -> Tensor:
        offset, dtype, shape = pid
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self._bytes[offset : offset + num_bytes].view(dtype).view(shape)


def _align(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def pack(batch: Any) -> Tensor:
    """One message: the pickle's length (8 bytes), the tensors' offset (8 bytes), the pickle, the tensors' bytes."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(batch)
    head = torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)
    begin = _align(16 + head.numel())
    message = torch.empty(begin + pickler.num_bytes, dtype=torch.uint8)
    message[:16] = torch.tensor([head.numel(), begin]).view(torch.uint8)
    message[16 : 16 + head.numel()] = head
    offset = begin
    for tensor in pickler.tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes:
            flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
            message[offset : offset + num_bytes] = flat.view(torch.uint8).cpu()
        offset = _align(offset + num_bytes)
    return message


def unpack(message: Tensor) -> Any:
    """What was packed; its tensors are views into the message."""
    num_head, begin = (int(number) for number in message[:16].view(torch.int64))
    head = io.BytesIO(message[16 : 16 + num_head].numpy().tobytes())
    return _Unpickler(head, message[begin:]).load()
