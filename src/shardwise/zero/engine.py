"""The engine: a model whose training states are sharded, driven by three calls.

::

    loss = engine(batch)      forward: units become whole just in time
    engine.backward(loss)     gradients are averaged over ranks as they appear, each rank keeps its shard
    engine.step()             one message of agreement, clip, step of this rank's shards, publication

``step`` may be called after every micro-batch and acts when ``gradient_accumulation_steps`` of them were seen.
Everything that ranks do together is marked *collective*: call it on every rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from shardwise import roll_call, torch_compat
from shardwise.checkpoint import randomness
from shardwise.checkpoint.engine import (
    EngineMeeting,
    PathLike,
    export_dcp,
    export_pretrained,
    gather_engine,
    load_engine,
    save_engine,
    write_engine,
)
from shardwise.checkpoint.model import IncompatibleKeys, Trained, Wishes
from shardwise.checkpoint.save import Background, Place
from shardwise.comm.base import CollectiveId, Communicator
from shardwise.comm.summary import CommsSummary
from shardwise.config import BatchSizes, EngineConfig
from shardwise.errors import ConfigError, StateError
from shardwise.optim.probe import OptimizerTraits
from shardwise.precision import NARROW, LossScaler, Precision
from shardwise.zero.assembly import DTYPES, equip_with_gradients, is_local, measure_optimizer, optimizer_groups
from shardwise.zero.early_steps import EarlySteps, NoEarlySteps, StepsInBackward
from shardwise.zero.engine_optimizer import EngineOptimizer
from shardwise.zero.held import Held, announce, withdraw
from shardwise.zero.hooks import Hooks, map_tensors
from shardwise.zero.invariants import refuse_copy
from shardwise.zero.loose import average_loose_gradients
from shardwise.zero.loss_scale import ScaleBoundary
from shardwise.zero.memory import MemoryReport, report_memory
from shardwise.zero.module_hook import ModuleHook
from shardwise.zero.offloading import Offloading
from shardwise.zero.optimizer import CPU_RUN_NUMEL, ShardedOptimizer
from shardwise.zero.reducer import Reducer
from shardwise.zero.schedule import Budgets, Schedule
from shardwise.zero.step import LocalStep, ShardedStep, Step
from shardwise.zero.streamed_optimizer import StreamedOptimizer
from shardwise.zero.unit import Unit

logger = logging.getLogger(__name__)


class Engine(nn.Module):
    """A wrapped model; build it with ``shardwise.initialize``.

    The wrapped model's parameters stay the user's ``nn.Parameter`` objects. At stage 3 they show NaN outside of the
    passes of the model: read them inside ``gathered_parameters`` or through ``state_dict``.
    """

    def __init__(
        self,
        module: nn.Module,
        units: list[Unit],
        comm: Communicator,
        offloading: Offloading,
        batch_sizes: BatchSizes,
        precision: Precision,
        loss_scaler: LossScaler,
        budgets: Budgets,
        config: EngineConfig,
    ) -> None:
        super().__init__()
        self.module = module
        self.device = comm.device
        self.lr_scheduler: Any = None
        self.global_steps = 0
        self.micro_steps = 0
        self.skipped_steps = 0
        self._units = units
        self._segments = [segment for unit in units for segment in unit.segments]
        self._optimizer: torch.optim.Optimizer | None = None
        self._step: Step | None = None
        self._comm = comm
        self._offloading = offloading
        self._batch_sizes = batch_sizes
        self._precision = precision
        self._scaler = loss_scaler
        self._boundary = ScaleBoundary(loss_scaler)
        self._config = config
        self._run = (
            partial(_run_under_autocast, module, comm.device.type, DTYPES[config.autocast_dtype])
            if (config.autocast_dtype is not None)
            else module.__call__
        )
        self._casts_inputs = precision.compute is not None and config.fp16.auto_cast is not False
        self._schedule = Schedule(units, units[0], budgets, prefetches=comm.overlaps or offloading.overlaps)
        self._early: EarlySteps = NoEarlySteps()
        self._watch_units()
        self._state_dict_guard = self._guard_state_dict()
        self._owners: dict[torch.Tensor, tuple[Unit, int, int]] = {
            parameter: (unit, number, slot)
            for unit in units
            for number, segment in enumerate(unit.segments)
            for slot, parameter in enumerate(segment.parameters.parameters)
        }
        self._frozen = [parameter for parameter in self._owners if not parameter.requires_grad]
        self._forced_boundary: bool | None = None
        self._syncs = True
        self._max_norm_once = 0.0
        self._grad_norm: float | None = 0.0
        self._step_was_applied = False
        self._closed = False
        self._tells_steps = dist.is_initialized() and dist.get_world_size() == comm.world.size > 1
        self._has_told_step = False
        """Whether the others can know that this rank has begun the step, and comes to no roll call before it."""
        self._background = Background()
        comm.publish()
        announce(self)

    def _watch_units(self) -> None:
        self._reducer = Reducer(
            self._units, self._config.zero_optimization.overlap_comm is not False, self._comm.forgets, self._early
        )
        self._reduces_every_backward = any(
            segment.sharding.reduces_every_backward for unit in self._units for segment, _ in unit.trainable
        )
        self._hooks = Hooks(
            self._units,
            self._units[0],
            self._schedule,
            self._reducer,
            self._comm,
            self._reduces_now,
            self._backward_is_over,
        )

    def attach_optimizer(
        self, optimizer: torch.optim.Optimizer, traits: OptimizerTraits | None = None
    ) -> EngineOptimizer:
        """Let ``optimizer``, built over the model's parameters, train them; what ``initialize`` does with its own.

        Args:
            optimizer: a new torch optimizer; its groups may hold any of the model's parameters.
            traits: what ``probe_optimizer`` said, if it was asked already.

        Returns:
            The optimizer to hand to schedulers.

        Raises:
            ConfigError: the engine has an optimizer, or this one cannot work on the engine's shards.
        """
        self._check_open()
        if self._optimizer is not None:
            raise ConfigError(
                f"the engine has a {type(self._optimizer).__name__} already. Expected one optimizer an engine: "
                "give it several parameter groups, or close the engine and initialize again."
            )
        groups = optimizer_groups(self.module, optimizer)
        self._optimizer = optimizer
        if is_local(self._segments, self._comm.world.size, self._offloading.wanted):
            names = {self._name_of(parameter): parameter for parameter in self.module.parameters()}
            self._step = LocalStep(optimizer, names, self._scaler)
        else:
            self._step = self._sharded_step(optimizer, groups, traits)
        return EngineOptimizer(self, optimizer)

    def _sharded_step(
        self, optimizer: torch.optim.Optimizer, groups: dict[nn.Parameter, int], traits: OptimizerTraits | None
    ) -> ShardedStep:
        if traits is None:
            if self._offloading.wanted.is_any:
                raise ConfigError(
                    "the engine was built without an optimizer, and states that are offloaded get their places then. "
                    "Pass the optimizer to initialize(), or prepare model and optimizer in one call."
                )
            traits = measure_optimizer(optimizer, self._segments, self._comm.world.size, self._offloading.wanted)
            if not traits.elementwise:
                raise ConfigError(
                    f"{type(optimizer).__name__} needs whole matrices, but the engine's buffers are cut anywhere "
                    "already. Pass it to initialize()."
                )
        zero = self._config.zero_optimization
        equip_with_gradients(self._comm, self._units, groups, self._precision, zero.contiguous_gradients)
        streams = any(segment.states is not None for segment in self._segments)
        on_cpu = self.device.type == "cpu" or streams
        max_run_numel = min(zero.sub_group_size, CPU_RUN_NUMEL) if on_cpu else zero.sub_group_size
        sharded: ShardedOptimizer
        if streams:
            sharded = streamed = StreamedOptimizer(
                optimizer, traits, self._units, max_run_numel, depth=self._offloading.depth
            )
            if self._config.shardwise.step_in_backward:
                self._early = StepsInBackward(
                    streamed, self._units, self._offloading, self._ends_step, self.take_in_new_groups
                )
        else:
            sharded = ShardedOptimizer(optimizer, traits, self._units, max_run_numel, unit_by_unit=self._comm.overlaps)
        self._hooks.remove()
        self._watch_units()
        return ShardedStep(
            self._comm,
            self._units,
            self._reducer,
            sharded,
            self._owners,
            self._scaler,
            self._early,
        )

    # ----------------------------------------------------------------------------------------- forward, backward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Collective at stage 3, but on CPU ranks of one host."""
        self._check_open()
        if not torch_compat.in_backward():
            self._hooks.recover()
            self._early.refuse("a forward pass")
        if self._casts_inputs:
            args, kwargs = map_tensors(args, self._cast), map_tensors(kwargs, self._cast)
        if self._step is not None:
            self._step.begin_pass()
        output = self._boundary.wrap(self._run(*args, **kwargs))
        self._hooks.watch_outputs(output)
        return output

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._precision.compute) if tensor.is_floating_point() else tensor

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Compute gradients of ``loss``, divided by ``gradient_accumulation_steps``. Collective.

        Args:
            loss: a scalar.
            retain_graph: as in ``Tensor.backward``.
            scale_wrt_gas: False leaves the loss undivided.

        Returns:
            The loss as it was differentiated, without the loss scale.

        ``loss.backward()`` does the same without the division; in fp16 it is scaled on its way through the model's
        outputs.
        """
        self._check_open()
        if scale_wrt_gas and self.gradient_accumulation_steps() > 1:
            loss = loss / self.gradient_accumulation_steps()
        self.scale(loss).backward(retain_graph=retain_graph)
        return loss.detach()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` times the loss scale, for a ``backward()`` of one's own; outputs then scale no second time."""
        if self._scaler.scale == 1.0:
            return loss
        self._boundary.scaled_already = True
        return loss * self._scaler.scale

    def _reduces_now(self) -> bool:
        if self._reduces_every_backward or not self._syncs:
            reduces = self._syncs
        elif self._early.begins_steps:
            reduces = self._ends_step()
        else:
            reduces = self._reducer.expects_last_pass if self._forced_boundary is None else self._forced_boundary
        if reduces and self._tells_steps and not self._has_told_step:
            self._has_told_step = True
            roll_call.passed_step()
        return reduces

    @property
    def steps_in_backward(self) -> bool:
        """Whether a backward pass at the boundary may begin the step, which the script promises to let follow."""
        return self._config.shardwise.step_in_backward

    def _ends_step(self) -> bool:
        """Whether the next backward pass is the last one of a step, as far as the boundary tells."""
        return self._syncs and self.is_gradient_accumulation_boundary()

    def _backward_is_over(self) -> None:
        self._boundary.reset()
        if self._step is None and self._syncs and self._forced_boundary is not False:
            self._average_loose_gradients()

    def _average_loose_gradients(self) -> None:
        """Of an engine without optimizer; parameters that are sharded nobody can step by hand."""
        if self._comm.world.size > 1 and not any(unit.is_sharded for unit in self._units):
            average_loose_gradients(self._comm, list(self.module.parameters()), self.global_steps)

    @property
    def reduces_every_backward(self) -> bool:
        """Whether gradients are averaged after every backward pass, for want of room for a whole one."""
        return self._reduces_every_backward

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside keep their gradients on this rank; the next pass outside, or ``step``, averages them.

        Works at every stage; at stages 2 and 3 it costs a whole gradient until then.
        """
        with self._syncing(False):
            yield

    @contextmanager
    def sync(self) -> Iterator[None]:
        """Backward passes inside average their gradients, also where this stands inside ``no_sync``."""
        with self._syncing(True):
            yield

    @contextmanager
    def _syncing(self, syncs: bool) -> Iterator[None]:
        previous, self._syncs = self._syncs, syncs
        try:
            yield
        finally:
            self._syncs = previous

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next ``step`` acts."""
        if self._forced_boundary is not None:
            return self._forced_boundary
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decide by hand whether the next ``step`` acts; None returns to counting.

        With ``step_in_backward`` a step begins in backward: decide before.
        """
        self._forced_boundary = is_boundary

    # ------------------------------------------------------------------------------------------------------ step

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """At the boundary: average what is left, agree, clip, step this rank's shards and publish. Collective.

        Args:
            lr_kwargs: passed to ``lr_scheduler.step``.
        """
        self._check_open()
        if self._step is None:
            raise StateError("step() was called, but the engine has no optimizer. Pass one to initialize().")
        if not self._syncs:
            raise StateError(
                "step() was called inside no_sync(): gradients would differ between ranks. Leave it first."
            )
        boundary = self.is_gradient_accumulation_boundary()
        self._early.check(boundary)
        self.micro_steps += 1
        if not boundary:
            return
        self._check_frozen()
        max_norm, self._max_norm_once = self._max_norm(), 0.0
        # A forward whose loss was never differentiated leaves the root whole.
        self._schedule.reshard_all()
        self._schedule.outdate()
        self._offloading.check()
        outcome = self._step.take(self.global_steps, max_norm)
        self._grad_norm = outcome.grad_norm
        self._step_was_applied = outcome.applied
        self.skipped_steps += not outcome.applied
        self.global_steps += 1
        self._has_told_step = False
        self._schedule.step = self.global_steps
        if outcome.applied and self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Clip the next step's gradient to ``max_norm`` as well as the config does; only before a ``step`` that acts.

        Args:
            max_norm: of the averaged gradient of all parameters; infinity only asks.

        Returns:
            The norm before clipping. Collective.
        """
        step = self._settling_step("clip_grad_norm_()")
        if not max_norm > 0:
            raise ConfigError(f"clip_grad_norm_() got max_norm={max_norm}. Expected more than 0; infinity only asks.")
        norm = step.settle(self.global_steps)
        if math.isfinite(max_norm):
            self._max_norm_once = min(max_norm, self._max_norm_once or max_norm)
        return norm

    def clip_grad_value_(self, clip_value: float) -> None:
        """Limit every element of the averaged gradient to ±``clip_value``, before the step. Collective."""
        step = self._settling_step("clip_grad_value_()")
        step.settle(self.global_steps)
        step.clamp(clip_value)

    def _settling_step(self, caller: str) -> Step:
        self._check_open()
        if self._step is None or not self._syncs:
            why = "the engine has no optimizer" if self._step is None else "it stands inside no_sync()"
            raise StateError(f"{caller} was called, but {why}. Call it between the last backward pass and step().")
        if self.steps_in_backward:
            raise StateError(
                f"{caller} was called, but shardwise.step_in_backward steps units before all gradients are known. Drop "
                "the call, or set step_in_backward to false."
            )
        self._schedule.reshard_all()
        return self._step

    def _max_norm(self) -> float:
        """The smaller one of what the config and the script ask for; 0 is no clipping."""
        asked = [norm for norm in (self._config.gradient_clipping, self._max_norm_once) if norm > 0]
        return min(asked, default=0.0)

    def take_in_new_groups(self) -> None:
        """Step the parameters of groups that were added to the optimizer; ``step`` does so too.

        Raises:
            ConfigError: a parameter is not the model's, or was frozen when the engine was built.
        """
        if self._step is not None:
            self._early.refuse_under_way("the adding of a group to the optimizer")
            self._step.take_in_new_groups()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this step, also after a pass that raised (then call it on every rank)."""
        self._hooks.recover()
        self._early.refuse("zero_grad()")
        if self._step is not None:
            self._step.clear_gradients()
        else:
            super().zero_grad(set_to_none)

    # -------------------------------------------------------------------------------------------------- questions

    def get_global_grad_norm(self) -> float:
        """Norm of the averaged gradient of the last step, before clipping; 0 before the first one."""
        if self._grad_norm is None and self._step is not None:
            self._grad_norm = self._step.norm_of_last()
        return self._grad_norm or 0.0

    def was_step_applied(self) -> bool:
        """Whether the last step changed the parameters; False after an fp16 overflow."""
        return self._step_was_applied

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by."""
        return self._scaler.scale

    @property
    def global_samples(self) -> int:
        """Samples that all ranks have trained on."""
        return self.global_steps * self.train_batch_size()

    def train_batch_size(self) -> int:
        """Samples a step, over all ranks."""
        return self._batch_sizes.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one forward on one rank."""
        return self._batch_sizes.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches a step."""
        return self._batch_sizes.gradient_accumulation_steps

    def zero_optimization_stage(self) -> int:
        """The stage that was asked for."""
        return self._config.zero_optimization.stage

    def get_lr(self) -> list[float]:
        """Learning rate of each optimizer group."""
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        return [float(group["lr"]) for group in groups]

    def memory_report(self) -> MemoryReport:
        """Bytes that this rank holds now."""
        self._early.rest()
        return report_memory(self._comm, self._units, self._step, self._offloading, self._background.kept_bytes)

    def comms_summary(self) -> CommsSummary:
        """This rank's collectives so far, by axis, operation and size.

        Raises:
            StateError: the configuration's ``comms_logger`` is off.
        """
        return self._comm.summary()

    def log_summary(self) -> None:
        """Log ``comms_summary`` of rank 0."""
        if self._comm.world.rank == 0:
            logger.info("collectives of rank 0:\n%s", self.comms_summary())

    # -------------------------------------------------------------------------------------------- whole parameters

    @contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """All parameters whole, for reading, on every rank. Collective; passes of the model inside need none."""
        self._check_open()
        if self._hooks.in_backward:
            raise StateError("gathered_parameters() was entered inside a backward pass. Enter it between passes.")
        self._early.refuse("gathered_parameters()")
        self._schedule.hold(self._units)
        try:
            yield
        finally:
            self._schedule.release(self._units)

    def holding(self, parameter: torch.Tensor) -> Held | None:
        """Where this engine holds ``parameter``; None if it is not the model's."""
        if parameter not in self._owners:
            return None
        if not self._hooks.in_backward:
            self._early.refuse(f"a look at parameter {self._name_of(parameter)!r}")
        return Held(self._comm, self._schedule, self._step, *self._owners[parameter], self._scaler.scale,
                    self.global_steps, self._hooks.in_backward)  # fmt: skip

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped model's state dict, whole, on the CPU of every rank. Collective; whole one unit at a time."""
        self._check_open()
        self._early.refuse("state_dict()")
        values: dict[torch.Tensor, torch.Tensor] = {}
        for unit in self._units:
            was_whole = not unit.is_sharded or unit.is_whole
            unit.unshard(self.global_steps, exact=True)
            unit.wait_unsharded()
            for segment in unit.segments:
                for parameter in segment.parameters.parameters:
                    values[parameter] = parameter.detach().to("cpu", copy=True)
            if not was_whole:
                unit.reshard()
        state = self._references(*args, **kwargs)
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = values[value] if value in values else value.detach().to("cpu", copy=True)
        return state

    def _references(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The wrapped model's state dict with its own parameters and buffers as values."""
        self._state_dict_guard.remove()
        try:
            state: dict[str, Any] = self.module.state_dict(*args, **{**kwargs, "keep_vars": True})
        finally:
            self._state_dict_guard = self._guard_state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> IncompatibleKeys:
        """Replace parameters and buffers by those of a whole state dict; masters too. Collective.

        Args:
            state_dict: the same on every rank; names as in ``state_dict()``.
            strict: names that are missing or too many are an error.
            assign: refused, since the engine's buffers keep their places.

        Returns:
            Missing and unexpected names, as ``nn.Module.load_state_dict``.

        Raises:
            ConfigError: names or shapes do not fit; nothing was changed then.
        """
        self._check_open()
        self._early.refuse("load_state_dict()")
        own = self._references()
        missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        wrong = [
            f"{name!r} has shape {tuple(state_dict[name].shape)}, expected {tuple(value.shape)}"
            for name, value in own.items()
            if name in state_dict and isinstance(value, torch.Tensor) and state_dict[name].shape != value.shape
        ]
        if assign or wrong or (strict and (missing or unexpected)):
            faults = [f"missing: {missing}"] * bool(missing) + [f"unexpected: {unexpected}"] * bool(unexpected) + wrong
            raise ConfigError(
                "the state dict was not loaded: "
                + ("; ".join(faults) or "assign=True would replace the engine's buffers")
                + ". Pass the state dict of the same model; strict=False ignores missing and unexpected names."
            )
        self.put_away()
        self._comm.exchange(CollectiveId("begin of a load", "", self.global_steps), b"")
        for name, value in own.items():
            if name in state_dict and value in self._owners:
                unit, number, slot = self._owners[value]
                unit.segments[number].parameters.load(slot, state_dict[name])
            elif name in state_dict and isinstance(value, torch.Tensor):
                value.copy_(state_dict[name])
        self._comm.publish()
        self._comm.exchange(CollectiveId("end of a load", "", self.global_steps), b"")
        return IncompatibleKeys(missing, unexpected)

    def _guard_state_dict(self) -> RemovableHandle:
        guard = ModuleHook(self._refuse_sharded_state_dict, self._refuse_sharded_copy)
        handle: RemovableHandle = self.module.register_state_dict_pre_hook(guard)
        return handle

    def _refuse_sharded_copy(self) -> None:
        for unit in self._units:
            refuse_copy(unit)

    def _refuse_sharded_state_dict(self, *_: Any) -> None:
        if any(unit.is_sharded and not unit.is_whole for unit in self._units):
            raise StateError(
                "state_dict() of the wrapped model was called while its parameters are sharded: it would hold NaN. "
                "Call engine.state_dict() on every rank, or stay inside engine.gathered_parameters()."
            )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def trained(self, name: str = "pytorch_model") -> Trained:
        """What a checkpoint keeps of this engine, under ``name``."""
        self._notice_given_up()
        self._early.refuse_under_way("a checkpoint")
        counters = {
            "global_steps": self.global_steps,
            "micro_steps": self.micro_steps,
            "skipped_steps": self.skipped_steps,
            "num_passes": 0 if self._step is None else self._step.num_passes,
        }
        return Trained(
            name, self._comm, self._units, self._references(), self._optimizer, self._step, self.lr_scheduler,
            self._scaler, counters, self.zero_optimization_stage(),
        )  # fmt: skip

    def save_checkpoint(
        self,
        save_dir: PathLike,
        tag: str | int | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        keep_last: int | None = None,
        async_save: bool = False,
        allow_pickle: Collection[str] = (),
    ) -> bool:
        """Write everything that training needs to go on, on any number of ranks and at any stage. Collective.

        Args:
            save_dir: directory of checkpoints, seen by all ranks.
            tag: this one's name there; default ``global_step{N}``.
            client_state: the script's own values; tensors, numbers, texts and nests of them. Rank 0's are kept.
            save_latest: let the file ``latest`` name this checkpoint.
            exclude_frozen_parameters: leave frozen parameters out; a load keeps those of the model.
            async_save: write beside training what is copied to host memory now; the optimizer's state is copied before
                its next step. The next save or load, or ``wait_for_checkpoint``, waits for the end and raises what
                went wrong; call it before you change tensors of the optimizer's state in place.
            keep_last: remove the oldest checkpoints of the directory, so that this many stay.
            allow_pickle: places whose values are kept as pickles, such as ``client_state.arguments``.

        Returns:
            True.

        Raises:
            CheckpointError: it could not be written; what was complete in ``save_dir`` still is.
        """
        self.check_savable("save_checkpoint")
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"save_checkpoint(keep_last={keep_last}): expected at least 1, or None to keep all.")
        place = Place(Path(save_dir), f"global_step{self.global_steps}" if tag is None else str(tag), save_latest,
                      keep_last)  # fmt: skip
        save_engine(self.trained(), place, client_state or {}, exclude_frozen_parameters, allow_pickle,
                    self._background, async_save)  # fmt: skip
        return True

    def wait_for_checkpoint(self) -> None:
        """Return when the save that goes on beside training is complete on all ranks. Collective.

        Raises:
            CheckpointError: it failed; what was complete before still is.
        """
        self._check_open()
        self._background.finish(EngineMeeting(self._comm, self.global_steps))

    def load_checkpoint(
        self,
        load_dir: PathLike,
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        *,
        allow_pickle: Collection[str] = (),
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on where ``save_checkpoint`` was called, also with another number of ranks or stage. Collective.

        In a world of the same size training goes on bit for bit: each rank's random states come back, too.

        Args:
            load_dir: directory of checkpoints.
            tag: which one; None: the one that ``latest`` names.
            load_module_strict: names that are missing or too many are an error.
            load_optimizer_states: also the optimizer's and the loss scaler's.
            load_lr_scheduler_states: also the scheduler's.
            load_module_only: nothing but parameters and buffers.
            allow_pickle: places that may be unpickled: that runs code of whoever wrote the checkpoint.

        Returns:
            The checkpoint's directory and the script's own values; (None, None) where there is no checkpoint.

        Raises:
            CheckpointError: it is of another model, or damaged; the engine is as it was.
        """
        self._check_open()
        self._notice_given_up()
        self._check_between_steps("load_checkpoint")
        self._early.refuse_under_way("load_checkpoint()")
        self.wait_for_checkpoint()
        full = not load_module_only
        wishes = Wishes(full and load_optimizer_states, full and load_lr_scheduler_states, load_module_strict)
        tag = None if tag is None else str(tag)
        loaded = load_engine(self.trained(), load_dir, tag, wishes, allow_pickle, self.put_away)
        if loaded is None:
            return None, None
        if full:
            self.take_counters(loaded.counters)
            if loaded.random_states is not None:
                randomness.put_back(loaded.random_states, self.device)
        return str(loaded.path), loaded.client_state

    def take_counters(self, counters: Mapping[str, int]) -> None:
        """Count on from there."""
        self.global_steps = counters["global_steps"]
        self.micro_steps = counters["micro_steps"]
        self.skipped_steps = counters["skipped_steps"]
        self._schedule.step = self.global_steps

    def put_away(self) -> None:
        """Only shards rest from here on, until the model runs again."""
        self._schedule.reshard_all()
        self._schedule.outdate()

    def save_16bit_model(
        self,
        save_dir: PathLike,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole weights, in the dtype that the model computes in, from rank 0. Collective.

        Args:
            save_dir: directory; made where it is missing.
            save_filename: ``*.bin`` for ``torch.load``, ``*.safetensors`` for the other.
            exclude_frozen_parameters: leave frozen parameters out.

        Returns:
            True.

        Raises:
            ConfigError: stage 3, and the configuration does not allow gathering whole weights.
        """
        self.check_savable("save_16bit_model")
        zero = self._config.zero_optimization
        if zero.stage == 3 and not zero.stage3_gather_16bit_weights_on_model_save:
            raise ConfigError(
                "save_16bit_model() at stage 3 gathers whole weights on rank 0, and the configuration does not allow "
                'it. Set "stage3_gather_16bit_weights_on_model_save": true under "zero_optimization", or write a '
                "checkpoint and use its zero_to_fp32.py."
            )
        self.write_weights(Path(save_dir) / save_filename, safetensors=False,
                           exclude_frozen_parameters=exclude_frozen_parameters)  # fmt: skip
        return True

    def write_weights(
        self,
        output: PathLike,
        max_shard_size: int | str = "10GB",
        safetensors: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> None:
        """Write the whole weights from rank 0, one parameter whole at a time. Collective.

        Args:
            output: a file (``*.safetensors``, ``*.bin``), or a directory for shards with an index.
            max_shard_size: bytes of a shard, such as ``5GB``.
            safetensors: shards of safetensors, or files for ``torch.load``.
            exclude_frozen_parameters: leave frozen parameters out.
        """
        self.check_savable("write_weights")
        write_engine(self.trained(), Path(output), max_shard_size, safetensors, not exclude_frozen_parameters)

    def export_pretrained(self, output: PathLike, max_shard_size: int | str = "5GB") -> None:
        """Write config and weights as ``from_pretrained`` of transformers reads them, from rank 0. Collective.

        Args:
            output: a directory; made where it is missing.
            max_shard_size: bytes of a file of weights; several get an index.

        Raises:
            ConfigError: the model is none of transformers.
        """
        self.check_savable("export_pretrained")
        export_pretrained(self.trained(), self.module, Path(output), max_shard_size)

    def export_dcp(self, output: PathLike) -> None:
        """Write weights and optimizer states as ``torch.distributed.checkpoint.load`` reads them. Collective.

        A checkpoint of ours is written beside it first and removed at the end: there must be room for both.

        Args:
            output: a directory that does not exist, or is empty.
        """
        self.check_savable("export_dcp")
        self.wait_for_checkpoint()
        export_dcp(self.trained(), Path(output))

    def gather_state_dict(self) -> dict[str, Any]:
        """The wrapped model's state dict, whole, on rank 0's CPU; an empty one elsewhere. Collective.

        Needs memory for it and for one parameter more on rank 0, for one parameter elsewhere.
        """
        self.check_savable("gather_state_dict")
        return gather_engine(self.trained())

    def _notice_given_up(self) -> None:
        """A pass that raised has begun a step: a load may follow, for it replaces what is stepped in part."""
        if self._early.begins_steps and not torch_compat.in_backward():
            self._hooks.recover()

    def check_savable(self, caller: str) -> None:
        """StateError where this is no moment to save parameters and states."""
        self._check_open()
        self._check_between_steps(caller)
        self._early.refuse(f"{caller}()")

    def _check_between_steps(self, caller: str) -> None:
        if self._hooks.in_backward:
            raise StateError(f"{caller}() was called inside a backward pass. Call it between steps.")

    # ------------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Take the hooks off the model, free the optimizer's state and the transport; the engine is then of no use."""
        if self._closed:
            return
        self._closed = True
        withdraw(self)
        self._background.close()
        self._hooks.remove()
        self._state_dict_guard.remove()
        if self._step is not None:
            self._step.close()
        self._offloading.close()
        self._comm.close()

    destroy = close

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __setattr__(self, name: str, value: Any) -> None:
        # A module looks for parameters and modules in everything; the numbers of each step are neither.
        if isinstance(value, int | float):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Names that the engine lacks are looked up on the wrapped model, as with DeepSpeed's engine."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the engine was closed. Build a new one with initialize().")

    def _name_of(self, parameter: torch.Tensor) -> str:
        unit, number, slot = self._owners[parameter]
        return unit.segments[number].names[slot]

    def _check_frozen(self) -> None:
        for parameter in self._frozen:
            if parameter.requires_grad or parameter.grad is not None:
                raise StateError(
                    f"parameter {self._name_of(parameter)!r} was frozen when the engine was built and is "
                    "trainable now: there is no room for its gradient. Unfreeze before initialize()."
                )


def _run_under_autocast(module: nn.Module, device_type: str, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """Losses that are computed from the outputs are as exact as without autocast."""
    with torch.autocast(device_type, dtype):
        output = module(*args, **kwargs)
    return map_tensors(output, lambda tensor: tensor.float() if tensor.dtype in NARROW else tensor)
