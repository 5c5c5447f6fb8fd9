"""The end of a training step, in its phases: average what is left, agree, clip, step, publish.

``ShardedStep`` is the step of several ranks, and of masters that are apart from their parameters. ``LocalStep`` is that
of one rank whose parameters are their own masters: nothing travels and nothing is cut, so gradients stay where autograd
leaves them and the user's optimizer steps its own tensors. It costs what the bare loop costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from shardwise import torch_compat
from shardwise.comm.base import CollectiveId, Communicator, Pending
from shardwise.errors import ConfigError
from shardwise.layout import Span
from shardwise.precision import LossScaler
from shardwise.zero.agreement import agree, agree_unused, sum_of_squares
from shardwise.zero.early_steps import EarlySteps
from shardwise.zero.invariants import check_home, check_reduced
from shardwise.zero.optimizer import SavedStates, ShardedOptimizer, StatePiece, describe, others_beside, split_state
from shardwise.zero.reducer import Reducer
from shardwise.zero.rest import InMemory
from shardwise.zero.state_readers import StateReaders
from shardwise.zero.unit import Unit


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did."""

    applied: bool
    """False: a gradient was not finite and the step was skipped."""
    grad_norm: float | None
    """Norm of the averaged gradient before clipping; None where nobody needed it yet."""


class Step(Protocol):
    """Ends a training step."""

    @property
    def readers(self) -> StateReaders:
        """Those who read what ``states`` gave them while training goes on."""

    def settle(self, step: int) -> float:
        """Average what is left and return the norm of the gradient; else ``take`` does so. Collective."""

    def clamp(self, bound: float) -> None:
        """Limit every element of the settled gradient to ±``bound``."""

    def take(self, step: int, max_norm: float) -> Outcome:
        """Turn the gradients since the last step into new parameters, clipped to ``max_norm`` if not 0. Collective."""

    def take_in_new_groups(self) -> None:
        """The user added groups to the optimizer; ConfigError if they are not of the model."""

    def begin_pass(self) -> None:
        """The model is about to run."""

    def norm_of_last(self) -> float:
        """Norm of the gradient of the last step, where ``take`` did not compute it."""

    def clear_gradients(self) -> None:
        """Forget the gradients since the last step."""

    def state_bytes(self) -> int:
        """Bytes of the optimizer's own tensors on this rank, 0 before the first step."""

    def predicted_state_bytes(self) -> int:
        """The same by arithmetic."""

    @property
    def num_passes(self) -> int:
        """Backward passes since the last step, where it matters how many."""

    def local_gradients(self) -> Mapping[str, torch.Tensor]:
        """Gradients since the last step that are in no unit's buffer, by the parameter's name."""

    def resume_gradients(self, local: Mapping[str, torch.Tensor], num_passes: int) -> None:
        """Go on in the middle of a step, after ``clear_gradients``; the units' buffers are resumed apart."""

    def states(self, rank: int | None = None) -> Iterator[StatePiece]:
        """The optimizer's state of this rank's shard, for a checkpoint; or what this rank steps of another's.

        It is the state of the moment of the call, wherever and whenever before the next step it is iterated.
        """

    def read_states(self, saved: SavedStates) -> Callable[[], None]:
        """Read the state of what this rank steps; what is returned puts it in the place of the present one."""

    def local_gradient_bytes(self) -> int:
        """Bytes of gradients that are in no unit's buffer."""

    def close(self) -> None:
        """Let the optimizer go."""


def clip_coefficient(grad_norm: float, max_norm: float) -> float:
    """What gradients are multiplied by, with the rule of ``torch.nn.utils.clip_grad_norm_``; 0 is no clipping."""
    coefficient = max_norm / (grad_norm + 1e-6) if max_norm > 0 else 1.0
    # A norm that is NaN gives NaN: broken gradients must not pass for clipped ones.
    return 1.0 if coefficient >= 1.0 else coefficient


@dataclass(frozen=True, slots=True)
class _Settled:
    """What ranks know in common of the gradient of a step."""

    grad_norm: float
    any_unused: bool
    num_passes: int


