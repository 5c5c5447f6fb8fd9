"""Operations on nested data: tensors inside lists, tuples, named tuples, mappings and dataclasses, in any depth.

What a script does to a batch or to its metrics: move, slice, pad, gather. Collectives are written for one tensor and
applied to each in turn; before the first one the ranks meet in a roll call that compares operation and structure, so
that tensors of different shape are an error and never a mixture.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping
from functools import partial, wraps
from typing import Any, ParamSpec

import torch
import torch.distributed as dist

from shardwise import roll_call
from shardwise.errors import ConfigError
from shardwise.process import PartialState, group_backends
from shardwise.roll_call import DistributedOperationException

__all__ = [
    "CannotPadNestedTensorWarning",
    "DistributedOperationException",
    "TensorInformation",
    "UnsupportedTypeError",
    "broadcast",
    "broadcast_object_list",
    "concatenate",
    "convert_outputs_to_fp32",
    "convert_to_fp32",
    "copy_tensor_to_devices",
    "find_batch_size",
    "find_device",
    "gather",
    "gather_object",
    "get_data_structure",
    "get_shape",
    "honor_type",
    "ignorant_find_batch_size",
    "initialize_tensors",
    "is_namedtuple",
    "is_tensor_information",
    "is_torch_tensor",
    "listify",
    "pad_across_processes",
    "pad_input_tensors",
    "recursively_apply",
    "reduce",
    "send_to_device",
    "slice_tensors",
]

P = ParamSpec("P")
HALVES = (torch.float16, torch.bfloat16)
SMALL_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16)
REDUCTIONS = ("sum", "mean", "max", "none")


class UnsupportedTypeError(ConfigError, TypeError):
    """Data that hold something else than tensors, where only tensors can be worked on."""


class CannotPadNestedTensorWarning(UserWarning):
    """A tensor of torch's nested kind was left as it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInformation:
    """What is needed to make room for a tensor."""

    shape: torch.Size
    dtype: torch.dtype


# -- structure


def is_torch_tensor(data: Any) -> bool:
    """Whether ``data`` is a tensor."""
    return isinstance(data, torch.Tensor)


def is_tensor_information(data: Any) -> bool:
    """Whether ``data`` describes a tensor (``get_data_structure``)."""
    return isinstance(data, TensorInformation)


def is_namedtuple(data: Any) -> bool:
    """Whether ``data`` is a named tuple: a tuple whose class is built from one argument a field."""
    return isinstance(data, tuple) and hasattr(data, "_fields")


def honor_type(data: Any, items: Iterable[Any]) -> Any:
    """A list or (named) tuple of the class of ``data`` with these items."""
    return type(data)(*items) if is_namedtuple(data) else type(data)(items)


