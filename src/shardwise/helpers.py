"""Small things that scripts of many processes import: unwrap, save, merge, count bytes, show progress."""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Mapping, MutableMapping
from os import PathLike
from typing import IO, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardwise.errors import ConfigError
from shardwise.process import PartialState, process_index

SIZE_UNITS = ("bytes", "KB", "MB", "GB", "TB")


def wait_for_everyone() -> None:
    """Go on when every process is here (see ``PartialState.wait_for_everyone``)."""
    PartialState().wait_for_everyone()


def is_compiled_module(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has wrapped the module."""
    # Who has not imported the compiler has compiled nothing, and importing it takes seconds.
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def extract_model_from_parallel(
    model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
) -> nn.Module:
    """The user's module inside an engine, ``DistributedDataParallel`` or ``torch.compile``.

    Args:
        model: wrapped or not.
        keep_fp32_wrapper: False to also take off what ``convert_outputs_to_fp32`` put around its forward.
        keep_torch_compile: True to leave a module compiled if that is all that is around it.
    """
    from shardwise.zero.engine import Engine

    inside = model
    while isinstance(inside, (Engine, DistributedDataParallel, nn.DataParallel)) or is_compiled_module(inside):
        if is_compiled_module(inside):
            inner = inside._orig_mod
            if keep_torch_compile and not isinstance(inner, (Engine, DistributedDataParallel, nn.DataParallel)):
                break
        else:
            inner = inside.module
        assert isinstance(inner, nn.Module)
        inside = inner
    if not keep_fp32_wrapper:
        _unwrap_forward(inside)
    return inside


def _unwrap_forward(model: nn.Module) -> None:
    """Only an instance's own ``forward`` is a wrapper; without it the class's is found again."""
    forward: Any = vars(model).get("forward")
    if not hasattr(forward, "__wrapped__"):
        return
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    del model.forward
    if model.forward != forward:  # the script had put a forward of its own there before
        model.forward = forward


def save(
    obj: Any, f: str | PathLike[str] | IO[bytes], save_on_each_node: bool = False, safe_serialization: bool = False
) -> None:
    """Write ``obj`` from the first process alone.

    Args:
        obj: anything that ``torch.save`` takes; a dict of tensors for ``safe_serialization``.
        f: a path, or without ``safe_serialization`` an open file.
        save_on_each_node: from the first process of each machine.
        safe_serialization: as safetensors instead of a pickle.

    Raises:
        ConfigError: safetensors are asked for what is no dict of tensors, or for an open file.
    """
    state = PartialState()
    if not (state.is_local_main_process if save_on_each_node else state.is_main_process):
        return
    if not safe_serialization:
        torch.save(obj, f)
        return
    if not isinstance(f, (str, PathLike)):
        raise ConfigError("safe_serialization=True writes to a path: expected a path, got an open file.")
    if not isinstance(obj, dict) or not all(isinstance(value, torch.Tensor) for value in obj.values()):
        raise ConfigError(f"safe_serialization=True writes a dict of tensors, got {type(obj).__name__}.")
    from safetensors.torch import save_file

    save_file(_unshared(obj), f, metadata={"format": "pt"})


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses two names for one memory: of tied tensors the first name stays, a mere overlap is copied."""
    seen: set[tuple[Any, ...]] = set()
    storages: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        identity = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if storage and identity in seen:
            continue
        result[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in storages else tensor
        seen.add(identity)
        if storage:
            storages.add(storage)
    return {name: tensor.contiguous() for name, tensor in result.items()}


def load(f: str | PathLike[str] | IO[bytes], map_location: Any = None, **kwargs: Any) -> Any:
    """``torch.load``, which unpickles nothing but tensors and plain containers.

    Args:
        f: a path or an open file.
        map_location: as ``torch.load`` takes it.
        kwargs: likewise; ``weights_only=False`` to unpickle anything, from files that you trust.
    """
    return torch.load(f, map_location=map_location, **{"weights_only": True, **kwargs})


def clean_state_dict_for_safetensors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict as safetensors can hold it: contiguous, and of tensors that share memory the first name alone."""
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    kept = _unshared(tensors)
    return {name: kept.get(name, value) for name, value in state_dict.items() if name in kept or name not in tensors}


def is_port_in_use(port: int | str | None = None) -> bool:
    """Whether some process of this machine listens on the port (29500 where none is given)."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", 29500 if port is None else int(port))) == 0


def merge_dicts(source: MutableMapping[Any, Any], destination: MutableMapping[Any, Any]) -> MutableMapping[Any, Any]:
    """Write the entries of ``source`` into ``destination``, dicts within dicts entry by entry; returns it."""
    for key, value in source.items():
        if isinstance(value, MutableMapping):
            merge_dicts(value, destination.setdefault(key, {}))
        else:
            destination[key] = value
    return destination


def convert_bytes(size: float) -> str:
    """``size`` bytes in words: 1.5 GB for 1610612736."""
    for unit in SIZE_UNITS:
        if size < 1024 or unit == SIZE_UNITS[-1]:
            return f"{round(size, 2)} {unit}"
        size /= 1024
    raise AssertionError("unreachable: the last unit takes every size")


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """The progress bar of the package tqdm, shown on the first process of each machine alone unless asked otherwise.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        bar = importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        raise ConfigError("shardwise's tqdm needs the package tqdm: install it with `pip install tqdm`.") from None
    if main_process_only and not kwargs.get("disable"):
        started = bool(PartialState._shared_state)
        kwargs["disable"] = not PartialState().is_local_main_process if started else process_index() != 0
    return bar(*args, **kwargs)
