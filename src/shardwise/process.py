"""The process as one of many: its rank, its device, who is first, and how all wait for one another.

``PartialState`` is the one piece of process-wide state of the front end. It is made on first use, by the script or by
whatever of shardwise needs it; every later ``PartialState()`` is a view of the same facts. The engine below never
looks at it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from enum import StrEnum
from functools import wraps
from typing import Any, ClassVar, ParamSpec, TypeVar, overload

import torch
import torch.distributed as dist

from shardwise import roll_call
from shardwise.config.run.said import Asked
from shardwise.errors import ConfigError, StateError
from shardwise.launch.handed_over import handed_over
from shardwise.mesh import DEFAULT_TIMEOUT, choose_device, init_distributed

P = ParamSpec("P")
R = TypeVar("R")


class DistributedType(StrEnum):
    """What kind of distributed run this is. Scripts compare with all of them; shardwise runs the first four."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    MEGATRON_LM = "MEGATRON_LM"
    XLA = "XLA"
    MULTI_HPU = "MULTI_HPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_NEURON = "MULTI_NEURON"
    MULTI_NPU = "MULTI_NPU"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_XPU = "MULTI_XPU"


class StateResetError(StateError, AttributeError):
    """A fact is asked of a PartialState that was reset."""


class PartialState:
    """The facts of this process, and control over what runs on which process.

    The first one joins the process group that the launcher's environment describes (``init_distributed``), or takes
    the one that the script has made. Every later one shares its facts.

    Args:
        cpu: run on the CPU even where there is a GPU.
        backend: of the process group: "gloo", "nccl", or None for what the device needs.
        timeout: how long a rank waits for the others before it ends with an error that names them.

    Raises:
        ConfigError: a later one asks for another device or backend than there is.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}

    distributed_type: DistributedType
    """What the front end runs; it says DEEPSPEED here once a ZeRO config is in play."""
    backend: str | None
    """Of the process group, for this process's device; None in a process of its own."""
    device: torch.device
    num_processes: int
    process_index: int
    local_process_index: int
    debug: bool
    """Compare data across ranks at once before each operation on them (``shardwise.operations``)."""

    def __init__(self, cpu: bool = False, *, backend: str | None = None, timeout: timedelta | None = None) -> None:
        self.__dict__ = self._shared_state
        if self.initialized:
            self._refuse_another(cpu, backend)
            return
        asked = handed_over(os.environ)
        device = "cpu" if cpu or _is_said(asked, "use_cpu") else None
        init_distributed(backend, timeout or DEFAULT_TIMEOUT, device)
        self.device = choose_device(device)
        self.debug = _is_said(asked, "debug")
        if not dist.is_initialized():
            self.distributed_type = DistributedType.NO
            self.backend = None
            self.num_processes, self.process_index, self.local_process_index = 1, 0, 0
            return
        roll_call.current()  # from here on the others learn when this script ends
        on_gpu = self.device.type == "cuda"
        self.distributed_type = DistributedType.MULTI_GPU if on_gpu else DistributedType.MULTI_CPU
        self.backend = group_backends().get(self.device.type)
        self.num_processes = dist.get_world_size()
        self.process_index = dist.get_rank()
        self.local_process_index = int(os.environ.get("LOCAL_RANK", self.process_index))
        if on_gpu:
            self.set_device()

    def _refuse_another(self, cpu: bool, backend: str | None) -> None:
        advice = "Make the one with arguments before everything else that uses shardwise's front end."
        if cpu and self.device.type != "cpu":
            raise ConfigError(f"PartialState(cpu=True), but this process runs on {self.device} already. {advice}")
        if backend is not None and self.backend is not None and self.backend not in backend:
            raise ConfigError(
                f"PartialState(backend={backend!r}), but the process group runs {self.backend} already. {advice}"
            )

    def __getattr__(self, name: str) -> Any:
        # Only for what is not there: nothing is once the state was reset.
        if name in PartialState.__annotations__ and not self._shared_state:
            raise StateResetError(
                f"PartialState was reset, so it has no {name}. Make a PartialState() or an Accelerator()."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        backend = f"  Backend: {self.backend}" if self.backend else ""
        return (
            f"Distributed environment: {self.distributed_type}{backend}\n"
            f"Num processes: {self.num_processes}\n"
            f"Process index: {self.process_index}\n"
            f"Local process index: {self.local_process_index}\n"
            f"Device: {self.device}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        """Forget the facts, for tests: the next PartialState() finds them anew. A process group stays as it is."""
        PartialState._shared_state.clear()

    @property
    def initialized(self) -> bool:
        """Whether the facts were found: true but after a reset."""
        return bool(self._shared_state)

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.num_processes > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first process of all."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last process of all."""
        return self.process_index == self.num_processes - 1

    @property
    def default_device(self) -> torch.device:
        """The device of a process that asks for nothing: a GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def set_device(self) -> None:
        """Make this process's GPU the current one of torch; nothing to do on the CPU."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    # -- waiting

    def wait_for_everyone(self) -> None:
        """Go on when every process is here and its GPU has done what was asked of it.

        Raises:
            CollectiveError: a process will not come: it waits elsewhere, or has left its script.
        """
        self._meet("wait_for_everyone")

    def _meet(self, place: str) -> None:
        if self.use_distributed:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            roll_call.answer(place)

    def main_process_first(self) -> AbstractContextManager[None]:
        """The first process runs the block before the others do: it downloads or caches what they then find.

        Nothing in the block may need all processes: the others are not there yet.
        """
        return self._first("main_process_first", self.is_main_process)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """The first process of each machine runs the block before the others do (see ``main_process_first``)."""
        return self._first("local_main_process_first", self.is_local_main_process)

    @contextmanager
    def _first(self, name: str, is_first: bool) -> Iterator[None]:
        if not is_first:
            self._meet(name)
        yield
        # Not where the block failed: the others shall not run it on a half-made cache, but learn that this one ended.
        if is_first:
            self._meet(name)

    # -- what runs where

    def on_main_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: run ``function`` on the first process alone; None on the others."""
        return _only_where(lambda: self.is_main_process, function)

    def on_local_main_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: run ``function`` on the first process of each machine alone; None on the others."""
        return _only_where(lambda: self.is_local_main_process, function)

    def on_last_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: run ``function`` on the last process alone; None on the others."""
        return _only_where(lambda: self.is_last_process, function)

    @overload
    def on_process(self, function: Callable[P, R], process_index: int) -> Callable[P, R | None]: ...
    @overload
    def on_process(
        self, function: None = None, process_index: int | None = None
    ) -> Callable[[Callable[P, R]], Callable[P, R | None]]: ...
    def on_process(self, function: Any = None, process_index: int | None = None) -> Any:
        """Decorator, also with arguments: run ``function`` on process ``process_index`` alone; None on the others."""
        wanted = self._index(process_index, self.num_processes, "process_index")
        if function is None:
            return lambda function: self.on_process(function, wanted)
        return _only_where(lambda: self.process_index == wanted, function)

    @overload
    def on_local_process(self, function: Callable[P, R], local_process_index: int) -> Callable[P, R | None]: ...
    @overload
    def on_local_process(
        self, function: None = None, local_process_index: int | None = None
    ) -> Callable[[Callable[P, R]], Callable[P, R | None]]: ...
    def on_local_process(self, function: Any = None, local_process_index: int | None = None) -> Any:
        """Decorator, also with arguments: run ``function`` on that process of each machine alone; None elsewhere."""
        wanted = self._index(local_process_index, self.num_processes, "local_process_index")
        if function is None:
            return lambda function: self.on_local_process(function, wanted)
        return _only_where(lambda: self.local_process_index == wanted, function)

    def _index(self, index: int | None, number: int, name: str) -> int:
        if index is None:
            raise ConfigError(f"{name} is missing: expected a number from 0 to {number - 1}.")
        if not 0 <= index < number:
            raise ConfigError(f"{name}={index}, but there are {number} processes: expected 0 to {number - 1}.")
        return index

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print`` on the first process of each machine alone."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Give each process its share of ``inputs``, in order; the first processes get one more where it is uneven.

        Args:
            inputs: a list, tuple, tensor, array or ``datasets.Dataset``; or a dict of such, all of one length. A string
                is one thing and goes to every process.
            apply_padding: repeat the last item of a short share (the last of all where it is empty), so that every
                process gets equally many.
        """
        yield split(inputs, self.process_index, self.num_processes, apply_padding)

    def destroy_process_group(self, group: dist.ProcessGroup | None = None) -> None:
        """End ``group``, or the default process group; without one nothing happens."""
        if dist.is_initialized():
            if group is None:
                roll_call.leave()
            dist.destroy_process_group(group)


def _is_said(asked: Asked, name: str) -> bool:
    said = asked.said(name)
    return said is not None and bool(said.value)


def process_index() -> int:
    """The rank of this process, also before a PartialState was made."""
    if PartialState._shared_state:
        return PartialState().process_index
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def group_backends() -> dict[str, str]:
    """Of the default process group: the backend for each type of device, such as ``{"cpu": "gloo"}``; empty without."""
    if not dist.is_initialized():
        return {}
    pairs = (entry.partition(":") for entry in dist.get_backend_config().split(","))
    return {device: backend for device, _, backend in pairs}


def _only_where(is_here: Callable[[], bool], function: Callable[P, R]) -> Callable[P, R | None]:
    @wraps(function)
    def gated(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if is_here() else None

    return gated


# -- shares


def share(length: int, process_index: int, num_processes: int) -> range:
    """The positions of this process's share of ``length`` items: even, the first processes take what is left over."""
    each, left_over = divmod(length, num_processes)
    begin = process_index * each + min(process_index, left_over)
    return range(begin, begin + each + (process_index < left_over))


def split(inputs: Any, process_index: int, num_processes: int, apply_padding: bool) -> Any:
    """This process's share of ``inputs`` (see ``PartialState.split_between_processes``)."""
    if num_processes == 1:
        return inputs
    if isinstance(inputs, dict):
        lengths = {key: len(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"all values to split must have one length, but they have {lengths}.")
        return {key: split(value, process_index, num_processes, apply_padding) for key, value in inputs.items()}
    if isinstance(inputs, (str, bytes)) or not hasattr(inputs, "__len__"):
        return inputs
    mine = share(len(inputs), process_index, num_processes)
    missing = math.ceil(len(inputs) / num_processes) - len(mine) if apply_padding else 0
    # A share that is empty repeats the last item of all, which is also the last of the last share that is not.
    positions = [*mine, *[mine.stop - 1] * missing]
    # A datasets.Dataset, of which a slice would be a dict of columns; a tensor's ``select`` is another thing.
    if hasattr(inputs, "select") and not isinstance(inputs, torch.Tensor):
        return inputs.select(positions)
    if hasattr(inputs, "shape") and missing:
        return inputs[positions]
    result = inputs[mine.start : mine.stop]
    for _ in range(missing):
        result = result + inputs[mine.stop - 1 : mine.stop]
    return result
