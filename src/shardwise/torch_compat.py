"""The one module that touches torch names which are private or changed between releases.

Tested with torch 2.11 to 2.13. Everything else in shardwise uses public, stable names only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

__all__ = ["TorchDispatchMode", "WeakTensorKeyDictionary"]  # private modules, for those who need these classes

# torch 2.13 renamed the tensor collectives; the old names warn there and the new ones are absent before.
_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_single(output: torch.Tensor, shard: torch.Tensor, group: ProcessGroup) -> Work:
    """Start gathering ``shard`` [N/W] of every rank into ``output`` [N]; returns the pending work."""
    work: Work = _all_gather_single(output, shard, group=group, async_op=True)
    return work


def reduce_scatter_single(shard: torch.Tensor, buffer: torch.Tensor, group: ProcessGroup) -> Work:
    """Start summing ``buffer`` [N] over ranks, keeping this rank's ``shard`` [N/W]; returns the pending work."""
    work: Work = _reduce_scatter_single(shard, buffer, group=group, async_op=True)
    return work


def store_under(prefix: str) -> Any:
    """A new connection to the store through which the ranks of the default process group met; its keys begin so."""
    connection = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return dist.distributed_c10d.PrefixStore(prefix, connection)


def current_backward() -> int:
    """The autograd backward pass (graph task) that the calling thread runs in, -1 outside; nested ones differ."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether the calling thread runs inside an autograd backward pass."""
    return current_backward() != -1


def queue_end_of_backward(callback: Callable[[], None]) -> None:
    """Run ``callback`` once when the backward pass that calls this has computed every gradient."""
    Variable._execution_engine.queue_callback(callback)


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that ``tensor`` is a view of, or None."""
    base: torch.Tensor | None = tensor._base
    return base


def norms(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The 2-norm of each tensor, in one call."""
    return torch._foreach_norm(list(tensors))


def multiply(tensors: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply each tensor in place, in one call."""
    torch._foreach_mul_(list(tensors), factor)


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep ``function`` out of the graphs of ``torch.compile``.

    Importing the compiler takes longer than all of shardwise; where nobody has done so yet, nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:
        return function
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


class WeakStorage:
    """A storage that others may free. While this exists its ``key`` belongs to no other storage."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._reference = StorageWeakRef(storage)
        self.key = storage_key(storage)

    def get(self) -> torch.UntypedStorage | None:
        """The storage, or None if it was freed."""
        if self._reference.expired():
            return None
        storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(self._reference.cdata)
        return storage


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that a storage has for itself as long as it lives."""
    key: int = storage._cdata
    return key


def version_of(tensor: torch.Tensor) -> int:
    """How many in-place operations the memory of a tensor has seen, by way of any view."""
    version: int = tensor._version
    return version


def is_view(operation: Any) -> bool:
    """Whether a dispatched operation only makes a view: it reads no element."""
    return isinstance(operation, torch._ops.OpOverload) and bool(operation.is_view)


def non_persistent_buffers(module: torch.nn.Module) -> set[str]:
    """Names of the module's own buffers that are in no state dict."""
    return module._non_persistent_buffers_set


def written_arguments(operation: Any) -> tuple[tuple[int, str], ...] | None:
    """Positions and names of the arguments that a dispatched operation writes to; None where it does not say."""
    if not isinstance(operation, torch._ops.OpOverload):
        return None
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(operation._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def import_what_binds_groups() -> None:
    """Import, before there is a process group, the module whose functions keep the group of their import.

    ``torch.distributed.nn.functional`` has the default group for the default of arguments, and making an optimizer
    imports it. Imported after the group was made it keeps the group alive beyond its end, with its threads; and a
    thread of gloo that still runs when the process exits may abort it ("terminate called without an active exception").
    """
    import_module("torch.distributed.nn.functional")
