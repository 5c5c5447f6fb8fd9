"""Parameters that rest in pieces before there is an engine: each rank holds an even slice of the bytes of each.

``zero.Init`` and ``load_pretrained`` leave a model so. Its parameters keep shape, dtype and identity and show NaN; the
table here knows the rest. An engine takes the values over one flat buffer at a time and frees the slices as it goes.

Slices are cut by bytes, of whole storages: parameters that share memory, or are views of something larger, stay so.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from shardwise import roll_call, torch_compat
from shardwise.errors import ConfigError, StateError
from shardwise.layout import Span
from shardwise.mesh import Mesh
from shardwise.zero.guard import guard_like, is_guard
from shardwise.zero.module_hook import ModuleHook

_ALIGNMENT_BYTES = 16
"""So that no element of any dtype is cut."""


class Source(Protocol):
    """Values that lie in a file, of which every rank can read any part by itself."""

    def read(self, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` [bytes, uint8] with the values' bytes from ``begin`` on."""


class Ranks:
    """Those who hold the slices: cuts bytes, deals them out, brings them together."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank = mesh.world.rank
        self.size = mesh.world.size
        self._group = mesh.world.group
        self._device = mesh.device

    def spans(self, nbytes: int) -> list[Span]:
        """The bytes of each rank; those of the last ones may be fewer, or none."""
        each = -(-nbytes // self.size)
        each = -(-each // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        cuts = [min(nbytes, rank * each) for rank in range(self.size + 1)]
        return [Span(begin, end) for begin, end in itertools.pairwise(cuts)]

    def deal(self, what: str, whole: torch.Tensor, source: int = 0) -> torch.Tensor:
        """My slice of ``whole`` [bytes] as rank ``source`` has it; a new tensor. Collective.

        Raises:
            CollectiveError: other ranks are elsewhere.
        """
        roll_call.answer(what, f"{whole.numel()} bytes from rank {source}")
        spans = self.spans(whole.numel())
        mine = spans[self.rank]
        if self._group is None:
            return whole.clone()
        longest = spans[0].numel
        piece = torch.empty(longest, dtype=torch.uint8, device=self._device)
        parts = None
        if self.rank == source:
            parts = [_padded(_apart(whole[span.begin : span.end]).to(self._device), longest) for span in spans]
        dist.scatter(piece, parts, group=self._group, group_src=source)
        return piece[: mine.numel].to(whole.device, copy=mine.numel < longest)

    def gather(self, what: str, piece: torch.Tensor, out: torch.Tensor) -> None:
        """Fill ``out`` [bytes] from every rank's slice. Collective.

        Raises:
            CollectiveError: other ranks are elsewhere.
        """
        roll_call.answer(what, f"{out.numel()} bytes")
        for rank, span in enumerate(self.spans(out.numel())):
            part = out[span.begin : span.end]
            if rank == self.rank:
                part.copy_(piece)
            if self._group is not None and span.numel:
                self._broadcast(part, rank)

    def broadcast(self, what: str, values: torch.Tensor, source: int) -> None:
        """Overwrite ``values`` (contiguous) with those of rank ``source``. Collective."""
        roll_call.answer(what, f"shape {tuple(values.shape)}, {values.dtype}, from rank {source}")
        self.share(values, source)

    def share(self, values: torch.Tensor, source: int) -> None:
        """The same where the ranks have met already."""
        if self._group is not None and values.numel():
            self._broadcast(values.detach().view(-1).view(torch.uint8), source)

    def exchange(self, what: str, word: str) -> list[str]:
        """Every rank's ``word``. Collective."""
        roll_call.answer(what)
        words: list[Any] = [word] * self.size
        if self._group is not None:
            dist.all_gather_object(words, word, group=self._group)
        return words

    def _broadcast(self, values: torch.Tensor, source: int) -> None:
        own = _apart(values)
        travelling = own.to(self._device)  # itself, where it is there
        dist.broadcast(travelling, group=self._group, group_src=source)
        if travelling is not own:
            own.copy_(travelling)


def _apart(values: torch.Tensor) -> torch.Tensor:
    """The same memory [bytes, uint8] under a storage of its own.

    A thread of gloo holds on to what it sent for a little longer, which would pass for a user's alias of a parameter.
    """
    if values.device.type != "cpu" or not values.numel():
        return values
    memory = (ctypes.c_char * values.numel()).from_address(values.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8)


def _padded(part: torch.Tensor, length: int) -> torch.Tensor:
    return part if part.numel() == length else torch.cat([part, part.new_zeros(length - part.numel())])


@dataclass(eq=False)
class Cut:
    """The bytes of one storage, of which this rank holds a slice."""

    name: str
    nbytes: int
    device: torch.device
    """Where the whole storage was, and will be."""
    piece: torch.Tensor
    """[slice, uint8]"""
    ranks: Ranks

    def gather_into(self, out: torch.Tensor) -> None:
        """Fill ``out`` [bytes, uint8]. Collective."""
        self.ranks.gather(f"the gathering of {self.name}", self.piece, out)

    def gather(self) -> torch.Tensor:
        """The whole storage [bytes, uint8]. Collective."""
        out = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        self.gather_into(out)
        return out