def recursively_apply(
    function: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """Replace every leaf ``x`` that ``test_type`` accepts by ``function(x, *args, **kwargs)``; all else stays.

    The result has the classes of ``data`` throughout; ``data`` itself is not changed.

    Raises:
        UnsupportedTypeError: a leaf of another type, where ``error_on_other_type`` asks for none.
    """
    if test_type(data):
        return function(data, *args, **kwargs)

    def visit(leaf: Any) -> Any:
        return recursively_apply(
            function, leaf, *args, test_type=test_type, error_on_other_type=error_on_other_type, **kwargs
        )

    def refuse_or_keep(leaf: Any) -> Any:
        if error_on_other_type:
            raise UnsupportedTypeError(
                f"found {leaf!r:.80} of type {type(leaf).__name__}: expected tensors, or lists, tuples, mappings and "
                "dataclasses of tensors."
            )
        return leaf

    return _rebuild(data, visit, refuse_or_keep)


def _rebuild(data: Any, visit: Callable[[Any], Any], otherwise: Callable[[Any], Any]) -> Any:
    """``data`` with each of its parts visited; ``otherwise`` for what has no parts."""
    if isinstance(data, (list, tuple)):
        return honor_type(data, (visit(item) for item in data))
    if isinstance(data, Mapping):
        return _with_values(data, {key: visit(value) for key, value in data.items()})
    if dataclasses.is_dataclass(data) and not isinstance(data, (type, TensorInformation)):
        result = copy.copy(data)
        for field in dataclasses.fields(data):
            object.__setattr__(result, field.name, visit(getattr(data, field.name)))  # also where it is frozen
        return result
    return otherwise(data)


def _with_values(data: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """A mapping like ``data`` with these values; a copy, for a class may hold more than its items."""
    if type(data) is dict:
        return values
    if isinstance(data, MutableMapping):
        result = copy.copy(data)
        for key, value in values.items():
            result[key] = value
        return result
    return type(data)(values)  # type: ignore[call-arg]


def _parts(data: Any) -> Iterable[Any]:
    """What ``data`` holds, one level down; nothing for a leaf."""
    if isinstance(data, (list, tuple)):
        return data
    if isinstance(data, Mapping):
        return data.values()
    if dataclasses.is_dataclass(data) and not isinstance(data, (type, TensorInformation)):
        return (getattr(data, field.name) for field in dataclasses.fields(data))
    return ()


def _tensors(data: Any) -> Generator[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        yield data
    else:
        for part in _parts(data):
            yield from _tensors(part)


def _describe(data: Any, of_tensor: Callable[[torch.Tensor], str]) -> str:
    """The structure of ``data`` in words that agree across ranks exactly where the structures do."""
    if isinstance(data, torch.Tensor):
        return of_tensor(data)
    if isinstance(data, Mapping):
        return "{" + ", ".join(f"{key!r}: {_describe(value, of_tensor)}" for key, value in data.items()) + "}"
    inside = ", ".join(_describe(part, of_tensor) for part in _parts(data))
    return f"[{inside}]" if isinstance(data, (list, tuple)) else f"{type(data).__name__}({inside})"


def _dtype_and_shape(tensor: torch.Tensor) -> str:
    return f"{_name_of(tensor.dtype)}{list(tensor.shape)}"


def _dtype_and_rank(tensor: torch.Tensor) -> str:
    return f"{_name_of(tensor.dtype)} with {tensor.ndim} dims"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def get_data_structure(data: Any) -> Any:
    """``data`` with a ``TensorInformation`` in place of each tensor."""
    return recursively_apply(lambda tensor: TensorInformation(tensor.shape, tensor.dtype), data)


def get_shape(data: Any) -> Any:
    """``data`` with its shape, a list, in place of each tensor."""
    return recursively_apply(lambda tensor: list(tensor.shape), data)


def initialize_tensors(data_structure: Any) -> Any:
    """Uninitialised tensors as ``get_data_structure`` described them."""
    return recursively_apply(
        lambda info: torch.empty(info.shape, dtype=info.dtype), data_structure, test_type=is_tensor_information
    )


def find_batch_size(data: Any) -> int:
    """The size of dim 0 of the first tensor in ``data``.

    Raises:
        UnsupportedTypeError: the first leaf is no tensor.
        ConfigError: there is no leaf, or it has no dim 0.
    """
    if isinstance(data, torch.Tensor):
        if data.ndim == 0:
            raise ConfigError("a tensor without dims has no batch size.")
        return data.shape[0]
    if not isinstance(data, (list, tuple, Mapping)) and not dataclasses.is_dataclass(data):
        raise UnsupportedTypeError(
            f"found {data!r:.80} of type {type(data).__name__} where the batch size should be read: expected a tensor "
            "first."
        )
    for part in _parts(data):
        return find_batch_size(part)
    raise ConfigError(f"there is no batch size in an empty {type(data).__name__}.")


def ignorant_find_batch_size(data: Any) -> int | None:
    """The batch size as in ``find_batch_size``; None where there is none."""
    try:
        return find_batch_size(data)
    except (ValueError, TypeError):
        return None


def find_device(data: Any) -> torch.device | None:
    """The device of the first tensor in ``data``; None without one."""
    first = next(_tensors(data), None)
    return None if first is None else first.device


# -- on each rank alone


def send_to_device(
    tensor: Any, device: Any, non_blocking: bool = False, skip_keys: str | Iterable[str] | None = None
) -> Any:
    """``tensor`` with everything that can be moved (has a method ``to``) on ``device``.

    Args:
        tensor: tensors in any nesting.
        device: what ``Tensor.to`` takes.
        non_blocking: let a copy from pinned memory go on beside what follows.
        skip_keys: keys of mappings whose values stay where they are.
    """
    skipped = {skip_keys} if isinstance(skip_keys, str) else set(skip_keys or ())
    move = partial(send_to_device, device=device, non_blocking=non_blocking, skip_keys=skipped)
    if isinstance(tensor, Mapping) and not skipped.isdisjoint(tensor):
        return _with_values(tensor, {k: v if k in skipped else move(v) for k, v in tensor.items()})
    if hasattr(tensor, "to") and not isinstance(tensor, type):
        return _move(tensor, device, non_blocking)
    return _rebuild(tensor, move, lambda leaf: leaf)


def _move(data: Any, device: Any, non_blocking: bool) -> Any:
    try:
        return data.to(device, non_blocking=non_blocking)
    except TypeError:  # a batch class of somebody else, whose ``to`` takes a device alone
        return data.to(device)


def slice_tensors(
    data: Any, tensor_slice: Any, process_index: int | None = None, num_processes: int | None = None
) -> Any:
    """``data`` with ``tensor[tensor_slice]`` in place of each tensor; the other arguments are there for old callers."""
    return recursively_apply(lambda tensor: tensor[tensor_slice], data)


def concatenate(data: Any, dim: int = 0) -> Any:
    """Join a list of equally nested data: each tensor of the result is the ``torch.cat`` of its counterparts.

    Raises:
        UnsupportedTypeError: something in it is no tensor.
    """
    first = data[0]
    if isinstance(first, (list, tuple)):
        return honor_type(first, (concatenate([each[i] for each in data], dim) for i in range(len(first))))
    if isinstance(first, Mapping):
        return _with_values(first, {key: concatenate([each[key] for each in data], dim) for key in first})
    if not isinstance(first, torch.Tensor):
        raise UnsupportedTypeError(f"cannot concatenate {type(first).__name__}: expected tensors.")
    return torch.cat(data, dim=dim)


def pad_input_tensors(tensor: Any, batch_size: int, num_processes: int, dim: int = 0) -> Any:
    """Repeat the last item along ``dim`` until ``batch_size`` items divide evenly over the processes.

    Tensors of another size along ``dim`` stay as they are.
    """
    missing = -batch_size % num_processes

    def pad(one: torch.Tensor) -> torch.Tensor:
        if missing == 0 or dim >= one.ndim or one.shape[dim] != batch_size:
            return one
        last = one.narrow(dim, batch_size - 1, 1)
        return torch.cat([one, *[last] * missing], dim=dim)

    return recursively_apply(pad, tensor, error_on_other_type=True)


def listify(data: Any) -> Any:
    """``data`` with numbers in nested lists in place of each tensor."""
    return recursively_apply(lambda tensor: tensor.detach().tolist(), data)


def convert_to_fp32(tensor: Any) -> Any:
    """``tensor`` (in any nesting) with every fp16 and bf16 one as fp32."""
    return recursively_apply(
        lambda one: one.float(), tensor, test_type=lambda leaf: is_torch_tensor(leaf) and leaf.dtype in HALVES
    )


def convert_outputs_to_fp32(model_forward: Callable[P, Any]) -> Callable[P, Any]:
    """``model_forward`` with its fp16 and bf16 outputs as fp32; the original is its ``__wrapped__``."""

    @wraps(model_forward)
    def forward(*args: P.args, **kwargs: P.kwargs) -> Any:
        return convert_to_fp32(model_forward(*args, **kwargs))

    return forward


# -- on all ranks together


def gather(tensor: Any) -> Any:
    """Every tensor of all ranks joined along dim 0, in rank order, on every rank; a number becomes one entry.

    Raises:
        DistributedOperationException: structure, shapes or dtypes differ between ranks.
        CollectiveError: a rank does not come.
        UnsupportedTypeError: something in ``tensor`` is no tensor.
    """
    if not _meet("gather", tensor):
        return tensor
    return recursively_apply(_gather_one, tensor, error_on_other_type=True)


def _gather_one(tensor: torch.Tensor) -> torch.Tensor:
    size = dist.get_world_size()
    mine = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()  # [N, ...]
    result = torch.empty((size * mine.shape[0], *mine.shape[1:]), dtype=mine.dtype, device=_carrier(mine))
    if result.numel():
        # As bytes: not every backend knows every dtype.
        parts = list(_bytes_of(result).chunk(size))
        dist.all_gather(parts, _bytes_of(mine.to(result.device)))
    return result.to(tensor.device)


def gather_object(object: Any) -> Any:
    """The lists of all ranks (anything that pickle takes inside) joined in rank order, on every rank.

    In a single process ``object`` itself.
    """
    if not _meet("gather_object"):
        return object
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, object)
    return [item for items in lists for item in items]


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """Overwrite every tensor with that of ``from_process``; returns them (a new one where it is not contiguous).

    Raises:
        DistributedOperationException: structure, shapes or dtypes differ between ranks.
        CollectiveError: a rank does not come.
    """
    if not _meet(f"broadcast from process {from_process}", tensor):
        return tensor
    return recursively_apply(_broadcast_one, tensor, from_process, error_on_other_type=True)


def _broadcast_one(tensor: torch.Tensor, from_process: int) -> torch.Tensor:
    carried = tensor.detach().to(_carrier(tensor)).contiguous()
    if carried.numel():
        dist.broadcast(_bytes_of(carried), src=from_process)
    if carried.data_ptr() == tensor.data_ptr():
        return tensor
    if tensor.is_contiguous():  # it only travelled on another device
        tensor.detach().copy_(carried)
        return tensor
    return carried.to(tensor.device)


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Overwrite the items of the list (anything that pickle takes) with those of ``from_process``; returns the list."""
    if _meet(f"broadcast_object_list from process {from_process}"):
        dist.broadcast_object_list(object_list, src=from_process)
    return object_list


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Sum, average or take the largest of every tensor over ranks, times ``scale``, on every rank; ``tensor`` stays.

    fp16 and bf16 are added in fp32; the mean of whole numbers is fp32; truth values are counted.

    Args:
        tensor: tensors in any nesting.
        reduction: "sum", "mean", "max", or "none" for a copy as it is.
        scale: factor for the result.

    Raises:
        DistributedOperationException: structure, shapes or dtypes differ between ranks.
        CollectiveError: a rank does not come.
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction={reduction!r} is unknown: expected one of {', '.join(REDUCTIONS)}.")
    if reduction == "none":
        return recursively_apply(torch.clone, tensor, error_on_other_type=True)
    size = dist.get_world_size() if _meet(f"reduce ({reduction})", tensor) else 1
    return recursively_apply(_reduce_one, tensor, reduction, scale, size, error_on_other_type=True)


def _reduce_one(tensor: torch.Tensor, reduction: str, scale: float, size: int) -> torch.Tensor:
    """Widened for the sum, so that a mean of small numbers is right; covers dtypes that the backend cannot add, too."""
    wide = _wide(tensor.dtype)
    total = tensor.detach().to(_carrier(tensor), wide, copy=True).contiguous()
    if size > 1 and total.numel():
        dist.all_reduce(total, op=dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM)
    if reduction == "mean":
        total = total / size
    if scale != 1.0:
        total = total * scale
    is_count_or_mean = tensor.dtype == torch.bool or total.dtype != wide
    return total.to(tensor.device, total.dtype if is_count_or_mean else tensor.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype in HALVES:
        return torch.float32
    return torch.int64 if dtype in SMALL_INTEGERS else dtype


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Fill every tensor along ``dim`` with ``pad_index`` up to the longest of the ranks, so that it can be gathered.

    A tensor that has no such dim stays as it is.

    Args:
        tensor: tensors in any nesting.
        dim: along which lengths differ.
        pad_index: the value to fill with.
        pad_first: fill in front instead of behind.

    Raises:
        DistributedOperationException: structure, number of dims or dtypes differ between ranks.
        CollectiveError: a rank does not come.
    """
    if not _meet("pad_across_processes", tensor, _dtype_and_rank):
        return tensor
    lengths = [t.shape[dim] if _can_pad(t, dim) else 0 for t in _tensors(tensor)]
    longest = torch.tensor(lengths, dtype=torch.int64, device=PartialState().device)
    if lengths:
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    targets = iter(longest.tolist())

    def pad(one: torch.Tensor) -> torch.Tensor:
        length = next(targets)
        if one.is_nested:
            warnings.warn("a nested tensor is not padded.", CannotPadNestedTensorWarning, stacklevel=2)
        if not _can_pad(one, dim) or one.shape[dim] == length:
            return one
        shape = list(one.shape)
        shape[dim] = length - one.shape[dim]
        filling = one.new_full(shape, pad_index)
        return torch.cat([filling, one] if pad_first else [one, filling], dim=dim)

    return recursively_apply(pad, tensor, error_on_other_type=True)


def _can_pad(tensor: torch.Tensor, dim: int) -> bool:
    return not tensor.is_nested and -tensor.ndim <= dim < tensor.ndim


def copy_tensor_to_devices(tensor: torch.Tensor | None = None) -> torch.Tensor:
    """Give the tensor of one rank to all: that one passes it, the others pass None. It arrives on each one's device.

    Raises:
        ConfigError: no rank has one, or several do.
    """
    state = PartialState()
    mine = None if tensor is None else (state.process_index, tuple(tensor.shape), tensor.dtype)
    found = [entry for entry in gather_object([mine]) if entry is not None]
    if len(found) != 1:
        raise ConfigError(
            f"copy_tensor_to_devices needs a tensor from one rank and None from the others, but {len(found)} have one."
        )
    source, shape, dtype = found[0]
    if tensor is None:
        tensor = torch.empty(shape, dtype=dtype, device=state.device)
    return _broadcast_one(tensor.to(state.device), source) if state.use_distributed else tensor.to(state.device)


# -- meeting


def _meet(operation: str, data: Any = None, of_tensor: Callable[[torch.Tensor], str] = _dtype_and_shape) -> bool:
    """Wait for all ranks at this operation; False in a single process, where there is nothing to do."""
    state = PartialState()
    if not state.use_distributed:
        return False
    details = "" if data is None else _describe(data, of_tensor)
    if state.debug:
        _compare_all(operation, details)
    else:
        roll_call.answer(operation, details)
    return True


def _compare_all(operation: str, details: str) -> None:
    """Debug mode: every rank's details to every rank, so that the error lists them all and comes at once."""
    roll_call.answer(operation)
    of_ranks: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(of_ranks, details)
    if len(set(of_ranks)) > 1:
        listed = "\n".join(f"  process {rank}: {details}" for rank, details in enumerate(of_ranks))
        raise DistributedOperationException(
            f"{operation} needs data of the same structure, shapes and dtypes on all processes, but found\n{listed}"
        )


def _carrier(tensor: torch.Tensor) -> torch.device:
    """Where ``tensor`` has to be for the process group to carry it: there, or on this process's device."""
    backends = group_backends()
    return tensor.device if not backends or tensor.device.type in backends else PartialState().device


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as a flat one of bytes, over the same memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