class ShardedStep:
    """The step of ranks that each own a shard."""

    def __init__(
        self,
        comm: Communicator,
        units: Sequence[Unit],
        reducer: Reducer,
        optimizer: ShardedOptimizer,
        owners: Mapping[torch.Tensor, tuple[Unit, int, int]],
        scaler: LossScaler,
        early: EarlySteps,
    ) -> None:
        self._comm = comm
        self._all_units = units
        self._units = reducer.units
        self._reducer = reducer
        self._optimizer = optimizer
        self._owners = owners
        self._scaler = scaler
        self._early = early
        self.readers = StateReaders(optimizer.inner)
        self._settled: _Settled | None = None

    def settle(self, step: int) -> float:
        """The first two phases. A backward pass after it makes it void."""
        return self._settle(step).grad_norm

    def _settle(self, step: int) -> _Settled:
        # The reducer counts passes from the last step; ``learn`` does not change the count.
        if self._settled is None or self._settled.num_passes != self._reducer.num_passes:
            self._settled = self._average_and_agree(step)
        return self._settled

    def _average_and_agree(self, step: int) -> _Settled:
        self.take_in_new_groups()
        check_home(self._all_units, f"before step {step}")
        agreed = agree(self._comm, self._units, self._reducer.observed_order, self._reducer.num_passes, step)
        self._reducer.learn(agreed.same_order, agreed.num_passes)
        if agreed.unreduced:
            self._reducer.reduce_now([self._units[i] for i in agreed.unreduced], step)
            agreed = agree(self._comm, self._units, (), 0, step)
        check_reduced(self._units, f"at step {step}")
        grad_norm = math.sqrt(agreed.sum_of_squares) / self._scaler.scale
        return _Settled(grad_norm, agreed.any_unused, self._reducer.num_passes)

    def clamp(self, bound: float) -> None:
        """Gradients still carry the loss scale; their norm is to be found anew."""
        self._settled = None
        for unit in self._units:
            for _, gradients in unit.trainable:
                gradients.clamp(bound * self._scaler.scale)

    def take(self, step: int, max_norm: float) -> Outcome:
        """See the module's text."""
        settled = self._settle(step)
        grad_norm = settled.grad_norm
        overflow = self._scaler.skips_overflows and not math.isfinite(grad_norm)
        if not overflow:
            unused = agree_unused(self._comm, self._units, step) if settled.any_unused else frozenset()
            with self._early.finishing() as stepped:
                self._spread_gradients(step)
                self._multiply_gradients(clip_coefficient(grad_norm, max_norm) / self._scaler.scale)
                self._step_and_publish(unused, stepped, step)
        self._scaler.update(overflow)
        self.clear_gradients()
        return Outcome(applied=not overflow, grad_norm=grad_norm)

    def _spread_gradients(self, step: int) -> None:
        """Where a rank's optimizer steps more than its shard: fetch what the other ranks averaged."""
        self._comm.publish()
        pending = [gather for unit in self._units for gather in unit.spread_gradients(step)]
        for gather in pending:
            gather.wait()
        if pending:
            # Nobody may fill the buffer anew while another rank still reads my slice of it.
            self._comm.exchange(CollectiveId("end of the gradients' gather", "", step), b"")

    def _multiply_gradients(self, factor: float) -> None:
        if factor != 1.0:
            for unit in self._units:
                for _, gradients in unit.trainable:
                    gradients.multiply(factor)

    def _step_and_publish(self, unused: frozenset[str], stepped: frozenset[Unit], step: int) -> None:
        """Transports that work beside compute carry a unit's new values while the next unit is stepped."""
        publications: list[Pending] = []
        for batch in self._optimizer.step(unused, stepped):
            publications += [pending for unit in batch for pending in unit.publish(step)]
        self._comm.publish()
        for publication in publications:
            publication.wait()

    def take_in_new_groups(self) -> None:
        """Make runs of their parameters."""
        if self._optimizer.has_new_groups:
            self._optimizer.adopt_new_groups(self._owners)

    def begin_pass(self) -> None:
        """Gradients live in the units."""

    def norm_of_last(self) -> float:
        """``take`` always computes it."""
        return 0.0

    def clear_gradients(self) -> None:
        """Forget the gradients since the last step."""
        self._reducer.num_passes = 0
        self._settled = None
        for unit in self._units:
            unit.clear_gradients()

    def state_bytes(self) -> int:
        """Bytes of the optimizer's own tensors."""
        return self._optimizer.state_bytes()

    def predicted_state_bytes(self) -> int:
        """The same by arithmetic."""
        return self._optimizer.predicted_state_bytes()

    @property
    def num_passes(self) -> int:
        """Backward passes since the last step."""
        return self._reducer.num_passes

    def local_gradients(self) -> Mapping[str, torch.Tensor]:
        """All gradients are in units."""
        return {}

    def resume_gradients(self, local: Mapping[str, torch.Tensor], num_passes: int) -> None:
        """The reducer counts passes."""
        self._reducer.num_passes = num_passes

    def states(self, rank: int | None = None) -> Iterator[StatePiece]:
        """The optimizer's state of this rank's shard, for a checkpoint; or what this rank steps of another's."""
        return self._optimizer.states(self._comm.rank if rank is None else rank)

    def read_states(self, saved: SavedStates) -> Callable[[], None]:
        """Read the state of this rank's runs; what is returned puts it in the place of the present one."""
        install = self._optimizer.read_states(saved)

        def replace() -> None:
            install()
            self._early.mend()

        return replace

    def local_gradient_bytes(self) -> int:
        """All gradients are in units."""
        return 0

    def close(self) -> None:
        """Let the optimizer go."""
        self._early.close()
        self.readers.close()
        self._optimizer.close()