@dataclass(frozen=True)
class Geometry:
    """Where a parameter lies in its storage."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Geometry:
        """That of ``tensor``."""
        return cls(tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def over(self, storage: torch.Tensor) -> torch.Tensor:
        """The view of ``storage`` [bytes, uint8] that lies so."""
        return storage.view(self.dtype).as_strided(self.size, self.stride, self.offset)

    def covers(self, nbytes: int) -> bool:
        """Whether the elements in their order are all of a storage of so many bytes."""
        contiguous = torch.empty(self.size, device="meta").stride() == self.stride
        return contiguous and self.offset == 0 and self.size.numel() * self.dtype.itemsize == nbytes


@dataclass(frozen=True)
class Parked:
    """What the table knows of a parameter."""

    rest: Cut
    geometry: Geometry


_parked = torch_compat.WeakTensorKeyDictionary()
_guarded: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()


def park(parameter: torch.Tensor, rest: Cut, geometry: Geometry) -> None:
    """Let ``parameter`` rest as ``rest``: it shows NaN from here on."""
    _parked[parameter] = Parked(rest, geometry)
    parameter.data = guard_like(torch.empty((), dtype=geometry.dtype, device=rest.device).expand(geometry.size))


def parked(parameter: torch.Tensor) -> Parked | None:
    """How ``parameter`` rests, if it does so in pieces."""
    found: Parked | None = _parked.get(parameter)
    return found


def all_parked() -> list[tuple[torch.Tensor, Parked]]:
    """All parameters that rest in pieces, in the order in which they were put there."""
    return list(_parked.items())


def unpark(parameter: torch.Tensor) -> None:
    """Forget the piece; the caller has taken over the values."""
    _parked.pop(parameter, None)


@torch.no_grad()
def copy_whole(parameter: torch.Tensor, view: torch.Tensor) -> None:
    """Copy the whole values of ``parameter`` into ``view``, cast to its dtype; a piece is freed. Collective for those.

    Raises:
        ConfigError: it has no values.
    """
    found = parked(parameter)
    if found is None:
        check_has_values(parameter)
        view.copy_(parameter.detach())
        return
    rest, geometry = found.rest, found.geometry
    if view.dtype == geometry.dtype and view.is_contiguous() and geometry.covers(rest.nbytes):
        rest.gather_into(view.view(-1).view(torch.uint8))
    else:
        view.copy_(geometry.over(rest.gather()))
    unpark(parameter)


def check_has_values(parameter: torch.Tensor, name: str = "") -> None:
    """ConfigError if ``parameter`` is on the meta device, or shows NaN for values that are not its own."""
    called = f"parameter {name!r}" if name else f"a parameter of shape {tuple(parameter.shape)}"
    if parameter.device.type == "meta":
        raise ConfigError(
            f"{called} is on the meta device: it has no values. Fill the model with "
            "shardwise.load_pretrained(model, path) first, or build it under shardwise.zero.Init() instead of meta."
        )
    if is_guard(parameter.detach()):
        raise ConfigError(
            f"{called} shows NaN, because its values rest elsewhere: in another engine, which may be closed, or in the "
            "pieces of a parameter that this one is a copy of. Build the model anew, or take its weights from that "
            "engine's state_dict()."
        )


def check_have_values(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """The same for all parameters of a model."""
    for name, parameter in named:
        if parked(parameter) is None:
            check_has_values(parameter, name)


# --- modules whose parameters rest in pieces --------------------------------------------------------------------------


def guard_modules(modules: Iterable[nn.Module]) -> None:
    """Refuse to run, copy or save ``modules`` as long as a parameter of theirs rests in pieces: it would be NaN."""
    for module in modules:
        if module in _guarded or not any(parked(p) is not None for p in own_parameters(module)):
            continue
        own = weakref.ref(module)
        run = ModuleHook(_Refusal(own, "forward() of"), _Refusal(own, "a copy of"))
        save = ModuleHook(_Refusal(own, "state_dict() of"), _Refusal(own, "a copy of"))
        _guarded[module] = [
            module.register_forward_pre_hook(run, prepend=True),
            module.register_state_dict_pre_hook(save),
        ]


def release_modules(modules: Iterable[nn.Module] | None = None) -> None:
    """Take the hooks of ``guard_modules`` off those modules (default: all) that need them no more."""
    for module in list(_guarded) if modules is None else list(modules):
        if module in _guarded and not any(parked(p) is not None for p in own_parameters(module)):
            for handle in _guarded.pop(module):
                handle.remove()


def unguard_modules() -> list[nn.Module]:
    """Take all hooks off, for a time in which the parameters come whole by themselves; whom they were on."""
    modules = list(_guarded)
    for module in modules:
        for handle in _guarded.pop(module):
            handle.remove()
    return modules


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those that ``module`` itself holds."""
    return module.parameters(recurse=False)


class _Refusal:
    """Raises where a module is used whose parameters rest in pieces."""

    def __init__(self, module: weakref.ref[nn.Module], use: str) -> None:
        self._module = module
        self._use = use

    def __call__(self, *_: Any) -> None:
        module = self._module()
        if module is None:
            return
        names = [name for name, p in module.named_parameters(recurse=False) if _shows_guard(p)]
        if names:
            raise StateError(
                f"{self._use} a {type(module).__name__} was asked for while its {', '.join(names)} rests in pieces: it "
                "would be NaN. Pass the model to initialize() or prepare() first, or enter "
                "shardwise.zero.GatheredParameters(model.parameters()) on every rank."
            )


def _shows_guard(parameter: torch.Tensor) -> bool:
    return parked(parameter) is not None and is_guard(parameter.detach())


def parameters_by_cut(parameters: Sequence[torch.Tensor]) -> dict[Cut, list[torch.Tensor]]:
    """Those of ``parameters`` that rest in pieces, by storage."""
    found: dict[Cut, list[torch.Tensor]] = {}
    for parameter in parameters:
        own = parked(parameter)
        if own is not None:
            found.setdefault(own.rest, []).append(parameter)
    return found
