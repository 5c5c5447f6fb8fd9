"""``Accelerator``: the object that a training script talks to.

::

    accelerator = Accelerator()
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

It holds what a run is (`state`), says on which micro-batches the optimizer steps (`accumulation`), and has objects made
ready (`preparation`); training itself is the engine's.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from shardwise import operations, roll_call
from shardwise.accumulation import GradientAccumulationPlugin, GradientState
from shardwise.checkpoint.model import Wishes
from shardwise.checkpointing import (
    Prepared,
    Registered,
    load_state,
    output_folder,
    save_state,
    write_module,
)
from shardwise.data.prepare import prepare_data_loader, skip_first_batches
from shardwise.errors import ConfigError, StateError
from shardwise.handlers import (
    PROFILE_PATTERN_NAME,
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProfileKwargs,
    ProjectConfiguration,
)
from shardwise.helpers import extract_model_from_parallel, save
from shardwise.memory import release_memory
from shardwise.optimizer import AcceleratedOptimizer
from shardwise.plugin import DeepSpeedPlugin
from shardwise.preparation import RunFacts, prepare
from shardwise.process import DistributedType
from shardwise.scheduler import AcceleratedScheduler
from shardwise.state import AcceleratorState
from shardwise.trackers.base import GeneralTracker
from shardwise.trackers.choose import LogWith, filter_trackers
from shardwise.trackers.running import Trackers
from shardwise.zero.construction import Init
from shardwise.zero.engine import Engine
from shardwise.zero.pieces import parked

_logger = logging.getLogger(__name__)

# What Accelerate's constructor takes for other back-ends, and what to do here instead.
_ELSEWHERE = {
    "fsdp_plugin": "DeepSpeedPlugin(zero_stage=3) shards the same states",
    "megatron_lm_plugin": "there is no tensor or pipeline parallelism",
    "torch_tp_plugin": "there is no tensor parallelism",
    "parallelism_config": "all ranks are data-parallel",
    "dynamo_plugin": "compile the model's blocks with torch.compile before prepare",
    "dynamo_backend": "compile the model's blocks with torch.compile before prepare",
}


class Accelerator:
    """Trains with or without ZeRO, on one process or many, on CPU or GPU, as flags, YAML, JSON and arguments say.

    Args:
        device_placement: whether loaders put batches on the device. Models are placed by their engine.
        split_batches: see ``DataLoaderConfiguration``.
        mixed_precision: "no", "fp16" or "bf16"; None: as flags, YAML or JSON say.
        gradient_accumulation_steps: micro-batches a step, where neither JSON nor plugin says it.
        cpu: run on the CPU even where there is a GPU.
        dataloader_config: how loaders are prepared.
        deepspeed_plugin: a plugin, or several by name; None: one from flags and YAML, if these ask for ZeRO.
        rng_types: random generators to make alike on all ranks at each epoch: "torch", "cuda", "generator".
        log_with: trackers for ``init_trackers`` and ``log``: names ("jsonl", "csv", "tensorboard", "wandb", "trackio",
            "mlflow"), "all" that are installed, objects of ``GeneralTracker``, or a list of these.
        project_dir: directory for checkpoints and logs.
        project_config: more about it.
        gradient_accumulation_plugin: more about accumulation, instead of ``gradient_accumulation_steps``.
        step_scheduler_with_optimizer: False: the script itself ticks schedulers only when the optimizer steps.
        kwargs_handlers: ``InitProcessGroupKwargs``, ``GradScalerKwargs``, ``AutocastKwargs`` and kin.
        deepspeed_plugins: another name of ``deepspeed_plugin``.
        others: what Accelerate takes for other back-ends; each is refused with what to do instead.

    Raises:
        ConfigError: arguments contradict each other, or flags, or the JSON.
    """

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool | None = None,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        deepspeed_plugin: DeepSpeedPlugin | Mapping[str, DeepSpeedPlugin] | None = None,
        *,
        rng_types: Sequence[str] | None = None,
        log_with: LogWith = None,
        project_dir: str | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: Sequence[KwargsHandler] | None = None,
        deepspeed_plugins: DeepSpeedPlugin | Mapping[str, DeepSpeedPlugin] | None = None,
        **others: Any,
    ) -> None:
        _refuse_others(others)
        if deepspeed_plugin is not None and deepspeed_plugins is not None:
            raise ConfigError("Accelerator() got deepspeed_plugin and deepspeed_plugins. They are one: pass one.")
        self.project_configuration = project_config or ProjectConfiguration(project_dir=project_dir)
        if project_dir is not None and self.project_dir is None:
            self.project_configuration.set_directories(project_dir)
        self.log_with = filter_trackers(log_with, self.logging_dir)
        self._trackers = Trackers(self.log_with, self.logging_dir)
        handlers = _by_type(kwargs_handlers or ())
        group = handlers.get(InitProcessGroupKwargs, InitProcessGroupKwargs())
        self.state = AcceleratorState(
            mixed_precision,
            cpu,
            deepspeed_plugin if deepspeed_plugin is not None else deepspeed_plugins,
            backend=group.backend,
            timeout=group.timeout,
        )
        self.scaler_handler: GradScalerKwargs = handlers.get(GradScalerKwargs, GradScalerKwargs())
        self.autocast_handler: AutocastKwargs = handlers.get(AutocastKwargs, AutocastKwargs())
        self.ddp_handler: DistributedDataParallelKwargs | None = handlers.get(DistributedDataParallelKwargs)
        self.profile_handler: ProfileKwargs | None = handlers.get(ProfileKwargs)
        self._check_gradient_dtype()
        self.device_placement = device_placement
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.rng_types = list(rng_types) if rng_types is not None else ["generator"]
        self.dataloader_config = dataloader_config or DataLoaderConfiguration(split_batches=bool(split_batches))
        self._asked_steps = _steps(gradient_accumulation_steps, gradient_accumulation_plugin)
        plugin = gradient_accumulation_plugin or GradientAccumulationPlugin()
        plugin.num_steps = self._first_num_steps()
        self.gradient_state = GradientState(plugin)
        self.flag_tensor: torch.Tensor | None = None
        self._has_peers = self.use_distributed
        self._accumulates = False  # inside accumulate()
        self._micro_batch = _MicroBatch(self._begin_micro_batch, self._end_micro_batch)
        self._models: list[Engine] = []
        self._optimizers: list[AcceleratedOptimizer] = []
        self._schedulers: list[AcceleratedScheduler] = []
        self._dataloaders: list[Any] = []
        self._registered = Registered()

    def _check_gradient_dtype(self) -> None:
        hook = None if self.ddp_handler is None else self.ddp_handler.communication_dtype
        if hook is not None and self.deepspeed_plugin is not None:
            raise ConfigError(
                f"DistributedDataParallelKwargs(comm_hook={hook!r}) is for runs without ZeRO. With ZeRO set "
                f'"communication_data_type": "{hook}" in the DeepSpeed JSON.'
            )

    # --- what the run is -----------------------------------------------------------------------------------------

    @property
    def distributed_type(self) -> DistributedType:
        """DEEPSPEED where ZeRO is in play, else what the processes are."""
        kind: DistributedType = self.state.distributed_type
        return kind

    @property
    def num_processes(self) -> int:
        """Ranks of the run."""
        return int(self.state.num_processes)

    @property
    def process_index(self) -> int:
        """This rank."""
        return int(self.state.process_index)

    @property
    def local_process_index(self) -> int:
        """This rank among those of its machine."""
        return int(self.state.local_process_index)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        device: torch.device = self.state.device
        return device

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first process of all."""
        return bool(self.state.is_main_process)

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its machine."""
        return bool(self.state.is_local_main_process)

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last process of all."""
        return bool(self.state.is_last_process)

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one process."""
        return bool(self.state.use_distributed)

    @property
    def mixed_precision(self) -> str:
        """ "no", "fp16" or "bf16"."""
        return self.state.mixed_precision

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The active plugin; None in a run without ZeRO."""
        return self.state.deepspeed_plugin

    @property
    def deepspeed_config(self) -> dict[str, Any] | None:
        """The active plugin's DeepSpeed JSON."""
        return None if self.deepspeed_plugin is None else self.deepspeed_plugin.deepspeed_config

    @property
    def project_dir(self) -> str | None:
        """Directory of checkpoints."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | None:
        """Directory of trackers."""
        return self.project_configuration.logging_dir

    @property
    def split_batches(self) -> bool:
        """Whether a loader's batch size is that of all ranks together."""
        return self.dataloader_config.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether rank 0 reads and hands out."""
        return self.dataloader_config.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """Whether ranks get equally many batches."""
        return self.dataloader_config.even_batches

    @even_batches.setter
    def even_batches(self, even_batches: bool) -> None:
        self.dataloader_config.even_batches = even_batches

    @property
    def use_seedable_sampler(self) -> bool:
        """Whether loaders shuffle by a seed and the number of the epoch alone."""
        return self.dataloader_config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """Whether batches are copied to the device without waiting."""
        return self.dataloader_config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether loaders that know where they stand were asked for; all of them do."""
        return self.dataloader_config.use_stateful_dataloader

    # --- processes -----------------------------------------------------------------------------------------------

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print`` on the first process of each machine alone."""
        self.state.print(*args, **kwargs)

    def wait_for_everyone(self) -> None:
        """Go on when every process is here."""
        self.state.wait_for_everyone()

    def main_process_first(self) -> AbstractContextManager[None]:
        """The first process runs the block before the others do."""
        context: AbstractContextManager[None] = self.state.main_process_first()
        return context

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """The first process of each machine runs the block before the others do."""
        context: AbstractContextManager[None] = self.state.local_main_process_first()
        return context

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: run on the first process alone."""
        return self.state.on_main_process(function)  # type: ignore[no-any-return]

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: run on the first process of each machine alone."""
        return self.state.on_local_main_process(function)  # type: ignore[no-any-return]

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: run on the last process alone."""
        return self.state.on_last_process(function)  # type: ignore[no-any-return]

    def on_process(self, function: Callable[..., Any] | None = None, process_index: int | None = None) -> Any:
        """Decorator: run on one process alone."""
        return self.state.on_process(function, process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Any:
        """Decorator: run on one process of each machine alone."""
        return self.state.on_local_process(function, local_process_index)

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """Give each process its share of ``inputs``."""
        context: AbstractContextManager[Any] = self.state.split_between_processes(inputs, apply_padding)
        return context

    # --- making objects ready ------------------------------------------------------------------------------------

    def init_context(self, **settings: Any) -> Init:
        """A context in which models are built in pieces, where ``zero3_init_flag`` says so (at stage 3 by default).

        Without ZeRO, at other stages and with the flag false it does nothing, so a script need not ask.

        Args:
            settings: of ``shardwise.zero.Init``.
        """
        plugin = self.deepspeed_plugin
        return Init(enabled=plugin is not None and plugin.is_zero3_init_enabled(), **settings)

    def prepare(self, *args: Any, device_placement: Sequence[bool | None] | None = None) -> Any:
        """Make models, optimizers, schedulers and loaders ready; collective where a model is among them.

        Args:
            args: objects in any order. Others, such as numbers, come back as they are.
            device_placement: refused for models: their engine places them.

        Returns:
            The objects in the same order; one object for one.

        Raises:
            ConfigError: objects do not belong together, or "auto" in the config cannot be filled from them.
        """
        if device_placement is not None:
            raise ConfigError("prepare(device_placement=...): the engine places models. Leave it out.")
        self._say_what_was_built_whole(args)
        ready, config = prepare(args, self._facts())
        self._models += [item for item in ready if isinstance(item, Engine)]
        self._optimizers += [item for item in ready if isinstance(item, AcceleratedOptimizer)]
        self._schedulers += [item for item in ready if isinstance(item, AcceleratedScheduler)]
        self._dataloaders += [item for item in ready if isinstance(item, DataLoader) and item not in self._dataloaders]
        if config is not None:
            self._adopt_accumulation()
        return ready[0] if len(ready) == 1 else tuple(ready)

    def _say_what_was_built_whole(self, objects: Sequence[Any]) -> None:
        """``zero3_init_flag: true`` acts in a context, which a script for Accelerate does not open."""
        plugin = self.deepspeed_plugin
        if plugin is None or not (plugin.zero3_init_flag and plugin.is_zero3_init_enabled()):
            return
        if self.num_processes == 1 or not self.is_main_process:
            return
        for model in objects:
            if isinstance(model, nn.Module) and not any(parked(p) is not None for p in model.parameters()):
                _logger.warning(
                    "zero3_init_flag is true, but prepare() got a %s that was built whole on each rank. Build it "
                    "inside `with accelerator.init_context():`.",
                    type(model).__name__,
                )

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """``prepare`` of one model."""
        return self.prepare(model)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        """``prepare`` of the optimizer of a model that was prepared before."""
        return self.prepare(optimizer)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """``prepare`` of the scheduler of an optimizer that was prepared before."""
        return self.prepare(scheduler)

    def prepare_data_loader(
        self, data_loader: DataLoader[Any], device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> Any:
        """``prepare`` of one loader."""
        put = self.device_placement if device_placement is None else device_placement
        loader = self._wrap_loader(data_loader, put, slice_fn_for_dispatch)
        self._dataloaders.append(loader)
        return loader

    def _wrap_loader(self, loader: DataLoader[Any], put_on_device: bool | None = None, slice_fn: Any = None) -> Any:
        settings = self.dataloader_config
        return prepare_data_loader(
            loader,
            self.device,
            self.num_processes,
            self.process_index,
            settings.split_batches,
            self.device_placement if put_on_device is None else put_on_device,
            list(self.rng_types),
            settings.dispatch_batches,
            settings.even_batches,
            slice_fn,
            settings.use_seedable_sampler,
            settings.data_seed,
            settings.non_blocking,
            settings.use_stateful_dataloader,
            active=self.gradient_state.loaders,
        )

    def _facts(self) -> RunFacts:
        return RunFacts(
            plugin=self.deepspeed_plugin,
            plain_config=self._plain_config(),
            device=self.device,
            num_processes=self.num_processes,
            gradient_accumulation_steps=self._asked_steps,
            split_batches=self.split_batches,
            step_scheduler_with_optimizer=self.step_scheduler_with_optimizer,
            wrap=self._wrap_loader,
            loaders=self._dataloaders,
            engines=self._models,
        )

    def _plain_config(self) -> dict[str, Any]:
        """The engine's config in a run without ZeRO: data parallelism under autocast."""
        clipping = self.state.resolved["gradient_clipping"]
        config: dict[str, Any] = {
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": clipping or 0.0,
            "zero_optimization": {"stage": 0},
        }
        if self.ddp_handler is not None and self.ddp_handler.communication_dtype is not None:
            config["communication_data_type"] = self.ddp_handler.communication_dtype
        if self.mixed_precision != "no":
            config["torch_autocast"] = {"enabled": True, "dtype": self.mixed_precision}
        if self.mixed_precision == "fp16":
            config["fp16"] = {
                "initial_scale_power": math.frexp(self.scaler_handler.init_scale)[1] - 1,
                "loss_scale_window": self.scaler_handler.growth_interval,
                "hysteresis": 1,
            }
        return config

    # --- training ------------------------------------------------------------------------------------------------

    @property
    def sync_gradients(self) -> bool:
        """Whether the present micro-batch is the last one of its step."""
        return self.gradient_state.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, sync_gradients: bool) -> None:
        self.gradient_state.sync_gradients = sync_gradients

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches a step."""
        return self.gradient_state.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, gradient_accumulation_steps: int) -> None:
        self.gradient_state.plugin.num_steps = gradient_accumulation_steps

    def _first_num_steps(self) -> int:
        """What holds before anything is prepared: the config's number, else the argument."""
        plugin = self.deepspeed_plugin
        configured = (
            self.state.resolved["gradient_accumulation_steps"]
            if plugin is None
            else plugin.get_value("gradient_accumulation_steps")
        )
        asked = self._asked_steps
        if not isinstance(configured, int):
            return asked or 1
        if asked is not None and asked != configured:
            said = self.state.resolved.values["gradient_accumulation_steps"]
            _warn(
                self, f"gradient_accumulation_steps is {said}; Accelerator(gradient_accumulation_steps={asked}) yields."
            )
        return configured

    def _adopt_accumulation(self) -> None:
        """The engine may have found the number from the batch sizes."""
        engine = self._models[-1]
        self.gradient_accumulation_steps = engine.gradient_accumulation_steps()
        if engine.steps_in_backward and self.gradient_state.plugin.sync_each_batch:
            raise ConfigError(
                "GradientAccumulationPlugin(sync_each_batch=True) ends every backward pass as if a step followed, and "
                "shardwise.step_in_backward begins the step there. Drop one of the two."
            )

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[None]:
        """One micro-batch: gradients are averaged, and the optimizer steps, on the last one of each step.

        Args:
            models: those that are run inside; all prepared models follow the same count.
        """
        return self._micro_batch

    def _begin_micro_batch(self) -> None:
        state = self.gradient_state
        if state.sync_gradients and self._has_peers:  # a step begins
            roll_call.passed_step()
        state.begin_micro_batch()
        self._tell_engines()
        self._accumulates = True

    def _end_micro_batch(self) -> None:
        self._accumulates = False

    def _tell_engines(self) -> None:
        """Engines average gradients where the micro-batch steps, not where their own count would."""
        state = self.gradient_state
        reduces = state.sync_gradients or state.plugin.sync_each_batch
        for engine in self._models:
            engine.set_gradient_accumulation_boundary(reduces)

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Backward passes inside keep the model's gradients on this rank; the next one outside averages them."""
        with model.no_sync() if isinstance(model, Engine) else ExitStack():
            yield

    @staticmethod
    @contextmanager
    def trigger_sync_in_backward(model: nn.Module) -> Iterator[None]:
        """Backward passes inside average the model's gradients, also within ``no_sync`` and of forwards made there."""
        with model.sync() if isinstance(model, Engine) else ExitStack():
            yield

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Compute gradients of ``loss`` over ``gradient_accumulation_steps``. Collective.

        Args:
            loss: a scalar that depends on a prepared model.
            kwargs: as ``Tensor.backward`` takes them.
        """
        if not loss.requires_grad:
            raise StateError(
                "backward() got a loss without a graph: no trainable parameter leads to it. Compute it from the "
                "prepared model's outputs, outside of torch.no_grad()."
            )
        if not self._models:
            raise StateError("backward() was called, but no model was prepared. Call accelerator.prepare() first.")
        if self.gradient_accumulation_steps > 1:
            loss = loss / self.gradient_accumulation_steps
        if self._has_peers and not self._accumulates:
            roll_call.passed_step()
        self._tell_engines()
        self.gradient_state.has_own_gradient = True
        if len(self._models) == 1:
            self._models[0].backward(loss, scale_wrt_gas=False, **kwargs)
        else:  # each engine scales the gradients that enter its own outputs
            loss.backward(**kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> torch.Tensor | None:
        """Clip the gradient of the models that ``parameters`` are of, on micro-batches that step. Collective.

        Args:
            parameters: of prepared models; each model's gradient is clipped as a whole.
            max_norm: the limit; that of the config counts as well.
            norm_type: 2.

        Returns:
            The norm before clipping; of the step before, on a micro-batch that only accumulates.
        """
        if norm_type != 2:
            raise ConfigError(f"clip_grad_norm_(norm_type={norm_type}): expected 2, the only norm that ranks sum up.")
        engines = self._engines_of(parameters, "clip_grad_norm_")
        if self.sync_gradients:
            norms = [engine.clip_grad_norm_(float(max_norm)) for engine in engines]
        else:
            norms = [engine.get_global_grad_norm() for engine in engines]
        return torch.tensor(math.sqrt(math.fsum(norm * norm for norm in norms)), device=self.device)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Limit every element of the gradient to ±``clip_value``, on micro-batches that step. Collective."""
        engines = self._engines_of(parameters, "clip_grad_value_")
        if self.sync_gradients:
            for engine in engines:
                engine.clip_grad_value_(float(clip_value))

    def _engines_of(self, parameters: Any, caller: str) -> list[Engine]:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        wanted = {id(parameter) for parameter in given}
        engines = []
        for engine in self._models:
            own = {id(parameter) for parameter in engine.parameters()}
            if wanted & own:
                engines.append(engine)
                wanted -= own
        if wanted or not engines:
            raise ConfigError(f"{caller}() got parameters of no prepared model. Pass model.parameters() of one.")
        return engines

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Nothing to do: norms and clipping see gradients without the loss scale."""

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of some optimizer changed nothing, because a gradient had overflowed in fp16."""
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)

    @contextmanager
    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> Iterator[None]:
        """Run what is outside of prepared models, such as a loss, in the run's precision."""
        handler = autocast_handler or self.autocast_handler
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
        dtype = dtypes.get(self.mixed_precision)
        with torch.autocast(
            self.device.type,
            dtype=dtype or torch.bfloat16,
            enabled=handler.enabled and dtype is not None,
            cache_enabled=handler.cache_enabled,
        ):
            yield

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
        """Record what runs inside; with a directory for traces collective.

        Args:
            profile_handler: what to record, and where to put it; default: that of ``kwargs_handlers``.
        """
        handler = profile_handler or self.profile_handler or ProfileKwargs()
        with handler.build() as profiler:
            yield profiler
        if handler.output_trace_dir is None:
            return
        os.makedirs(handler.output_trace_dir, exist_ok=True)
        name = PROFILE_PATTERN_NAME.format(suffix=self.process_index)
        profiler.export_chrome_trace(os.path.join(handler.output_trace_dir, name))
        self.wait_for_everyone()

    def set_trigger(self) -> None:
        """Raise a flag on this rank, for ``check_trigger`` on all."""
        self.flag_tensor = torch.ones(1, device=self.device)

    def check_trigger(self) -> bool:
        """Whether some rank has raised the flag since the last time; then it is lowered. Collective."""
        if self.flag_tensor is None:
            self.flag_tensor = torch.zeros(1, device=self.device)
        raised = bool(self.reduce(self.flag_tensor, "sum").item() >= 1)
        if raised:
            self.flag_tensor = None
        return raised

    @contextmanager
    def join_uneven_inputs(self, joinables: Sequence[Any], even_batches: bool | None = None) -> Iterator[None]:
        """Loops of uneven length, which engines do not run: refused where loaders are not even.

        Args:
            joinables: models, and whatever else takes part in the loop.
            even_batches: whether loaders are even inside; default: as they are.

        Raises:
            ConfigError: a model of several ranks is to be run on loaders that are not even.
        """
        is_even = self.even_batches if even_batches is None else even_batches
        if not is_even and self.num_processes > 1 and any(isinstance(item, Engine) for item in joinables):
            raise ConfigError(
                "join_uneven_inputs() with even_batches=False: ranks of an engine step together, so none may run out "
                "of batches before the others. Leave even_batches at True; gather_for_metrics drops what is twice."
            )
        yield

    # --- tensors of all ranks ------------------------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        """Tensors of all ranks, one after another. Collective."""
        return operations.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """``gather`` without the samples that fill up a loader's last round. Collective.

        Args:
            input_data: nested tensors, or objects.
            use_gather_object: gather as objects, for what is not made of tensors.
        """
        as_object = use_gather_object or not _has_only_tensors(input_data)
        gathered = operations.gather_object(input_data) if as_object else operations.gather(input_data)
        state = self.gradient_state
        if not (state.end_of_dataloader and state.remainder > 0 and self.num_processes > 1):
            return gathered
        if as_object:
            return gathered[: state.remainder]
        return operations.recursively_apply(lambda tensor: tensor[: state.remainder], gathered)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Sum or mean over ranks. Collective."""
        return operations.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Make tensors of all ranks equally long. Collective."""
        return operations.pad_across_processes(tensor, dim, pad_index, pad_first)

    # --- trackers ------------------------------------------------------------------------------------------------

    @property
    def trackers(self) -> list[GeneralTracker]:
        """Those that run on this process: on others than the first one usually none."""
        return self._trackers.running

    def init_trackers(
        self,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Begin a run with each tracker of ``log_with``.

        Args:
            project_name: of the project, experiment or directory, as each tracker calls it.
            config: settings to keep with the run, nested or not.
            init_kwargs: further arguments by tracker, such as ``{"wandb": {"tags": ["a"]}}``.
        """
        self._trackers.start(project_name, config, init_kwargs)

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Give what was measured to the trackers of this process; one that fails is a warning, training goes on.

        Args:
            values: numbers, tensors of one element, strings, or dicts of these, by name.
            step: where on the horizontal axis.
            log_kwargs: further arguments by tracker.
        """
        self._trackers.log(values, step, log_kwargs)

    def log_images(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """``log`` for images: arrays of them, or lists, by name."""
        self._trackers.log_images(values, step, log_kwargs)

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """The tracker of that name; where it does not run, a stand-in whose methods do nothing.

        Args:
            name: as in ``log_with``.
            unwrap: the object that does the tracker's work, such as the run of Weights & Biases.
        """
        return self._trackers.get(name, unwrap)

    # --- models in and out ---------------------------------------------------------------------------------------

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The script's own module."""
        return extract_model_from_parallel(model, keep_fp32_wrapper, keep_torch_compile)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Whole weights, on the CPU. Collective: call it on every rank.

        Returns:
            The state dict of the script's module; at stage 3 on the main process alone, an empty one on the others:
            ``save_pretrained(state_dict=...)`` would take None for "ask the module", whose parameters are in shards.

        Raises:
            ConfigError: stage 3, and neither JSON nor plugin allows gathering whole weights.
        """
        if not isinstance(model, Engine):
            return model.state_dict()
        if model.zero_optimization_stage() < 3:
            return model.state_dict()
        plugin = self.deepspeed_plugin
        if plugin is not None and not plugin.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
            raise ConfigError(
                "get_state_dict() at stage 3 gathers whole weights, and the config does not allow it. Set "
                '"stage3_gather_16bit_weights_on_model_save": true in the JSON, or zero3_save_16bit_model in the YAML, '
                "or give --zero3_save_16bit_model true."
            )
        return model.gather_state_dict()

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Write ``obj`` on the main process alone."""
        save(obj, f, self.project_configuration.save_on_each_node, safe_serialization)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write whole weights as ``from_pretrained`` reads them, never holding them all. Collective.

        Args:
            model: prepared or not.
            save_directory: made where it is missing.
            max_shard_size: of a file; several get an index.
            safe_serialization: False writes files for ``torch.load``.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ConfigError(f"save_model() got the path {save_directory}, which is a file. Expected a directory.")
        if self.is_main_process:
            directory.mkdir(parents=True, exist_ok=True)
        if isinstance(model, Engine):
            model.write_weights(directory, max_shard_size, safe_serialization)
        elif self.is_main_process:
            write_module(model, directory, max_shard_size, safe_serialization)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Have ``save_state`` and ``load_state`` keep the state of these objects, too.

        Args:
            objects: anything with ``state_dict`` and ``load_state_dict``.
        """
        self._registered.add(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call ``hook(models, weights, output_dir)`` on every rank before ``save_state`` writes.

        ``weights`` has an empty dict for each model: engines write their own. Nothing is left out of the checkpoint by
        taking it from the lists.
        """
        return self._registered.add_hook(self._registered.save_hooks, hook)

    def register_load_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call ``hook(models, input_dir)`` on every rank before ``load_state`` reads."""
        return self._registered.add_hook(self._registered.load_hooks, hook)

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        exclude_frozen_parameters: bool = False,
        async_save: bool = False,
        allow_pickle: Collection[str] = (),
    ) -> str:
        """Write everything that was prepared, and what training needs to go on. Collective.

        Args:
            output_dir: a directory; with automatic naming it is ``project_dir/checkpoints/checkpoint_N``.
            safe_serialization: checkpoints are safetensors in any case.
            exclude_frozen_parameters: leave frozen parameters out; a load keeps those of the model.
            async_save: write beside training what is copied to host memory now; the optimizer's state is copied before
                its next step. The next save or load, or ``wait_for_checkpoint``, waits for the end and raises what
                went wrong; call it before you change tensors of the optimizer's state in place.
            allow_pickle: places whose values are kept as pickles, such as ``state.custom.0``.

        Returns:
            The directory.

        Raises:
            CheckpointError: something cannot be kept or written; what was complete there still is.
        """
        if not safe_serialization:
            _warn(self, "save_state(safe_serialization=False): the checkpoint is written as safetensors all the same.")
        folder = output_folder(output_dir, self.project_configuration)
        return save_state(
            self._prepared(), folder, self.project_configuration, exclude_frozen_parameters, allow_pickle, async_save
        )

    def wait_for_checkpoint(self) -> None:
        """Return when the save that goes on beside training is complete on all ranks. Collective.

        Raises:
            CheckpointError: it failed; what was complete before still is.
        """
        self._registered.background.finish(self._prepared().meeting)

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: Mapping[str, Any] | None = None,
        *,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        allow_pickle: Collection[str] = (),
        missing_ok: bool = False,
    ) -> bool:
        """Go on where ``save_state`` was called, also with another number of ranks or stage. Collective.

        Args:
            input_dir: what was given to ``save_state``; None with automatic naming: the newest one.
            load_kwargs: the arguments below, as a dict.
            load_module_strict: names that are missing or too many are an error.
            load_optimizer_states: also the optimizers'.
            load_lr_scheduler_states: also the schedulers'.
            load_module_only: nothing but parameters and buffers.
            allow_pickle: places that may be unpickled: that runs code of whoever wrote the checkpoint.
            missing_ok: where no checkpoint was ever completed, change nothing: for a script that may be started again.

        Returns:
            Whether there was a checkpoint; without ``missing_ok`` that there was none is an error.

        Raises:
            CheckpointError: other things are prepared than were saved, or a file is damaged; nothing was changed then.
        """
        if load_kwargs:
            return self.load_state(input_dir, **{"missing_ok": missing_ok, **load_kwargs})
        full = not load_module_only
        wishes = Wishes(full and load_optimizer_states, full and load_lr_scheduler_states, load_module_strict)
        return load_state(
            self._prepared(), input_dir, self.project_configuration, wishes, load_module_only, allow_pickle, missing_ok
        )

    def _prepared(self) -> Prepared:
        return Prepared(
            self._models, self._schedulers, self._dataloaders, self._registered, self.gradient_state, self.device,
            self.process_index, self.num_processes,
        )  # fmt: skip

    def skip_first_batches(self, dataloader: DataLoader[Any], num_batches: int = 0) -> DataLoader[Any]:
        """A loader like ``dataloader`` that leaves out the first batches."""
        return skip_first_batches(dataloader, num_batches)

    def free_memory(self, *objects: Any) -> list[None]:
        """Let everything go that was prepared, and ``objects``, of which Nones are returned in their place."""
        self._registered.background.close()
        for engine in self._models:
            engine.close()
        self._models, self._optimizers, self._schedulers, self._dataloaders = [], [], [], []
        self.gradient_state.micro_batch = 0
        return release_memory(*objects)

    clear = free_memory

    def verify_device_map(self, model: nn.Module) -> bool:
        """Whether some part of the model was spread over several devices by a device_map."""
        return any(len(getattr(module, "hf_device_map", None) or {}) > 1 for module in model.modules())

    def end_training(self) -> None:
        """Finish the trackers and end the process group: the last thing that a script does."""
        self._registered.background.close()
        self._trackers.finish()
        self.state.destroy_process_group()

    def __repr__(self) -> str:
        return f"Accelerator over {self.num_processes} process(es)\n{self.state!r}"


class _MicroBatch:
    """The context of ``accumulate``, one for all micro-batches: a generator for each would cost more than its work."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin = begin
        self._end = end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, *_: object) -> None:
        self._end()


def _steps(argument: int, plugin: GradientAccumulationPlugin | None) -> int | None:
    """What the script says about accumulation; None where it leaves the default."""
    if not isinstance(argument, int) or argument < 1:
        raise ConfigError(
            f"Accelerator(gradient_accumulation_steps={argument!r}): expected a whole number of 1 or more."
        )
    if plugin is not None and argument != 1:
        raise ConfigError(
            "Accelerator() got gradient_accumulation_steps and a gradient_accumulation_plugin. Pass one of them."
        )
    if plugin is not None:
        return plugin.num_steps
    return None if argument == 1 else argument


def _by_type(handlers: Sequence[KwargsHandler]) -> dict[type, Any]:
    found: dict[type, Any] = {}
    for handler in handlers:
        if not isinstance(handler, KwargsHandler):
            raise ConfigError(f"kwargs_handlers holds a {type(handler).__name__}, expected objects of shardwise.utils.")
        if type(handler) in found:
            raise ConfigError(f"kwargs_handlers holds two {type(handler).__name__}. Expected one of each.")
        found[type(handler)] = handler
    return found


def _refuse_others(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name not in _ELSEWHERE:
            raise TypeError(f"Accelerator() got an unexpected keyword argument {name!r}")
        if value is not None and str(value).lower() != "no":
            raise ConfigError(f"Accelerator({name}=...) is not supported: {_ELSEWHERE[name]}.")


def _has_only_tensors(data: Any) -> bool:
    try:
        operations.recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


def _warn(accelerator: Accelerator, message: str) -> None:
    if accelerator.is_main_process:
        _logger.warning(message)