class LocalStep:
    """The step of one rank alone: the user's optimizer over the user's parameters."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], scaler: LossScaler
    ) -> None:
        self._optimizer = optimizer
        self._scaler = scaler
        self.readers = StateReaders(optimizer)
        self._names = {parameter: name for name, parameter in parameters.items() if parameter.requires_grad}
        self._parameters = list(self._names)
        self._last_gradients: list[torch.Tensor] = []

    def settle(self, step: int) -> float:
        """Nothing travels, so the gradient is what autograd left."""
        return _norm(self._gradients()) / self._scaler.scale

    def clamp(self, bound: float) -> None:
        """Gradients still carry the loss scale."""
        for gradient in self._gradients():
            gradient.clamp_(-bound * self._scaler.scale, bound * self._scaler.scale)

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def take(self, step: int, max_norm: float) -> Outcome:
        """Clip if asked to, and step. A parameter without a gradient is left out, as torch does."""
        gradients = self._gradients()
        grad_norm, factor, overflow = None, 1.0, False
        if max_norm > 0 or self._scaler.skips_overflows:
            grad_norm = self.settle(step)
            overflow = self._scaler.skips_overflows and not math.isfinite(grad_norm)
            factor = clip_coefficient(grad_norm, max_norm) / self._scaler.scale
        if not overflow:
            if factor != 1.0 and gradients:
                torch_compat.multiply(gradients, factor)
            self._optimizer.step()
        self._scaler.update(overflow)
        self.clear_gradients()
        # Kept until the next gradients come, in case somebody asks for their norm.
        self._last_gradients = gradients
        return Outcome(applied=not overflow, grad_norm=grad_norm)

    def norm_of_last(self) -> float:
        """Of the gradients that the last step used."""
        return _norm(self._last_gradients)

    def clear_gradients(self) -> None:
        """Forget the gradients since the last step."""
        for parameter in self._parameters:
            parameter.grad = None

    def take_in_new_groups(self) -> None:
        """The optimizer steps its groups as they are; only foreign parameters are a mistake."""
        own = {id(parameter) for parameter in self._parameters}
        for number, group in enumerate(self._optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in own:
                    raise ConfigError(f"{describe(parameter)} of group {number} is not a trainable one of the model.")

    def begin_pass(self) -> None:
        """The next pass begins: the last step's gradients make room."""
        self._last_gradients = []

    def state_bytes(self) -> int:
        """Bytes of the optimizer's own tensors."""
        return sum(
            value.nbytes
            for parameter, state in self._optimizer.state.items()
            for key, value in state.items()
            if _is_elementwise(key, value, parameter)
        )

    def predicted_state_bytes(self) -> int:
        """The same by arithmetic."""
        per_element = max(
            (
                sum(_is_elementwise(key, value, parameter) for key, value in state.items())
                for parameter, state in self._optimizer.state.items()
            ),
            default=0,
        )
        return per_element * sum(parameter.nbytes for parameter in self._parameters)

    @property
    def num_passes(self) -> int:
        """Nothing is reduced, so nobody counts."""
        return 0

    def local_gradients(self) -> Mapping[str, torch.Tensor]:
        """Gradients as autograd left them."""
        return {name: p.grad for p, name in self._names.items() if p.grad is not None}

    def resume_gradients(self, local: Mapping[str, torch.Tensor], num_passes: int) -> None:
        """Put them where autograd adds to them."""
        for parameter, name in self._names.items():
            parameter.grad = local.get(name)

    def states(self, rank: int | None = None) -> Iterator[StatePiece]:
        """The optimizer's state of all parameters, for a checkpoint."""
        states = self._optimizer.state
        held = [(p, name, dict(states[p])) for p, name in self._names.items() if states.get(p)]
        return (_piece(*each) for each in held)

    def read_states(self, saved: SavedStates) -> Callable[[], None]:
        """Read the state of all parameters; what is returned puts it in the place of the present one."""
        states: dict[torch.Tensor, dict[str, object]] = {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(parameter)
                if name is not None and saved.signature(name):
                    state = others_beside(saved.others(name), parameter, group)
                    for kind, dtype in saved.kinds(name).items():
                        value = torch.empty_like(parameter, dtype=dtype or parameter.dtype)
                        saved.read_state(kind, name, Span(0, parameter.numel()), value.view(-1))
                        state[kind] = value
                    states[parameter] = state

        def install() -> None:
            self._optimizer.state.clear()
            self._optimizer.state.update(states)

        return install

    def local_gradient_bytes(self) -> int:
        """Gradients as autograd made them."""
        held = [*self._last_gradients, *(p.grad for p in self._parameters if p.grad is not None)]
        return sum(gradient.nbytes for gradient in held)

    def close(self) -> None:
        """Let the gradients go."""
        self.readers.close()
        self._last_gradients = []
        self.clear_gradients()


def _piece(parameter: torch.Tensor, name: str, state: Mapping[str, object]) -> StatePiece:
    elementwise, others = split_state(state, parameter)
    flat = {key: InMemory(value.reshape(-1)) for key, value in elementwise.items()}
    return StatePiece(name, Span(0, parameter.numel()), flat, others)


def _is_elementwise(key: str, value: object, parameter: torch.Tensor) -> bool:
    """Whether an entry of the optimizer's state has a number for each of the parameter's; "step" is one for all."""
    return key != "step" and isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    if not gradients:
        return 0.0
    return math.sqrt(sum_of_squares(torch.stack(torch_compat.norms(gradients)).tolist()))
