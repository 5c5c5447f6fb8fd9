"""``load_pretrained``: weights from ordinary files into a model or an engine; each rank reads what it will hold.

Where a parameter's values go decides what is read of it:

whole on each rank    all of it (small parameters, buffers, a model that was built in one piece, one rank alone)
in pieces             this rank's slice (a model that was built under ``zero.Init``, or on the meta device)
in an engine          what rests on this rank, cast to the dtype that rests
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from shardwise import torch_compat
from shardwise.checkpoint.model import IncompatibleKeys, Trained, publish_loaded, slices_of
from shardwise.checkpoint.weights_file import Weights
from shardwise.comm.base import CollectiveId
from shardwise.errors import CheckpointError, ConfigError
from shardwise.mesh import build_mesh, init_distributed
from shardwise.zero import pieces
from shardwise.zero.construction import SMALL_BYTES, refuse_inside
from shardwise.zero.engine import Engine
from shardwise.zero.pieces import Cut, Geometry, Ranks
from shardwise.zero.rest import InMemory

NAMES_SHOWN = 8


@torch.no_grad()
def load_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    init_buffers: Callable[[nn.Module], None] | None = None,
) -> IncompatibleKeys:
    """Fill ``model`` from safetensors files (or what ``torch.save`` wrote), reading only this rank's byte ranges.

    A model on the meta device, or one that was built under ``zero.Init``, rests in pieces afterwards: pass it to
    ``initialize``. Collective.

    Args:
        model: any module, or an engine.
        path: a file, an index of files, or a directory such as ``save_pretrained`` writes.
        strict: names that are missing or too many are an error.
        dtype: floating-point parameters of the model get this dtype; None: they keep theirs. Not for an engine.
        init_buffers: called with each module that has buffers on the meta device that no file holds (they are not in
            state dicts), once they were made, without values. Models of ``transformers`` know how to fill their own.

    Returns:
        Missing and unexpected names, as ``nn.Module.load_state_dict``.

    Raises:
        CheckpointError: on every rank, before anything is changed: a file cannot be read, or names or shapes do not
            fit.
        ConfigError: the arguments cannot work.
    """
    refuse_inside("load_pretrained()")
    if isinstance(model, Engine):
        if dtype is not None or init_buffers is not None:
            raise ConfigError("load_pretrained() of an engine takes no dtype and no init_buffers: its dtypes are set.")
        model.put_away()
        return _load_engine(model.trained(), path, strict)
    init_distributed()
    mesh = build_mesh()
    return _ModelLoad(model, path, Ranks(mesh), strict, dtype, init_buffers).run()


# --- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Which tensor of the files goes into which of the model's."""

    weights: Weights
    found: list[tuple[str, torch.Tensor]]
    """A name in the files, and the model's own tensor."""
    keys: IncompatibleKeys


def _plan(targets: Mapping[str, torch.Tensor], path: str | os.PathLike[str], strict: bool, ranks: Ranks) -> _Plan:
    """Open the files and compare; what one rank finds wrong is an error on every rank. Collective."""
    plan, fault = None, ""
    try:
        weights = Weights(path)
        plan = _compare(targets, weights, strict)
    except CheckpointError as error:
        fault = str(error)
    for rank, word in enumerate(ranks.exchange("load_pretrained()", fault)):
        if word:
            where = "" if ranks.size == 1 else f" (on rank {rank})"
            raise CheckpointError(word + where)
    assert plan is not None
    return plan


def _compare(targets: Mapping[str, torch.Tensor], weights: Weights, strict: bool) -> _Plan:
    names: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        names.setdefault(id(tensor), []).append(name)
    found, missing, faults = [], [], []
    for of_one in names.values():
        tensor = targets[of_one[0]]
        name = next((name for name in of_one if name in weights), "")
        if not name:
            missing.append(of_one[0])
        elif weights.shape(name) != tuple(tensor.shape):
            faults.append(f"{name!r} has shape {weights.shape(name)}, expected {tuple(tensor.shape)}")
        else:
            found.append((name, tensor))
    unexpected = [name for name in weights.names() if name not in targets]
    if strict:
        faults += [f"missing: {_listed(missing)}"] * bool(missing)
        faults += [f"unexpected: {_listed(unexpected)}"] * bool(unexpected)
    if faults:
        shown = "; ".join(faults[:NAMES_SHOWN])
        raise CheckpointError(
            f"the weights in {weights.path} are not of this model: {shown}. Build the model that they are of; "
            "strict=False ignores missing and unexpected names."
        )
    return _Plan(weights, found, IncompatibleKeys(missing, unexpected))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:NAMES_SHOWN])) + more


