"""``zero.Init``: a model is built already sharded; no rank ever holds more than a few parameters of it.

While the context is open every parameter that a module registers is watched. An operation that touches one makes it
whole on all ranks; the least recently touched are put away again: each rank keeps an even slice of rank 0's bytes, and
the storage is emptied. It is the storage that is emptied and filled, so every view, alias and tie of the parameter
stays what it was. At the end the parameters rest in pieces (see ``zero/pieces.py``) and show NaN.

Nothing of torch is replaced: a dispatch mode sees the operations, a function mode sees the few ways to memory that are
none (``numpy()``, ``tolist()``, printing), and torch's own registration hooks see parameters and modules.

The values are those of rank 0's ordinary construction, bit for bit: same operations, same random numbers. All ranks run
the same code, and every move is a roll call that names the parameter, so ranks that part ways are told where.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from shardwise import roll_call, torch_compat
from shardwise.checkpoint import lazy_files
from shardwise.config.load import open_source
from shardwise.errors import ConfigError, StateError
from shardwise.mesh import DEFAULT_TIMEOUT, build_mesh, init_distributed
from shardwise.zero import pieces
from shardwise.zero.pieces import Cut, Geometry, Ranks, Source

logger = logging.getLogger(__name__)

MAX_WHOLE_BYTES = 1 << 26
"""Bytes of parameters that stay whole from operation to operation."""
SMALL_BYTES = 1 << 12
"""Parameters below stay ordinary ones: their slices would save nothing."""

_aten = torch.ops.aten
_READ_NO_VALUES = {
    _aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default,
    _aten.rand_like.default, _aten.randn_like.default, _aten.new_empty.default, _aten.new_zeros.default,
    _aten.new_ones.default, _aten.new_full.default, _aten.new_empty_strided.default,
}  # fmt: skip
_OVERWRITE = {
    _aten.normal_.default, _aten.uniform_.default, _aten.zero_.default, _aten.fill_.Scalar, _aten.fill_.Tensor,
    _aten.copy_.default,
}  # fmt: skip
"""The first argument's elements are all written and none is read."""
_REPLACES_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_READ_MEMORY = {torch.Tensor.tolist, torch.Tensor.__repr__, torch.Tensor.__reduce_ex__}
"""Calls that read elements without a dispatched operation."""
_EXPOSE_MEMORY = {
    torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.data_ptr, torch.Tensor.untyped_storage,
    torch.Tensor.storage, torch.Tensor.__dlpack__, torch.Tensor.share_memory_,
}  # fmt: skip
"""Calls after which somebody may hold the memory itself: it must stay where it is."""


