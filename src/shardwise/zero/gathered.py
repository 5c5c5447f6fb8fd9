"""``GatheredParameters``: some parameters whole for a while, on every rank, to be read or to be changed by one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from shardwise import roll_call
from shardwise.comm.base import CollectiveId
from shardwise.errors import ConfigError, StateError
from shardwise.mesh import build_mesh
from shardwise.zero.construction import Construction, current_construction
from shardwise.zero.external import register_external_parameter
from shardwise.zero.guard import guard_like
from shardwise.zero.held import Held, held
from shardwise.zero.parameters import slot_views
from shardwise.zero.pieces import Cut, Ranks, parameters_by_cut, parked
from shardwise.zero.schedule import Schedule
from shardwise.zero.unit import Unit


class GatheredParameters(AbstractContextManager[None]):
    """Inside, ``params`` are whole. Collective: enter and leave it on every rank, with the same parameters.

    They may be an engine's, or those of a model that was built under ``zero.Init`` and is in no engine yet; inside
    ``zero.Init``, too. Parameters that are whole anyway are left as they are. It may be entered inside another one.

    Args:
        params: a parameter, or an iterable of them (a module's ``parameters()``, say).
        modifier_rank: the rank whose changes count: at the end they are everybody's, and the fp32 masters' (an element
            whose master rounds to its new value keeps it). With None nothing is to be changed: what is changed at
            stage 3 is lost at the end.
        fwd_module: a module whose forward will read ``params`` from now on; see ``register_external_parameter``.
        enabled: False does nothing.

    Raises:
        ConfigError: there is no such rank.
        StateError: inside a backward pass.
        CollectiveError: other ranks are elsewhere, or came with other parameters.

    After an exception inside nothing is written back.
    """

    def __init__(
        self,
        params: torch.Tensor | Iterable[torch.Tensor],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        given = [params] if isinstance(params, torch.Tensor) else list(params)
        wrong = next((value for value in given if not isinstance(value, torch.Tensor)), None)
        if wrong is not None:
            raise ConfigError(f"GatheredParameters() got a {type(wrong).__name__}. Expected parameters.")
        self._parameters = list({id(parameter): parameter for parameter in given}.values())
        self._modifier_rank = modifier_rank
        self._enabled = enabled and bool(given)
        if modifier_rank is not None and enabled:
            size = build_mesh("cpu").world.size
            if not 0 <= modifier_rank < size:
                raise ConfigError(
                    f"GatheredParameters(modifier_rank={modifier_rank}): expected a rank from 0 to {size - 1}, or None."
                )
        if fwd_module is not None:
            for parameter in self._parameters:
                if isinstance(parameter, nn.Parameter):
                    register_external_parameter(fwd_module, parameter)
        self._open: list[list[_Gathering]] = []

    def __enter__(self) -> None:
        if not self._enabled:
            return
        construction = current_construction()
        gatherings: list[_Gathering] = []
        if construction is not None:
            gatherings = [_UnderConstruction(construction, self._parameters)]
        else:
            found = [own for parameter in self._parameters if (own := held(parameter)) is not None]
            by_rest = parameters_by_cut(self._parameters)
            for own in found:
                if own.in_backward:
                    raise StateError(
                        f"GatheredParameters() of {own.name!r} was entered inside a backward pass. Enter it between "
                        "passes."
                    )
            names = sorted(own.name for own in found) + [rest.name for rest in by_rest]
            roll_call.answer("the begin of GatheredParameters()", f"{', '.join(names)}; modifier {self._modifier_rank}")
            if found:
                gatherings.append(_OfEngines(self._parameters))
            gatherings += [_OfPieces(rest, parameters) for rest, parameters in by_rest.items()]
        for gathering in gatherings:
            gathering.begin()
        self._open.append(gatherings)

    def __exit__(self, kind: Any, *_: object) -> None:
        if not self._enabled:
            return
        gatherings = self._open.pop()
        modifier = self._modifier_rank if kind is None else None
        try:
            if gatherings and kind is None:
                roll_call.answer("the end of GatheredParameters()")
            if modifier is not None:
                for gathering in gatherings:
                    gathering.write_back(modifier)
        finally:
            for gathering in gatherings:
                gathering.end()


class _Gathering(Protocol):
    """What is whole for one reason."""

    def begin(self) -> None:
        """Make it whole. Collective."""

    def write_back(self, modifier: int) -> None:
        """Let everybody have what rank ``modifier`` has. Collective."""

    def end(self) -> None:
        """Put it away."""


class _UnderConstruction:
    """Inside ``zero.Init`` the construction keeps them whole."""

    def __init__(self, construction: Construction, parameters: list[torch.Tensor]) -> None:
        self._construction = construction
        self._parameters = parameters

    def begin(self) -> None:
        self._keys = self._construction.gather(self._parameters)

    def write_back(self, modifier: int) -> None:
        self._construction.spread(self._keys, modifier)

    def end(self) -> None:
        self._construction.release(self._keys)


@dataclass(eq=False)
class _Whole:
    """A storage that is whole for one or several contexts."""

    memory: torch.Tensor
    """[bytes, uint8]"""
    num_holders: int = 0
    shown: list[torch.Tensor] = field(default_factory=list)
    """The parameters that show it."""


_whole: dict[Cut, _Whole] = {}


class _OfPieces:
    """Parameters of one storage that rest in pieces and are in no engine yet."""

    def __init__(self, rest: Cut, parameters: list[torch.Tensor]) -> None:
        self._rest = rest
        self._parameters = parameters

    def begin(self) -> None:
        whole = _whole.get(self._rest)
        if whole is None:
            whole = _whole[self._rest] = _Whole(self._rest.gather())
        whole.num_holders += 1
        for parameter in self._parameters:
            if not any(shown is parameter for shown in whole.shown):
                whole.shown.append(parameter)
                parameter.data = self._place(parameter, whole)

    @staticmethod
    def _place(parameter: torch.Tensor, whole: _Whole) -> torch.Tensor:
        found = parked(parameter)
        assert found is not None  # it is taken over by an engine only outside
        return found.geometry.over(whole.memory)

    def write_back(self, modifier: int) -> None:
        whole = _whole[self._rest]
        for parameter in self._parameters:
            place = self._place(parameter, whole)
            if parameter.data_ptr() != place.data_ptr():  # ``parameter.data = …`` has put other memory there
                place.copy_(parameter.detach())
                parameter.data = place
        ranks = self._rest.ranks
        ranks.broadcast(f"the new values of {self._rest.name}", whole.memory, modifier)
        span = ranks.spans(self._rest.nbytes)[ranks.rank]
        self._rest.piece.copy_(whole.memory[span.begin : span.end])

    def end(self) -> None:
        whole = _whole[self._rest]
        whole.num_holders -= 1
        if whole.num_holders == 0:
            for parameter in whole.shown:
                if parked(parameter) is not None:
                    parameter.data = guard_like(parameter.detach())
            del _whole[self._rest]


class _OfEngines:
    """Parameters that engines hold: their units are held whole."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        found = [(parameter, own) for parameter in parameters if (own := held(parameter)) is not None]
        self._parameters = [parameter for parameter, _ in found]
        units: dict[Schedule, dict[Unit, None]] = {}
        for _, own in found:
            units.setdefault(own.schedule, {})[own.unit] = None
        self._units = {
            schedule: sorted(of_schedule, key=lambda unit: unit.index) for schedule, of_schedule in units.items()
        }

    def begin(self) -> None:
        for schedule, units in self._units.items():
            schedule.hold(units)

    @torch.no_grad()
    def write_back(self, modifier: int) -> None:
        found = [(parameter, own) for parameter in self._parameters if (own := held(parameter)) is not None]
        comms = {id(own.comm): own for _, own in found}
        for own in comms.values():
            own.comm.exchange(CollectiveId("begin of a write", "", own.global_step), b"")
        for parameter, own in found:
            _write_back(parameter, own, own.ranks, modifier)
        for own in comms.values():
            own.comm.publish()
            own.comm.exchange(CollectiveId("end of a write", "", own.global_step), b"")

    def end(self) -> None:
        for schedule, units in self._units.items():
            schedule.release(units)


def _write_back(parameter: torch.Tensor, own: Held, ranks: Ranks, modifier: int) -> None:
    view = slot_views(own.home.full, own.layout)[own.index]
    values = parameter.detach()
    if values.data_ptr() != view.data_ptr():  # ``parameter.data = …`` has put other memory there
        parameter.data = view
    values = values.contiguous()
    # A shape of the modifier's own is found there, on every rank.
    ranks.broadcast(f"the new values of {own.name}", values, modifier)
    values = values.to(view.dtype)
    view.copy_(values.view(view.shape))
    load_keeping(own, view)


def load_keeping(own: Held, values: torch.Tensor) -> None:
    """Load a parameter's whole ``values``; masters that are wider keep what rounds to the same."""
    part = own.resting(own.steps())
    if part.dtype == values.dtype:
        own.home.load(own.index, values)
        return
    before = part.load().clone()
    own.home.load(own.index, values)
    after = part.load()
    same = before.to(values.dtype) == after.to(values.dtype)
    part.save(torch.where(same, before, after))