# --- a model ----------------------------------------------------------------------------------------------------------


class _ModelLoad:
    """One load into a model that is in no engine."""

    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str],
        ranks: Ranks,
        strict: bool,
        dtype: torch.dtype | None,
        init_buffers: Callable[[nn.Module], None] | None,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"load_pretrained(dtype={dtype}): expected a floating-point dtype, such as bfloat16.")
        self._model = model
        self._path = path
        self._ranks = ranks
        self._strict = strict
        self._dtype = dtype
        self._init_buffers = init_buffers
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        """The modules that hold each tensor, by its id, and its names there."""
        self._targets: dict[str, torch.Tensor] = {}
        self._left_out: dict[nn.Module, dict[str, torch.Tensor]] = {}
        """Each module's buffers that have no values, and are in no state dict."""
        for prefix, module in model.named_modules(remove_duplicate=False):
            self._look_at(module, f"{prefix}." if prefix else "")

    def _look_at(self, module: nn.Module, prefix: str) -> None:
        left_out = torch_compat.non_persistent_buffers(module)
        for name, tensor in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ):
            self._places.setdefault(id(tensor), []).append((module, name))
            if name not in left_out:
                self._targets[prefix + name] = tensor
            elif tensor.device.type == "meta":
                self._left_out.setdefault(module, {})[name] = tensor

    def run(self) -> IncompatibleKeys:
        """See ``load_pretrained``."""
        plan = _plan(self._targets, self._path, self._strict, self._ranks)
        self._refuse_what_stays_empty(plan)
        self._make_buffers()
        for name, tensor in plan.found:
            self._fill(plan.weights, name, tensor)
        pieces.guard_modules(self._model.modules())
        return plan.keys

    def _refuse_what_stays_empty(self, plan: _Plan) -> None:
        filled = {id(tensor) for _, tensor in plan.found}
        empty = [n for n, t in self._targets.items() if t.device.type == "meta" and id(t) not in filled]
        if empty:
            raise CheckpointError(
                f"{plan.weights.path} has no values for {_listed(empty)}, and the model has none either: it is on the "
                "meta device. Build the model under shardwise.zero.Init() instead, then what is missing keeps its "
                "first values."
            )

    # -- buffers that no file holds

    def _make_buffers(self) -> None:
        if not self._left_out:
            return
        init = self._init_buffers or _init_of_transformers(self._model)
        if init is None:
            names = [f"{type(module).__name__}.{name}" for module, names in self._left_out.items() for name in names]
            raise ConfigError(
                f"the buffers {_listed(names)} are on the meta device, and no file holds them: they are not in state "
                "dicts. Pass init_buffers=, a function that fills those of a module, or build the model under "
                "shardwise.zero.Init() instead of meta."
            )
        for module, buffers in self._left_out.items():
            for name, buffer in buffers.items():
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
            init(module)

    # -- what files hold

    def _fill(self, weights: Weights, name: str, tensor: torch.Tensor) -> None:
        dtype = tensor.dtype
        if self._dtype is not None and isinstance(tensor, nn.Parameter) and dtype.is_floating_point:
            dtype = self._dtype
        found = pieces.parked(tensor)
        if found is not None:
            self._fill_pieces(weights, name, tensor, found, dtype)
        elif tensor.device.type != "meta":
            if tensor.dtype != dtype:
                tensor.data = tensor.detach().to(dtype)
            flat = tensor.detach().view(-1) if tensor.is_contiguous() else torch.empty(tensor.numel(), dtype=dtype)
            weights.read_into(name, 0, flat)
            if not tensor.is_contiguous():
                tensor.copy_(flat.view(tensor.shape))
        else:
            self._replace(tensor, self._made(weights, name, tensor, dtype))

    def _fill_pieces(
        self, weights: Weights, name: str, tensor: torch.Tensor, found: pieces.Parked, dtype: torch.dtype
    ) -> None:
        rest, geometry = found.rest, found.geometry
        if geometry.dtype != dtype:
            pieces.unpark(tensor)
            self._park(weights, name, tensor, dtype, rest.device)
            return
        if geometry.covers(rest.nbytes):
            mine = self._ranks.spans(rest.nbytes)[self._ranks.rank]
            weights.source(name, dtype).read(mine.begin, rest.piece)
            return
        # It is a view of something larger, or laid out in another order: bring the storage together and cut it anew.
        memory = rest.gather()
        values = torch.empty(geometry.size, dtype=geometry.dtype, device=rest.device)
        weights.read_into(name, 0, values.view(-1))
        geometry.over(memory).copy_(values)
        mine = self._ranks.spans(rest.nbytes)[self._ranks.rank]
        rest.piece.copy_(memory[mine.begin : mine.end])

    def _park(
        self, weights: Weights, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device
    ) -> None:
        nbytes = tensor.numel() * dtype.itemsize
        mine = self._ranks.spans(nbytes)[self._ranks.rank]
        piece = torch.empty(mine.numel, dtype=torch.uint8, device=device)
        weights.source(name, dtype).read(mine.begin, piece)
        stride = torch.empty(tensor.shape, device="meta").stride()
        pieces.park(tensor, Cut(name, nbytes, device, piece, self._ranks), Geometry(dtype, tensor.shape, stride, 0))

    def _made(self, weights: Weights, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What takes the place of a tensor on the meta device."""
        device = torch.device("cpu")
        in_pieces = self._ranks.size > 1 and isinstance(tensor, nn.Parameter)
        if in_pieces and tensor.numel() * dtype.itemsize >= SMALL_BYTES:
            shell = nn.Parameter(torch.empty((), dtype=dtype).expand(tensor.shape), tensor.requires_grad)
            self._park(weights, name, shell, dtype, device)
            return shell
        values = torch.empty(tensor.shape, dtype=dtype, device=device)
        weights.read_into(name, 0, values.view(-1))
        return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values

    def _replace(self, tensor: torch.Tensor, made: torch.Tensor) -> None:
        for module, name in self._places[id(tensor)]:
            setattr(module, name, made)


def _init_of_transformers(model: nn.Module) -> Callable[[nn.Module], None] | None:
    """How a model of ``transformers`` fills the buffers of a module of its own; None for other models."""
    if "transformers" not in sys.modules:
        return None
    kind: Any = import_module("transformers").PreTrainedModel
    if not isinstance(model, kind):
        return None
    owners = {part: owner for owner in model.modules() if isinstance(owner, kind) for part in owner.modules()}
    return lambda module: owners[module]._init_weights(module)


# --- an engine --------------------------------------------------------------------------------------------------------


def _load_engine(trained: Trained, path: str | os.PathLike[str], strict: bool) -> IncompatibleKeys:
    comm, step = trained.comm, trained.counters["global_steps"]
    targets = {name: value for name, value in trained.references.items() if isinstance(value, torch.Tensor)}
    plan = _plan(targets, path, strict, Ranks(build_mesh(comm.device)))
    in_files = {id(tensor): name for name, tensor in plan.found}
    comm.exchange(CollectiveId("begin of a load", "", step), b"")
    for unit in trained.units:
        for segment in unit.segments:
            own = dict(zip(segment.names, segment.parameters.parameters, strict=True))
            for name, span, rest in slices_of(segment, segment.parameters.master_span):
                if id(own[name]) in in_files:
                    place = rest.tensor if isinstance(rest, InMemory) else torch.empty(span.numel, dtype=rest.dtype)
                    plan.weights.read_into(in_files[id(own[name])], span.begin, place)
                    if not isinstance(rest, InMemory):
                        rest.save(place)
    for name, tensor in plan.found:
        if not isinstance(tensor, nn.Parameter):
            values = torch.empty(tensor.numel(), dtype=tensor.dtype)
            plan.weights.read_into(name, 0, values)
            tensor.copy_(values.view(tensor.shape))
    publish_loaded(comm, trained.units, step)
    return plan.keys