class _Kept:
    """One storage that is watched."""

    def __init__(self, storage: torch.UntypedStorage, label: str, number: int) -> None:
        self.storage = torch_compat.WeakStorage(storage)
        self.nbytes = storage.nbytes()
        self.device = storage.device
        self.label = label
        self.number = number
        """In the order in which all ranks came to know it; negative: they do not yet."""
        self.parameters: list[weakref.ref[nn.Parameter]] = []
        self.rest: Cut | None = None
        """Holds the values, unless they were changed since."""
        self.source: Source | None = None
        """The same, in a file."""
        self.is_fixed = not storage.resizable()
        """Its memory must stay: it is not torch's own, or somebody was given the address."""

    def alive(self) -> Iterator[nn.Parameter]:
        """The parameters that still lie in this storage."""
        for reference in self.parameters:
            parameter = reference()
            if parameter is not None and torch_compat.storage_key(parameter.untyped_storage()) == self.storage.key:
                yield parameter

    @property
    def name(self) -> str:
        """For messages, the same on all ranks."""
        return f"{self.label} (the {self.number}. one under zero.Init)"

    @property
    def is_backed(self) -> bool:
        """Whether the values are elsewhere as well, so that the memory may go."""
        return self.rest is not None or self.source is not None


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Construction:
    """The storages of a model that is being built; one at a time in a process.

    Args:
        ranks: who holds the slices.
        max_whole_bytes: of parameters that stay whole between operations.
        small_bytes: parameters below are left alone.
        piece_device: where slices rest; None: where the parameter is.
        pin_memory: whether slices on the CPU are in pinned memory.
    """

    def __init__(
        self,
        ranks: Ranks,
        max_whole_bytes: int,
        small_bytes: int,
        piece_device: torch.device | None,
        pin_memory: bool,
    ) -> None:
        self._ranks = ranks
        self._max_whole_bytes = max_whole_bytes
        self._small_bytes = small_bytes
        self._piece_device = piece_device
        self._pin_memory = pin_memory
        self._kept: dict[int, _Kept] = {}
        self._whole: OrderedDict[int, _Kept] = OrderedDict()
        """Those that could be put away, the least recently touched first."""
        self._pinned: list[_Kept] = []
        self._modules: list[weakref.ref[nn.Module]] = []
        self._known_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._num_known = self._num_deferred = 0
        self._whole_bytes = 0
        self._purge_at = 64
        self._busy = False
        self._lock = threading.Lock()  # files are opened by threads of whoever loads them

    # ------------------------------------------------------------------------------------------------ operations

    def run(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A dispatched operation: what it touches is whole while it runs."""
        if self._busy or operation in _READ_NO_VALUES:
            return operation(*args, **kwargs)
        if torch_compat.is_view(operation):
            return self._view(operation, args, kwargs)
        with _Busy(self):
            used = {kept.number: kept for tensor in _tensors((args, kwargs)) if (kept := self._find(tensor))}
            if not used:
                return operation(*args, **kwargs)
            overwritten = self._overwritten(operation, args)
            for kept in used.values():
                self._make_whole(kept, with_values=kept is not overwritten)
            for kept in self._written(operation, args, kwargs, used):
                kept.rest = kept.source = None
            result = operation(*args, **kwargs)
            if operation is _aten.clone.default:
                # ``deepcopy`` makes parameters so, and no hook of torch tells of them.
                self._watch(result.untyped_storage(), f"a copy of {next(iter(used.values())).label}")
            # One rank alone may work on what is gathered: that must not move anything.
            if any(kept not in self._pinned for kept in used.values()):
                self._make_room(used.values())
        return result

    def _view(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A view reads nothing, but torch wants the memory to be there: for a moment it is, without values."""
        with _Busy(self):
            storages = []
            for tensor in _tensors(args):
                kept = self._find(tensor)
                if kept is not None and not kept.is_fixed and kept.storage.key not in self._whole:
                    storages.append(tensor.untyped_storage())
                    storages[-1].resize_(kept.nbytes)
            try:
                return operation(*args, **kwargs)
            finally:
                for storage in storages:
                    storage.resize_(0)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A function of torch that is no dispatched operation."""
        if self._busy:
            return function(*args, **kwargs)
        if function in _READ_MEMORY or function in _EXPOSE_MEMORY:
            with _Busy(self):
                for tensor in _tensors((args, kwargs)):
                    kept = self._find(tensor)
                    if kept is not None:
                        self._make_whole(kept)
                        if function in _EXPOSE_MEMORY:
                            self._fix(kept)
        result = function(*args, **kwargs)
        if function == _REPLACES_DATA and isinstance(args[0], nn.Parameter):
            with _Busy(self):
                self._adopt(args[0], "data")
        return result

    def _find(self, tensor: torch.Tensor) -> _Kept | None:
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return None
        return self._kept.get(torch_compat.storage_key(tensor.untyped_storage()))

    def _overwritten(self, operation: Any, args: tuple[Any, ...]) -> _Kept | None:
        """The storage whose former values do not matter, for all of it is written."""
        if operation not in _OVERWRITE or not isinstance(args[0], torch.Tensor):
            return None
        kept = self._find(args[0])
        if kept is None or not Geometry.of(args[0]).covers(kept.nbytes):
            return None
        return None if any(self._find(tensor) is kept for tensor in _tensors(args[1:])) else kept

    def _written(
        self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], used: dict[int, _Kept]
    ) -> Iterable[_Kept]:
        arguments = torch_compat.written_arguments(operation)
        if arguments is None:
            return used.values()
        values = [
            kwargs[name] if name in kwargs else args[i] for i, name in arguments if name in kwargs or i < len(args)
        ]
        return [kept for tensor in _tensors(values) if (kept := self._find(tensor)) is not None]

    # ---------------------------------------------------------------------------------------------------- moves

    def _make_whole(self, kept: _Kept, with_values: bool = True) -> None:
        if kept.is_fixed:
            return
        if kept.storage.key in self._whole:
            if kept not in self._pinned:
                self._whole.move_to_end(kept.storage.key)
            return
        storage = kept.storage.get()
        assert storage is not None  # whoever asks holds it
        storage.resize_(kept.nbytes)
        self._count_whole(kept)
        if with_values and kept.source is not None:
            kept.source.read(0, _bytes_of(storage))
        elif with_values and kept.rest is not None:
            kept.rest.gather_into(_bytes_of(storage))

    def _count_whole(self, kept: _Kept) -> None:
        self._whole[kept.storage.key] = kept
        self._whole_bytes += kept.nbytes

    def _discount_whole(self, kept: _Kept) -> None:
        if self._whole.pop(kept.storage.key, None) is not None:
            self._whole_bytes -= kept.nbytes

    def _make_room(self, in_use: Iterable[_Kept]) -> None:
        """Put away the least recently touched, until what is whole is within the limit."""
        if self._whole_bytes > self._max_whole_bytes:
            stay = {kept.number for kept in (*in_use, *self._pinned)}
            for kept in [kept for kept in self._whole.values() if kept.number not in stay]:
                storage = kept.storage.get()
                if storage is not None:
                    self._back_up(kept, storage)
                    storage.resize_(0)
                self._discount_whole(kept)
                if self._whole_bytes <= self._max_whole_bytes:
                    break
        self._purge()

    def _back_up(self, kept: _Kept, storage: torch.UntypedStorage) -> None:
        if not kept.is_backed:
            piece = self._ranks.deal(f"the dealing of {kept.name}", _bytes_of(storage))
            kept.rest = self._rest_of(kept, piece)

    def _rest_of(self, kept: _Kept, piece: torch.Tensor) -> Cut:
        if self._piece_device is not None:
            piece = piece.to(self._piece_device)
        if self._pin_memory and piece.device.type == "cpu" and torch.cuda.is_available():
            piece = piece.pin_memory()
        return Cut(kept.name, kept.nbytes, kept.device, piece, self._ranks)

    def _fix(self, kept: _Kept) -> None:
        kept.is_fixed = True
        kept.rest = kept.source = None  # whoever holds the memory may write
        self._discount_whole(kept)

    def _purge(self) -> None:
        """Forget storages that nobody holds."""
        if len(self._kept) < self._purge_at:
            return
        with self._lock:
            for key, kept in list(self._kept.items()):
                if kept.storage.get() is None:
                    del self._kept[key]
                    self._discount_whole(kept)
        self._purge_at = 2 * len(self._kept) + 64

    # ------------------------------------------------------------------------------------------- what is watched

    def on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """A module registers a parameter."""
        with _Busy(self):
            self._know(module)
            self._adopt(parameter, f"{type(module).__name__}.{name}")
            self._make_room([kept] if (kept := self._find(parameter)) else [])

    def on_module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        """A module registers another: copies hold parameters that nobody has registered."""
        if child is None:
            return
        with _Busy(self):
            for part in child.modules():
                if part not in self._known_modules:
                    self._know(part)
                    for own, parameter in part.named_parameters(recurse=False):
                        self._adopt(parameter, f"{type(part).__name__}.{own}")
            self._make_room([])

    def _know(self, module: nn.Module) -> None:
        if module not in self._known_modules:
            self._known_modules.add(module)
            self._modules.append(weakref.ref(module))

    def _adopt(self, parameter: torch.Tensor, label: str) -> None:
        if (
            not isinstance(parameter, nn.Parameter)
            or isinstance(parameter, UninitializedParameter)
            or parameter.layout is not torch.strided
            or parameter.device.type == "meta"
        ):
            return
        kept = self._find(parameter)
        if kept is None and parameter.untyped_storage().nbytes() >= self._small_bytes:
            kept = self._watch(parameter.untyped_storage(), label)
        if kept is None:
            return
        if kept.number < 0:  # came from a file, by a thread: all ranks meet it here in the same order
            kept.number, kept.label = self._next_number(), label
        if not any(reference() is parameter for reference in kept.parameters):
            kept.parameters.append(weakref.ref(parameter))

    def _next_number(self) -> int:
        self._num_known += 1
        return self._num_known

    def _watch(self, storage: torch.UntypedStorage, label: str) -> _Kept | None:
        if storage.nbytes() < self._small_bytes:
            return None
        kept = _Kept(storage, label, self._next_number())
        with self._lock:
            self._kept[kept.storage.key] = kept
        if not kept.is_fixed:
            self._count_whole(kept)
        return kept

    def defer(self, source: Source, shape: torch.Size, dtype: torch.dtype, label: str) -> torch.Tensor:
        """A tensor whose values are in a file; it reads them when it is touched. Any thread may ask."""
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._small_bytes:
            source.read(0, _bytes_of(storage))
            return tensor
        with self._lock:
            self._num_deferred += 1
            kept = _Kept(storage, label, -self._num_deferred)
        kept.source = source
        storage.resize_(0)
        with self._lock:
            self._kept[kept.storage.key] = kept
        return tensor

    def resume(self) -> None:
        """Parameters that rest in pieces come whole by themselves again."""
        with _Busy(self):
            for module in pieces.unguard_modules():
                self._know(module)
            parked = pieces.all_parked()
            for rest, parameters in pieces.parameters_by_cut([parameter for parameter, _ in parked]).items():
                memory = torch.empty(rest.nbytes, dtype=torch.uint8, device=rest.device)
                storage = memory.untyped_storage()
                kept = _Kept(storage, rest.name.partition(" (the ")[0], self._next_number())
                kept.rest = rest
                self._kept[kept.storage.key] = kept
                for parameter in parameters:
                    found = pieces.parked(parameter)
                    assert found is not None
                    parameter.data = found.geometry.over(memory)
                    pieces.unpark(parameter)
                    self._adopt(parameter, kept.label)
                storage.resize_(0)

    # ------------------------------------------------------------------------------------- whole on request, end

    def gather(self, parameters: Iterable[torch.Tensor]) -> list[int]:
        """Make ``parameters`` whole until ``release`` of what is returned. Collective."""
        with _Busy(self):
            found = [kept for parameter in parameters if (kept := self._find(parameter)) is not None]
            self._pinned += found
            for kept in found:
                self._make_whole(kept)
            self._make_room([])
        return [kept.storage.key for kept in found]

    def spread(self, keys: list[int], source: int) -> None:
        """Let everybody have what rank ``source`` has of what was gathered. Collective."""
        with _Busy(self):
            for key in keys:
                kept = self._kept[key]
                storage = kept.storage.get()
                if storage is not None:
                    self._ranks.broadcast(f"the new values of {kept.name}", _bytes_of(storage), source)
                    kept.rest = kept.source = None

    def release(self, keys: list[int]) -> None:
        """End a ``gather``."""
        with _Busy(self):
            for key in keys:
                self._pinned.remove(self._kept[key])
            self._make_room([])

    def end(self) -> None:
        """Let everything rest in pieces. Collective."""
        gc.collect()  # what died in a circle of references must be dead on every rank
        roll_call.answer("the end of zero.Init")
        with _Busy(self):
            modules = [module for reference in self._modules if (module := reference()) is not None]
            for module in modules:
                for name, parameter in module.named_parameters(recurse=False):
                    self._adopt(parameter, f"{type(module).__name__}.{name}")
            for kept in sorted(self._kept.values(), key=lambda kept: kept.number):
                self._end_one(kept)
            pieces.guard_modules(modules)

    def give_up(self) -> None:
        """The construction raised: no collectives; what is away rests in pieces, what is whole stays so."""
        with _Busy(self):
            for kept in self._kept.values():
                storage = kept.storage.get()
                if storage is None or kept.storage.key in self._whole or kept.is_fixed:
                    continue
                rest = self._settle(kept, storage)
                for parameter in list(kept.alive()):
                    pieces.park(parameter, rest, Geometry.of(parameter))

    def _end_one(self, kept: _Kept) -> None:
        parameters = list(kept.alive())
        storage = kept.storage.get()
        if storage is None:
            return
        if not parameters:
            self._make_whole(kept)  # no parameter, but somebody has it
            return
        rest = self._settle(kept, storage)
        del storage
        for parameter in parameters:
            pieces.park(parameter, rest, Geometry.of(parameter))
        left = kept.storage.get()
        if left is not None and not kept.is_fixed:
            logger.warning(
                "a tensor outside of the model shares the memory of %s: it stays whole on every rank.", kept.name
            )
            kept.rest = rest
            self._make_whole(kept)

    def _settle(self, kept: _Kept, storage: torch.UntypedStorage) -> Cut:
        if kept.source is not None:
            mine = self._ranks.spans(kept.nbytes)[self._ranks.rank]
            piece = torch.empty(mine.numel, dtype=torch.uint8, device=kept.device)
            kept.source.read(mine.begin, piece)
            kept.rest = self._rest_of(kept, piece)
            kept.source = None
        else:
            self._back_up(kept, storage)
        assert kept.rest is not None
        return kept.rest


class _Busy:
    """Our own operations are not watched."""

    def __init__(self, construction: Construction) -> None:
        self._construction = construction

    def __enter__(self) -> None:
        self._before = self._construction._busy
        self._construction._busy = True

    def __exit__(self, *_: object) -> None:
        self._construction._busy = self._before


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


class _Operations(torch_compat.TorchDispatchMode):
    """Shows every operation to a construction."""

    def __init__(self, construction: Construction) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._construction = construction

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._construction.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Shows every function of torch to a construction."""

    def __init__(self, construction: Construction) -> None:
        super().__init__()
        self._construction = construction

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._construction.call(func, args, kwargs or {})


_current: Construction | None = None


def current_construction() -> Construction | None:
    """That of the ``Init`` that is open in this process."""
    return _current


class Init(AbstractContextManager["Init"]):
    """Build a model in pieces: inside, modules are constructed as anywhere, and no rank ever holds the whole model.

    ::

        with shardwise.zero.Init():
            model = Model(config)                 # or AutoModel.from_config, from_pretrained, …
        engine, *_ = shardwise.initialize(model=model, config=…)

    The values are bit for bit those that rank 0 would have built by itself. On one rank alone nothing is sharded, and
    the model is built as it is without. Enter and leave it on every rank. Where ``transformers`` is imported,
    ``from_pretrained`` reads safetensors by ranges inside: its name ``safe_open`` is replaced until the context ends.

    Args:
        module: a model that is built already, to be put in pieces at once; then this need not be entered.
        data_parallel_group: refused unless it is all ranks.
        mem_efficient_linear: has no effect: autograd keeps no copy of a weight here.
        remote_device: where pieces rest: "cpu", or None for the parameter's own device.
        pin_memory: whether pieces on the CPU are in pinned memory, where there is CUDA.
        config_dict_or_path: a DeepSpeed configuration; it is checked, and changes nothing: masters keep what is built.
        config: the same.
        enabled: False does nothing.
        dtype: torch's default dtype inside; None leaves it.
        mpu: refused: all ranks are data-parallel.
        zero_param_parallel_group: refused, as the next two.
        zero_quantized_weights: refused unless False.
        zero_quantized_nontrainable_weights: refused unless False.
        sequence_data_parallel_group: refused.
        param_swapper: refused: a store is chosen by the configuration of ``initialize``.
        tensor_overrides: has no effect: no constructor of torch is replaced.
        max_whole_bytes: of parameters that stay whole between operations; what one operation touches comes on top.
        small_bytes: parameters below are left whole.

    Raises:
        ConfigError: an argument asks for what is not here.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        tensor_overrides: bool = True,
        *,
        max_whole_bytes: int = MAX_WHOLE_BYTES,
        small_bytes: int = SMALL_BYTES,
    ) -> None:
        del mem_efficient_linear, tensor_overrides
        asked = {
            "data_parallel_group": data_parallel_group not in (None, torch.distributed.group.WORLD),
            "mpu": mpu is not None,
            "zero_param_parallel_group": zero_param_parallel_group is not None,
            "zero_quantized_weights": zero_quantized_weights,
            "zero_quantized_nontrainable_weights": zero_quantized_nontrainable_weights,
            "sequence_data_parallel_group": sequence_data_parallel_group is not None,
            "param_swapper": param_swapper is not None,
        }
        refused = [name for name, is_asked in asked.items() if is_asked]
        if refused:
            raise ConfigError(
                f"zero.Init() got {', '.join(refused)}: pieces are even slices over all ranks, in the dtype of the "
                "parameter. Leave it out; how states travel and rest is said in the configuration of initialize()."
            )
        if remote_device not in (None, "none", "cpu", "cuda"):
            raise ConfigError(
                f"zero.Init(remote_device={remote_device!r}): pieces rest on 'cpu', or with None where the parameter "
                "is. Files hold states only in training: see offload_param in the configuration of initialize()."
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"zero.Init(dtype={dtype}): expected a floating-point dtype, such as torch.bfloat16.")
        for given in (config_dict_or_path, config):
            if given is not None:
                open_source(given)
        self._enabled = enabled
        self._dtype = dtype
        self._piece_device = torch.device("cpu") if remote_device == "cpu" else None
        self._pin_memory = pin_memory
        self._max_whole_bytes = max_whole_bytes
        self._small_bytes = small_bytes
        self._open: list[tuple[ExitStack, Construction | None]] = []
        if module is not None and enabled:
            with self:
                if _current is not None:
                    _current.on_module(module, "", module)

    def __enter__(self) -> Init:
        global _current
        stack = ExitStack()
        construction = None
        if self._enabled and self._dtype is not None:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self._dtype)
        if self._enabled and _current is None:
            construction = self._begin(stack)
        self._open.append((stack, construction))
        return self

    def _begin(self, stack: ExitStack) -> Construction | None:
        global _current
        init_distributed()
        mesh = build_mesh(None, DEFAULT_TIMEOUT)
        if mesh.world.size == 1:
            return None
        construction = Construction(
            Ranks(mesh), self._max_whole_bytes, self._small_bytes, self._piece_device, self._pin_memory
        )
        roll_call.answer("the begin of zero.Init")
        construction.resume()
        _current = construction
        stack.callback(_forget)
        for register, hook in (
            (module_hooks.register_module_parameter_registration_hook, construction.on_parameter),
            (module_hooks.register_module_module_registration_hook, construction.on_module),
        ):
            stack.callback(register(hook).remove)
        stack.enter_context(lazy_files.opened_lazily(construction.defer))
        stack.enter_context(_Functions(construction))
        stack.enter_context(_Operations(construction))
        return construction

    def __exit__(self, kind: Any, *_: object) -> None:
        stack, construction = self._open.pop()
        stack.close()
        if construction is None:
            return
        if kind is None:
            construction.end()
        else:
            construction.give_up()


def _forget() -> None:
    global _current
    _current = None


def refuse_inside(what: str) -> None:
    """StateError if a model is being built at this moment."""
    if _current is not None:
        raise StateError(f"{what} was called inside zero.Init(). Leave the context first, on every rank.")
