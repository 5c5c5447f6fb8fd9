"""Pickles as data: an interpreter for what ``torch.save`` writes that can build values and call nothing.

Python's own unpickler looks up whatever a file names and calls it; a list of what it may look up is only as safe as
each entry's attributes. Here a name is only a name. Calls in the file are requests, and those below are answered by
building the plain value that they stand for; any other ends the reading.
"""

from __future__ import annotations

import math
import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shardwise.errors import CheckpointError

MAX_PICKLE_BYTES = 1 << 29
"""Far above what the names of a model take."""

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values()
                if isinstance(dtype, torch.dtype)}  # fmt: skip


@dataclass(frozen=True)
class Name:
    """A global that the file names; nothing was looked up."""

    text: str


@dataclass
class Record:
    """An object of somebody's class: its attributes, and nothing that could run."""

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Array:
    """A NumPy dtype or array until its state is there."""

    value: Any = None


Build = Callable[[tuple[Any, ...]], Any]
"""Makes the value that a call in the file stands for, of the call's arguments."""


class Refused(CheckpointError):
    """A pickle asks for something that only running foreign code could give."""


def read_pickle(
    data: bytes, tensors: Mapping[str, Build], find_storage: Build, inert: frozenset[str], place: str
) -> Any:
    """The value in a pickle.

    Args:
        data: the pickle.
        tensors: by the names of torch's functions that make tensors, what to do instead.
        find_storage: what to do with a reference to data outside of the pickle.
        inert: names that may stand as arguments: of storage types, and of classes of tensors.
        place: the file, for messages.

    Raises:
        CheckpointError: the file asks for something else than plain values, or is damaged.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{place} holds a pickle of {len(data)} bytes: expected at most {MAX_PICKLE_BYTES}.")
    machine = _Machine({**_BUILDS, **tensors}, find_storage, inert, place)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.do(opcode.name, argument)
        return machine.result()
    except CheckpointError:
        raise
    # Whatever a damaged file makes of the stack or of a value is a damaged file.
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place} is damaged: its pickle makes no sense ({type(error).__name__}).") from error


class _Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self, builds: Mapping[str, Build], find_storage: Build, inert: frozenset[str], place: str) -> None:
        self._builds = builds
        self._find_storage = find_storage
        self._inert = inert | _INERT
        self._place = place
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks that MARK has put aside
        self._memo: dict[int, Any] = {}
        self._done = False

    def result(self) -> Any:
        """What is left at the end."""
        if not self._done or self._below or len(self._stack) != 1:
            raise ValueError("no end")
        return self._stack[0]

    def do(self, opcode: str, argument: Any) -> None:
        """One instruction."""
        stack = self._stack
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[int(argument)] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[int(argument)])
        elif opcode == "STOP":
            self._done = True
        elif opcode not in ("PROTO", "FRAME"):
            self._do_rarer(opcode, argument)

    def _do_rarer(self, opcode: str, argument: Any) -> None:
        if opcode == "INST":
            self._global(argument)  # names what it would have made
        action = getattr(self, f"_{opcode.lower()}", None) if opcode in _ACTIONS else None
        if action is None:
            raise Refused(
                f"{self._place} was not read: its pickle has the instruction {opcode}, which torch.save does not write."
            )
        action() if opcode != "GLOBAL" else action(argument)

    # --- containers

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _tuple(self) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _tuple1(self) -> None:
        self._take(1)

    def _tuple2(self) -> None:
        self._take(2)

    def _tuple3(self) -> None:
        self._take(3)

    def _take(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _append(self) -> None:
        item = self._stack.pop()
        self._list().append(item)

    def _appends(self) -> None:
        items = self._since_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        found = self._stack[-1]
        if type(found) is not list:
            raise TypeError
        return found

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        found = self._stack[-1]
        if type(found) not in (dict, OrderedDict):
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            found[check_key(key)] = value

    def _additems(self) -> None:
        items = self._since_mark()
        found = self._stack[-1]
        if type(found) is not set:
            raise TypeError
        found.update(map(check_key, items))

    # --- what would be calls

    def _global(self, argument: str) -> None:
        self._name(".".join(argument.split(" ", 1)))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(f"{module}.{name}")

    def _name(self, text: str) -> None:
        head, _, tail = text.rpartition(".")
        if head == "torch" and tail in _DTYPE_NAMES:
            self._stack.append(_DTYPE_NAMES[tail])
        elif text in self._builds or text in _RECORDS or text in self._inert:
            self._stack.append(Name(text))
        else:
            raise Refused(
                f"{self._place} was not read: it holds an object of {text[:120]!r}, and only running that could bring "
                "it back. Expected tensors, numbers, texts and their nests. Save it without that object, such as the "
                "script's own values in client_state."
            )

    def _reduce(self) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        self._stack.append(self._answer(called, arguments))

    def _newobj(self) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if not isinstance(called, Name) or called.text not in _RECORDS or arguments != ():
            raise TypeError
        self._stack.append(Record(called.text))

    def _answer(self, called: Any, arguments: Any) -> Any:
        if not isinstance(called, Name) or type(arguments) is not tuple:
            raise TypeError
        build = self._builds.get(called.text)
        if build is None:
            raise Refused(f"{self._place} was not read: it wants to call {called.text!r}.")
        return build(arguments)

    def _build(self) -> None:
        state = self._stack.pop()
        found = self._stack[-1]
        if isinstance(found, Record):
            for part in state if type(state) is tuple else (state,):
                found.attributes |= part or {}
        elif isinstance(found, _Array):
            _fill(found, state)
        elif type(found) is not OrderedDict:  # a state dict's versions of modules
            raise TypeError

    def _binpersid(self) -> None:
        self._stack.append(self._find_storage(self._stack.pop()))


_VALUES = frozenset({
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
})  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_SET": set,
}  # fmt: skip
_ACTIONS = frozenset({
    "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "GLOBAL",
    "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
})  # fmt: skip


def check_key(key: Any) -> Any:
    """A key that is cheap to hash: tuples of tuples of tuples of one and the same take for ever.

    Raises:
        TypeError: it is none.
    """
    simple = (str, int, float, bool, bytes, type(None), torch.dtype)
    if not isinstance(key, simple) and not (type(key) is tuple and all(isinstance(part, simple) for part in key)):
        raise TypeError
    return key


# --- values that files ask for ----------------------------------------------------------------------------------------


def _ordered(arguments: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    found: OrderedDict[Any, Any] = OrderedDict()
    for pairs in arguments:
        for key, value in pairs:
            found[check_key(key)] = value
    return found


def _dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    # defaultdict(list, {...}) and defaultdict(list): what it would make of itself is of no use here.
    return {check_key(key): value for part in arguments if type(part) is dict for key, value in part.items()}


def _counter(arguments: tuple[Any, ...]) -> Counter[Any]:
    return Counter(_dict(arguments))


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    return {check_key(item) for items in arguments for item in items}


def _size(arguments: tuple[Any, ...]) -> torch.Size:
    (dims,) = arguments
    if not all(type(dim) is int and dim >= 0 for dim in dims):
        raise TypeError
    return torch.Size(dims)


def _number(arguments: tuple[Any, ...]) -> int | float | str:
    (value,) = arguments
    if type(value) not in (int, float, str):
        raise TypeError
    result: int | float | str = value
    return result


def _device(arguments: tuple[Any, ...]) -> str:
    return ":".join(map(str, arguments))


def _bytes(arguments: tuple[Any, ...]) -> bytes:
    text, encoding = arguments
    if encoding != "latin1":
        raise ValueError
    return bytes(text, "latin1")


def _numpy_dtype(arguments: tuple[Any, ...]) -> _Array:
    if type(arguments[0]) is not str or arguments[0].lstrip("<>=|")[:1] not in tuple("fiub"):
        raise TypeError
    return _Array(np.dtype(arguments[0]))


def _numpy_scalar(arguments: tuple[Any, ...]) -> int | float | bool:
    dtype, data = arguments
    value: int | float | bool = np.frombuffer(data, dtype.value, 1)[0].item()
    return value


def _numpy_array(arguments: tuple[Any, ...]) -> _Array:
    return _Array()


def _fill(found: _Array, state: Any) -> None:
    if isinstance(found.value, np.dtype):
        found.value = found.value.newbyteorder(state[1])
        return
    _, shape, dtype, fortran, data = state
    if not isinstance(data, bytes) or math.prod(shape) * dtype.value.itemsize != len(data):
        raise ValueError
    found.value = np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C").copy()


_SCALER = "deepspeed.runtime.fp16.loss_scaler."
_RECORDS = frozenset({
    "deepspeed.utils.tensor_fragment.fragment_address", "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "argparse.Namespace", *(_SCALER + name for name in ("LossScaler", "DynamicLossScaler", "LossScaleConfig")),
})  # fmt: skip
"""Classes whose objects are kept as their attributes."""
_INERT = frozenset({"builtins.list", "builtins.dict", "builtins.int", "builtins.float", "numpy.ndarray"})
"""Names that stand as arguments of a call."""
_BUILDS: dict[str, Build] = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _dict,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _bytes,
    "numpy.dtype": _numpy_dtype,
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _numpy_array for core in ("core", "_core")},
    "deepspeed.runtime.zero.config.ZeroStageEnum": _number,
    "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum": _number,
    "deepspeed.runtime.fp16.loss_scaler.LossScaleProfile": _number,
}


# --- values that leave ------------------------------------------------------------------------------------------------

MAX_VALUES = 10_000_000
"""Numbers, texts and nests that one value may hold, each counted as often as it is met."""
MAX_NESTING = 100


def plain(value: Any, place: str, leaf: Callable[[Any], Any] = lambda found: found) -> Any:
    """A copy of ``value`` in plain Python: what NumPy's stand-ins and records hold, nothing of this module.

    Args:
        value: nested.
        place: for messages.
        leaf: makes something else of what is no nest, such as a tensor of its place in a file.

    Raises:
        CheckpointError: it is nested without end, or one small part of it stands in it too often to be copied.
    """
    budget = [MAX_VALUES]

    def walk(found: Any, depth: int) -> Any:
        budget[0] -= 1
        if budget[0] < 0 or depth > MAX_NESTING:
            raise CheckpointError(f"{place} holds a value of more than {MAX_VALUES} parts, or {MAX_NESTING} nests.")
        if isinstance(found, (dict, OrderedDict, Counter)):
            made = {key: walk(item, depth + 1) for key, item in found.items()}
            return Counter(made) if isinstance(found, Counter) else made
        if isinstance(found, torch.Size):
            return tuple(found)
        if isinstance(found, (list, tuple, set)):
            return type(found)(walk(item, depth + 1) for item in found)
        if isinstance(found, Record):
            return walk(found.attributes, depth + 1)
        if isinstance(found, _Array):
            return found.value if isinstance(found.value, np.ndarray) else str(found.value)
        if isinstance(found, Name):
            return found.text
        return leaf(found)

    return walk(value, 0)
