"""The only place that knows autograd: it turns module calls and gradients into the moves of a step.

- before a sharded unit's module runs: make it whole; mark its differentiable inputs: its backward ends there
- after it ran: mark its outputs: its backward begins there; put it away
- a gradient reached an output: make the unit whole for its backward; calls that were made later are over
- a parameter's gradient is complete: hand it to the unit, which may now be complete
- gradients left through an input: the call's backward is over, put the unit away
- autograd is done: reduce what is left, bring everything home

Why one input is enough: of the nodes that are ready autograd runs the newest first. What a call did is newer than what
made its inputs, so an input's node runs after all of the call. The marks are hooks on nodes that exist anyway: a node
of our own would add up the gradients of a tensor that several modules use in another order, and change their last bits.

Recompute (activation checkpointing) runs a forward inside backward. A unit whose outputs were marked before is being
recomputed for a backward that is on its way: its forward must neither mark again nor put away. One that has no marked
outputs (a reentrant checkpoint ran it without a graph) is marked as in any forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from shardwise import torch_compat
from shardwise.comm.base import Communicator
from shardwise.zero.invariants import refuse_copy
from shardwise.zero.module_hook import ModuleHook
from shardwise.zero.reducer import Reducer
from shardwise.zero.schedule import Schedule
from shardwise.zero.unit import TrainingState, Unit


class Hooks:
    """Installs the hooks of one engine and keeps the little state that spans a backward pass.

    Args:
        units: all units.
        root: the unit of the whole model.
        schedule: moves parameters.
        reducer: moves gradients.
        comm: the transport, to be realigned after a pass that raised.
        reduces_now: asked at the beginning of each backward pass: will its gradients be reduced in it?
        on_backward_end: told when a backward pass is over and everything is home.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        root: Unit,
        schedule: Schedule,
        reducer: Reducer,
        comm: Communicator,
        reduces_now: Callable[[], bool],
        on_backward_end: Callable[[], None],
    ) -> None:
        self._units = units
        self._root = root
        self._schedule = schedule
        self._reducer = reducer
        self._comm = comm
        self._reduces_now = reduces_now
        self._on_backward_end = on_backward_end
        self.in_backward = False
        self._backward = -1
        self._reducing = False
        self._num_events = 0
        self._forwards: dict[Unit, _Call] = {}
        """The call that each unit's module is in."""
        self._entry: nn.Module | None = None
        """The part of the model that runs without the model around it."""
        self._open: list[_Call] = []
        """Calls that a gradient has entered and not left."""
        self._handles: list[RemovableHandle] = []
        shards = any(unit.is_sharded for unit in units)
        for unit in units:
            # The root's forward is the schedule's whole pass, also where all of its own parameters stay whole.
            if unit.is_sharded or (shards and unit is root):
                self._watch_module(unit)
            self._watch_gradients(unit)
        if root.is_sharded:
            self._watch_entries()

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --------------------------------------------------------------------------------------------------- modules

    def _watch_module(self, unit: Unit) -> None:
        # Hooks of a compiled block must stay out of its graph: they move storage, which no graph can hold.
        refuse = partial(refuse_copy, unit)
        before = ModuleHook(torch_compat.outside_graphs(partial(self._before_forward, unit)), refuse)
        after = ModuleHook(torch_compat.outside_graphs(partial(self._after_forward, unit)), refuse)
        self._handles.append(unit.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        self._handles.append(unit.module.register_forward_hook(after, with_kwargs=True, always_call=True))

    def _before_forward(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        recomputing = torch_compat.in_backward()
        if unit is self._root and not recomputing:
            self.recover()
            self._schedule.begin_forward()
        self._schedule.before_forward(unit)
        if self._is_expected_in_backward(unit, recomputing):
            return None
        unit.training_state = TrainingState.FORWARD
        call = self._forwards[unit] = _Call(unit, begin=self._next_event())
        if unit is self._root or not torch.is_grad_enabled():
            return None
        has_leaf = any(_is_leaf(tensor) for tensor in _tensors((args, kwargs)))
        if has_leaf:
            args, kwargs = map_tensors(args, _not_a_leaf), map_tensors(kwargs, _not_a_leaf)
        call.inputs = [tensor.grad_fn for tensor in _tensors((args, kwargs)) if tensor.grad_fn is not None]
        for node in call.inputs:
            node.register_prehook(lambda _: self._after_backward(call))
        return (args, kwargs) if has_leaf else None

    def _after_forward(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        recomputing = torch_compat.in_backward()
        if unit.training_state is not TrainingState.FORWARD:
            return  # a recomputation: backward will put the unit away
        unit.training_state = TrainingState.IDLE
        in_graph = False
        call = self._forwards.pop(unit)
        call.end = self._next_event()
        if torch.is_grad_enabled():
            in_graph = _mark_outputs(output, partial(self._before_backward, call), handed_on=call.inputs)
        call.inputs = ()  # nodes hold the call: it must not hold them
        if in_graph:
            unit.forwards_in_graph += 1
        if unit is self._root:
            if not in_graph:
                self._schedule.reshard_all()
        elif not recomputing:
            self._schedule.after_forward(unit, in_graph)

    # A part of the model may be called without the model around it: generation runs an encoder by itself. If the part
    # holds parameters of the root, these are whole for that call as they would be for the model's.

    def _watch_entries(self) -> None:
        own = {parameter for segment in self._root.segments for parameter in segment.parameters.parameters}
        units = {unit.module for unit in self._units}
        inside = {part for unit in units - {self._root.module} for part in unit.modules()} - units
        refuse = partial(refuse_copy, self._root)
        before = ModuleHook(torch_compat.outside_graphs(self._before_entry), refuse)
        after = ModuleHook(torch_compat.outside_graphs(self._after_entry), refuse)
        for module in self._root.module.modules():
            if module is self._root.module or module in inside or own.isdisjoint(module.parameters()):
                continue
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def _before_entry(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._root.is_whole:
            self._schedule.before_forward(self._root)
            self._entry = module

    def _after_entry(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._entry:
            return
        self._entry = None
        call = _Call(self._root, begin=0, end=self._next_event())
        if not (torch.is_grad_enabled() and _mark_outputs(output, partial(self._before_backward, call))):
            self._schedule.after_forward(self._root, in_graph=False)

    def _next_event(self) -> int:
        self._num_events += 1
        return self._num_events

    @staticmethod
    def _is_expected_in_backward(unit: Unit, recomputing: bool) -> bool:
        return recomputing and (unit.training_state is TrainingState.PRE_BACKWARD or unit.forwards_in_graph > 0)

    # -------------------------------------------------------------------------------------------------- backward

    def watch_outputs(self, output: Any) -> None:
        """Mark the outputs of the whole model: the first gradient that reaches one begins the backward pass."""
        if torch.is_grad_enabled():
            _mark_outputs(output, lambda _: self._begin_backward())

    def _begin_backward(self) -> None:
        if self.in_backward:
            return
        reduces = self._reduces_now()
        self._reducer.begin(reduces)
        self.in_backward = True
        self._backward = torch_compat.current_backward()
        self._reducing = reduces
        for unit in self._units:
            unit.begin_backward()
        torch_compat.queue_end_of_backward(self._end_of_backward)

    def _before_backward(self, call: _Call, gradient: torch.Tensor) -> None:
        self._begin_backward()
        backward, unit = torch_compat.current_backward(), call.unit
        for later in [c for c in self._open if c.begin > call.end and c.backward == backward]:
            self._after_backward(later)
        if unit is not self._root and call not in self._open:
            call.backward = backward
            self._open.append(call)
        if unit.training_state is not TrainingState.PRE_BACKWARD:
            unit.training_state = TrainingState.PRE_BACKWARD
            self._schedule.before_backward(unit)

    def _after_backward(self, call: _Call) -> None:
        if call in self._open:
            self._open.remove(call)
            self._schedule.after_backward(call.unit)

    def _watch_gradients(self, unit: Unit) -> None:
        parameters = dict(unit.module.named_parameters(remove_duplicate=False))
        for number, (segment, _) in enumerate(unit.trainable):
            for slot, name in enumerate(segment.names):
                local = name if unit is self._root else name.removeprefix(unit.name + ".")
                hook = self._gradient_hook(unit, number, slot)
                self._handles.append(parameters[local].register_post_accumulate_grad_hook(hook))

    def _gradient_hook(self, unit: Unit, segment: int, slot: int) -> Callable[[torch.Tensor], None]:
        """Runs once a parameter and pass, right after autograd accumulated: what it needs is bound beforehand."""
        take = unit.take_gradient

        def hook(parameter: torch.Tensor) -> None:
            if not self.in_backward:
                self._begin_backward()
            gradient = parameter.grad
            parameter.grad = None
            assert gradient is not None
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            # A backward inside backward (a reentrant checkpoint) may bring more for parameters that are complete, now
            # or later: their unit is reduced at the end, and what travels already must have arrived.
            nested = torch_compat.current_backward() != self._backward
            if nested:
                self._reducer.finish()
            if take(segment, slot, gradient, not self._reducing) and self._reducing and not nested:
                self._reducer.complete(unit, self._schedule.step)

        return hook

    def _end_of_backward(self) -> None:
        self._open.clear()
        self._schedule.reshard_all()
        if self._reducing:
            self._reducer.end(self._schedule.step)
        self.in_backward = False
        self._reducer.num_passes += 1
        self._on_backward_end()

    def recover(self) -> None:
        """A forward starts while a backward pass is open: that pass raised. Bring all home, drop its gradients."""
        if not self.in_backward:
            return
        self.in_backward = False
        self._open.clear()
        self._reducer.abandon()
        self._schedule.reshard_all()
        for unit in self._units:
            unit.clear_gradients()
        self._comm.realign()


@dataclasses.dataclass(slots=True, eq=False)
class _Call:
    """One call of a unit's module."""

    unit: Unit
    begin: int
    """When it was made: a number that grows from event to event."""
    end: int = 0
    inputs: Sequence[Node] = ()
    """What made its differentiable inputs; only until it ends."""
    backward: int = -1
    """The pass that is in it."""


def _is_leaf(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and tensor.grad_fn is None


def _not_a_leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf's gradient is taken in as early as can be, not last: a view stands in for it."""
    return tensor.view_as(tensor) if _is_leaf(tensor) else tensor


def _mark_outputs(output: Any, hook: Callable[[torch.Tensor], None], handed_on: Sequence[Node] = ()) -> bool:
    """Call ``hook`` when a gradient reaches a tensor in ``output``; whether there is such a tensor.

    What nodes ``handed_on`` made came in as inputs: gradients reach it when the call is long over.
    """
    marked = False
    for tensor in _tensors(output):
        if not tensor.requires_grad or any(tensor.grad_fn is node for node in handed_on):
            continue
        marked = True
        tensor.register_hook(hook)
        # Who changes a view in place cuts it off from its hook: gradients then go to its base.
        base = torch_compat.base_of(tensor)
        if base is not None and base.grad_fn is not None:
            base.grad_fn.register_prehook(partial(_call_with_first, hook))
    return marked


def _call_with_first(hook: Callable[[torch.Tensor], None], gradients: Sequence[torch.Tensor]) -> None:
    hook(gradients[0])


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    """All tensors in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with ``function`` applied to each tensor; objects that are no containers are kept."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) is dict:
        return {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{name: map_tensors(item, function) for name, item in fields.items()})
    return value
