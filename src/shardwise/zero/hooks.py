"""The only place that knows autograd: it turns module calls and gradients into the moves of a step.

- before a sharded unit's module runs: make it whole; mark its differentiable inputs: its backward ends there
- after it ran: mark its outputs: its backward begins there; put it away
- a gradient reached an output: make the unit whole for its backward
- a parameter's gradient is complete: hand it to the unit, which may now be complete
- gradients left through every marked input: the unit's backward is over, put it away
- autograd is done: reduce what is left, bring everything home

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
from torch.utils.hooks import RemovableHandle

from shardwise import torch_compat
from shardwise.comm.base import Communicator
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
        self._handles: list[RemovableHandle] = []
        shards = any(unit.is_sharded for unit in units)
        for unit in units:
            # The root's forward is the schedule's whole pass, also where all of its own parameters stay whole.
            if unit.is_sharded or (shards and unit is root):
                self._watch_module(unit)
            self._watch_gradients(unit)

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --------------------------------------------------------------------------------------------------- modules

    def _watch_module(self, unit: Unit) -> None:
        # Hooks of a compiled block must stay out of its graph: they move storage, which no graph can hold.
        before = torch_compat.outside_graphs(partial(self._before_forward, unit))
        after = torch_compat.outside_graphs(partial(self._after_forward, unit))
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
        if unit is self._root or not torch.is_grad_enabled():
            return None
        marker = _InputMarker(partial(self._schedule.after_backward, unit))
        marked = map_tensors(args, marker.mark), map_tensors(kwargs, marker.mark)
        return marked if marker.num_marked else None

    def _after_forward(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        recomputing = torch_compat.in_backward()
        if unit.training_state is not TrainingState.FORWARD:
            return  # a recomputation: backward will put the unit away
        unit.training_state = TrainingState.IDLE
        in_graph = False
        if torch.is_grad_enabled():
            hook = partial(self._before_backward, unit)
            in_graph = _mark_outputs(output, hook)
        if in_graph:
            unit.forwards_in_graph += 1
        if unit is self._root:
            if not in_graph:
                self._schedule.reshard_all()
        elif not recomputing:
            self._schedule.after_forward(unit, in_graph)

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
        self.in_backward = True
        self._backward = torch_compat.current_backward()
        self._reducing = self._reduces_now()
        self._reducer.begin()
        for unit in self._units:
            unit.begin_backward()
        torch_compat.queue_end_of_backward(self._end_of_backward)

    def _before_backward(self, unit: Unit, gradient: torch.Tensor) -> None:
        self._begin_backward()
        if unit.training_state is not TrainingState.PRE_BACKWARD:
            unit.training_state = TrainingState.PRE_BACKWARD
            self._schedule.before_backward(unit)

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
        self._reducer.abandon()
        self._schedule.reshard_all()
        for unit in self._units:
            unit.clear_gradients()
        self._comm.realign()


class _InputMarker:
    """Marks the differentiable inputs of one call and reports when gradients left through all of them.

    A mark is a view with a hook on its autograd node. The node runs after everything that the call did with the input;
    a plain tensor hook would wait for other users of the tensor too.
    """

    def __init__(self, on_all_left: Callable[[], None]) -> None:
        self._on_all_left = on_all_left
        self.num_marked = 0
        self._num_left = 0

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        view = tensor.view_as(tensor)
        assert view.grad_fn is not None
        view.grad_fn.register_hook(self._left)
        self.num_marked += 1
        return view

    def _left(self, inputs: Any, outputs: Any) -> None:
        self._num_left += 1
        if self._num_left == self.num_marked:
            self._num_left = 0
            self._on_all_left()


def _mark_outputs(output: Any, hook: Callable[[torch.Tensor], None]) -> bool:
    """Call ``hook`` when a gradient reaches a tensor in ``output``; whether there is such a tensor."""
    marked = False
    for tensor in _tensors(output):
        if not tensor.requires_grad:
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
