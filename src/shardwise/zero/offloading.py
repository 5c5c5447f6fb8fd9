"""The stores of one engine: what rests in them, the host memory that it passes through, and the room that it takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from shardwise.comm.base import CollectiveId, Communicator
from shardwise.config import EngineConfig
from shardwise.config.zero import OffloadOptimizerConfig, OffloadParamConfig
from shardwise.errors import ConfigError, StateError, StorageError
from shardwise.layout import Layout
from shardwise.optim.probe import OptimizerTraits
from shardwise.precision import master_dtype
from shardwise.store.allocator import return_freed_memory
from shardwise.store.base import Store
from shardwise.store.beside import Beside
from shardwise.store.direct_io import DirectIO
from shardwise.store.host_memory import HostMemory
from shardwise.store.io_settings import IOSettings
from shardwise.store.run_directory import RunDirectory, new_run_id
from shardwise.store.swap_file import SwapFile
from shardwise.zero.form import Codes
from shardwise.zero.landings import Landings
from shardwise.zero.offload import ON_THE_DEVICE, Offload, Place, Places
from shardwise.zero.offloaded_parameters import NearShards, ShardPlace
from shardwise.zero.shard_states import (
    GRADIENT,
    MASTER,
    WINDOW_NUMEL,
    ShardStates,
    WindowPlan,
    cut_windows,
)
from shardwise.zero.sharding import Sharding
from shardwise.zero.staging import Staging


@dataclass(frozen=True, slots=True)
class Buffer:
    """A flat buffer to be, as far as its resting places depend on it."""

    layout: Layout
    dtype: torch.dtype
    trainable: bool
    sharding: Sharding
    codes: Codes | None = None

    def resting_bytes(self, num_values: int) -> int:
        """Of a shard of so many parameters."""
        return num_values * self.dtype.itemsize if self.codes is None else self.codes.numel(num_values)


def plan_window(offload: Offload, buffer: Buffer, traits: OptimizerTraits, device_type: str) -> WindowPlan:
    """What a window of this buffer holds.

    A parameter that rests where the CPU steps it, in the dtype that it is stepped in, is its own master.
    """
    wide = master_dtype(buffer.dtype)
    near_the_cpu = offload.parameter is Place.HOST or (offload.parameter is Place.DEVICE and device_type == "cpu")
    in_a_file = offload.parameter is Place.NVME
    kinds: list[tuple[str, torch.dtype]] = []
    if buffer.sharding.gradient or device_type != "cpu":
        kinds.append((GRADIENT, wide))
    if wide != buffer.dtype or not (near_the_cpu or in_a_file):
        kinds.append((MASTER, wide))
    kinds += [(kind, wide if dtype == torch.float32 else dtype) for kind, dtype in traits.states]
    travels_narrow = not near_the_cpu and wide != buffer.dtype
    return WindowPlan(tuple(kinds), buffer.dtype if in_a_file or travels_narrow else None)


class Offloading:
    """Stores, staging and places of one engine; made in three moves::

        places = offloading.plan(buffers)     room is reserved
        offloading.open()                     and taken: collective, fails on all ranks or none
        ...                                   homes are built, which write their first values
        offloading.close()

    Args:
        comm: the transport.
        config: of the engine.
        wanted: places, from ``choose_offload``.
        traits: of the optimizer; None: there is none.
    """

    def __init__(
        self, comm: Communicator, config: EngineConfig, wanted: Offload, traits: OptimizerTraits | None
    ) -> None:
        zero = config.zero_optimization
        self._comm = comm
        self._traits = traits
        self._parameter: OffloadParamConfig = zero.offload_param
        self._optimizer: OffloadOptimizerConfig = zero.offload_optimizer
        self._io_settings = IOSettings.of(config.aio)
        self.wanted = wanted if traits is not None else Offload(wanted.parameter)
        self._window_numel = min(WINDOW_NUMEL, max(1, zero.sub_group_size))
        self._io: DirectIO | None = None
        self._directories: dict[str, RunDirectory] = {}
        self._parameter_store: Store | None = None
        self._state_store: Store | None = None
        self._parameter_staging: Staging | None = None
        self._state_staging: Staging | None = None
        self._landings: Landings | None = None
        self._beside = Beside(comm.device)
        self._near = NearShards()
        self._places: list[Places] = []
        self._largest_shard = (0, 0)

    # ----------------------------------------------------------------------------------------------------- plan

    def plan(self, buffers: Sequence[Buffer]) -> list[Places]:
        """Choose the place of each buffer's states and reserve room for it. Collective where files are used."""
        if not self.wanted.is_any:
            return [ON_THE_DEVICE for _ in buffers]
        self._make_stores()
        in_memory = self._first_parameters_in_memory(buffers)
        streamed = self._first_states_off_the_device(buffers)
        self._places = [
            self._place(buffer, index in in_memory, index in streamed) for index, buffer in enumerate(buffers)
        ]
        return self._places

    def _make_stores(self) -> None:
        if Place.NVME in (self.wanted.parameter, self.wanted.optimizer):
            self._io = DirectIO(self._io_settings)
            self._join_directories()
        self._parameter_store = self._store(self.wanted.parameter, self._parameter.nvme_path, "parameters",
                                            self._parameter.pin_memory)  # fmt: skip
        self._state_store = self._store(self.wanted.optimizer, self._optimizer.nvme_path, "optimizer",
                                        self._optimizer.pin_memory)  # fmt: skip

    def _join_directories(self) -> None:
        mine = new_run_id().encode()
        run_id = self._comm.exchange(CollectiveId("name of the run's files", "", 0), mine)[0].decode()
        paths = []
        if self.wanted.parameter is Place.NVME:
            paths.append(self._parameter.nvme_path)
        if self.wanted.optimizer is Place.NVME:
            paths.append(self._optimizer.nvme_path)

        def join() -> None:
            for path in paths:
                if path is not None and path not in self._directories:
                    self._directories[path] = RunDirectory(path, run_id, self._comm.world.rank)

        self._on_every_rank("the directories of offloaded states", join)

    def _store(self, place: Place, path: str | None, kind: str, pin: bool) -> Store | None:
        if place is Place.HOST:
            return HostMemory(pin)
        if place is Place.NVME:
            assert self._io is not None and path is not None
            return SwapFile(self._directories[path].file(kind), self._io)
        return None

    def _first_parameters_in_memory(self, buffers: Sequence[Buffer]) -> set[int]:
        """The buffers that ``max_in_cpu`` lets stay in memory although the others rest in a file."""
        if self.wanted.parameter is not Place.NVME:
            return set()
        room, kept = self._parameter.max_in_cpu, set()
        for index, buffer in enumerate(buffers):
            numel = self._comm.my_span(buffer.layout.cuts).numel
            if buffer.sharding.parameter and numel <= room:
                room -= numel
                kept.add(index)
        return kept

    def _first_states_off_the_device(self, buffers: Sequence[Buffer]) -> set[int]:
        """The buffers whose states leave the device: ``ratio`` of all elements, in whole buffers."""
        sizes = [buffer.layout.numel if buffer.trainable else 0 for buffer in buffers]
        room, off = self._optimizer.ratio * sum(sizes), set()
        for index, size in enumerate(sizes):
            if size and size <= room:
                room -= size
                off.add(index)
        return off

    def _place(self, buffer: Buffer, parameters_in_memory: bool, states_leave: bool) -> Places:
        comm, trained = self._comm, self._traits is not None and buffer.trainable
        offload = Offload(
            self.wanted.parameter if buffer.sharding.parameter and not parameters_in_memory else Place.DEVICE,
            self.wanted.optimizer if trained and states_leave else Place.DEVICE,
        )
        span = comm.my_span(buffer.layout.cuts)
        states = parameters = None
        if offload.optimizer is not Place.DEVICE:
            assert self._state_store is not None and self._traits is not None
            plan = plan_window(offload, buffer, self._traits, comm.device.type)
            spans = cut_windows(buffer.layout, span, self._traits.elementwise, self._window_numel)
            states = ShardStates(self._state_store, self._staging_of_states, self._beside, plan, spans)
        if offload.parameter is not Place.DEVICE:
            assert self._parameter_store is not None
            num_bytes = buffer.resting_bytes(span.numel)
            self._largest_shard = max(self._largest_shard, (num_bytes, span.numel))
            extent = self._parameter_store.reserve(num_bytes)
            parameters = ShardPlace(
                self._parameter_store, extent, self._staging_of_parameters, self._near, self._beside
            )
        return Places(parameters, states, trained)

    # ----------------------------------------------------------------------------------------------------- open

    def open(self) -> None:
        """Take the room in memory and on the disk. Collective.

        Raises:
            ConfigError: some rank cannot have it; nothing is left behind.
        """
        if not self.wanted.is_any:
            return
        self._check_room()
        try:
            self._on_every_rank("the room for offloaded states", self._allocate)
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        for store in self._stores():
            store.allocate()
        if self.wanted.parameter is Place.NVME:
            if self._comm.device.type == "cpu":
                return_freed_memory()
            num_bytes, numel = self._largest_shard
            most = self._parameter.buffer_count * self._parameter.buffer_size // max(1, numel)
            num_slabs = max(2, min(self._parameter.buffer_count, most))
            self._parameter_staging = Staging(num_slabs, num_bytes, self._pins(self._parameter.pin_memory))
        if self.wanted.optimizer is Place.NVME:
            largest = max((p.states.window_bytes() for p in self._places if p.states is not None), default=0)
            num_slabs = max(3, self._optimizer.buffer_count)
            self._state_staging = Staging(num_slabs, largest, self._pins(self._optimizer.pin_memory))

    def _pins(self, asked: bool) -> bool:
        return asked and self._comm.device.type == "cuda"

    def _check_room(self) -> None:
        """The files of all ranks on one filesystem of one host, together, against what is free there."""
        needs: dict[str, int] = {}
        for store, path in self._files():
            needs[_filesystem(path)] = needs.get(_filesystem(path), 0) + store.num_bytes
        said = "\n".join(f"{num_bytes} {device}" for device, num_bytes in needs.items()).encode()
        total = dict.fromkeys(needs, 0)
        for answer in self._comm.exchange(CollectiveId("the room that files need", "", 0), said):
            for line in answer.decode().splitlines():
                num_bytes, device = line.split(" ", 1)
                if device in total:
                    total[device] += int(num_bytes)
        faults = []
        for path in self._directories:
            place = os.statvfs(path)
            need, free = total.get(_filesystem(path), 0), place.f_bavail * place.f_frsize
            if need > free:
                faults.append(
                    f"nvme_path {path} has {free:,d} bytes free, and the files of all ranks on it need {need:,d}. Free "
                    "space there, choose another path, or keep some of the states in memory (offload_optimizer.ratio)."
                )
        self._on_every_rank("the free space for files", lambda: _raise_first(faults))

    def _on_every_rank(self, subject: str, work: Callable[[], None]) -> None:
        """Do it; a failure on one rank is the same error on all of them. Collective."""
        failure: Exception | None = None
        try:
            work()
        except (ConfigError, StorageError, OSError) as error:
            failure = error
        answers = self._comm.exchange(CollectiveId(subject, "", 0), str(failure or "").encode())
        for rank, answer in enumerate(answers):
            if answer:
                self.close()
                origin = f"rank {rank}: " if self._comm.world.size > 1 else ""
                raise ConfigError(origin + answer.decode()) from failure

    # -------------------------------------------------------------------------------------------------- while open

    def _staging_of_parameters(self) -> Staging:
        if self._parameter_staging is None:
            raise StateError("parameters were read from their file before it was opened, or after it was closed.")
        return self._parameter_staging

    def _staging_of_states(self) -> Staging:
        if self._state_staging is None:
            raise StateError("optimizer states were read from their file before it was opened, or after it was closed.")
        return self._state_staging

    def _stores(self) -> list[Store]:
        return [store for store in (self._parameter_store, self._state_store) if store is not None]

    def open_landings(self, num_slabs: int, slab_bytes: int) -> Landings:
        """Memory for gradients that are stepped as soon as they are reduced. Collective.

        Raises:
            ConfigError: some rank cannot have it.
        """
        opened: list[Landings] = []
        self._on_every_rank(
            "the room for gradients that are stepped at once",
            lambda: opened.append(Landings(num_slabs, slab_bytes, self._pins(self._optimizer.pin_memory))),
        )
        (self._landings,) = opened
        return self._landings

    @property
    def beside(self) -> Beside:
        """Copies of states between the device and host memory."""
        return self._beside

    @property
    def overlaps(self) -> bool:
        """Whether making a unit whole goes on beside compute: copies to a GPU do."""
        return self.wanted.parameter is not Place.DEVICE and self._comm.device.type != "cpu"

    @property
    def depth(self) -> int:
        """Windows of optimizer states in memory at a time: one that is stepped, the others on their way in."""
        return 1 if self._state_staging is None else self._state_staging.num_slabs

    def check(self) -> None:
        """At a boundary: nothing failed, and nobody touched the files.

        Raises:
            StorageError: names the file and what happened to it.
        """
        for store in self._stores():
            store.check()

    def settle(self) -> None:
        """Return when all that was written has arrived.

        Raises:
            StorageError: something did not.
        """
        for staging in (self._parameter_staging, self._state_staging):
            if staging is not None:
                staging.drain()

    @property
    def host_bytes(self) -> int:
        """Host memory of stores, staging and landings."""
        every = (self._parameter_staging, self._state_staging, self._landings)
        stagings = [staging for staging in every if staging is not None]
        return sum(store.host_bytes for store in self._stores()) + sum(staging.num_bytes for staging in stagings)

    @property
    def nvme_bytes(self) -> int:
        """Bytes of this rank's files."""
        return sum(store.num_bytes for store, _ in self._files())

    def _files(self) -> list[tuple[Store, str]]:
        """The stores that are files, and the paths that they were asked for."""
        chosen = (
            (self.wanted.parameter, self._parameter_store, self._parameter.nvme_path),
            (self.wanted.optimizer, self._state_store, self._optimizer.nvme_path),
        )
        return [(store, path) for place, store, path in chosen if place is Place.NVME and store is not None and path]

    def close(self) -> None:
        """Give up the stores; their files go. Twice is fine."""
        for staging in (self._parameter_staging, self._state_staging):
            if staging is not None:
                with suppress(StorageError):  # whoever needed it was told; now nobody does
                    staging.drain()
                staging.close()
        if self._landings is not None:
            self._landings.close()
        self._parameter_staging = self._state_staging = self._landings = None
        for store in self._stores():
            store.close()
        self._parameter_store = self._state_store = None
        if self._io is not None:
            self._io.close()
        for directory in self._directories.values():
            directory.close()
        self._directories.clear()


def _filesystem(path: str) -> str:
    """Equal for paths on one filesystem of one host."""
    return f"{os.uname().nodename} {os.stat(path).st_dev}"


def _raise_first(faults: Sequence[str]) -> None:
    if faults:
        raise ConfigError(faults[0])
