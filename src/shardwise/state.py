"""``AcceleratorState``: what a run is, told to anyone who asks: processes, device, precision, the DeepSpeed JSON."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from shardwise.accumulation import GradientState
from shardwise.config.run.file import code_mentions
from shardwise.config.run.precedence import resolve, wants_zero
from shardwise.config.run.resolved import Resolved
from shardwise.errors import ConfigError
from shardwise.launch.handed_over import handed_over
from shardwise.plugin import DeepSpeedPlugin
from shardwise.process import DistributedType, PartialState, StateResetError

__all__ = ["AcceleratorState", "DistributedType", "GradientState", "PartialState", "get_active_deepspeed_plugin"]


_logger = logging.getLogger(__name__)


class AcceleratorState:
    """The facts of a run, made by the first ``Accelerator`` of a process; every later one is a view of the same.

    Beside its own it has every attribute of ``PartialState``.

    Args:
        mixed_precision: "no", "fp16" or "bf16"; None: what flags, YAML or the DeepSpeed JSON say.
        cpu: run on the CPU even where there is a GPU.
        deepspeed_plugin: a plugin, or several by name, of which the first is active.
        process_group: ``backend`` and ``timeout`` for ``PartialState``.

    Raises:
        ConfigError: settings contradict each other, or a later one asks for something else than there is.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}

    mixed_precision: str
    resolved: Resolved
    deepspeed_plugins: dict[str, DeepSpeedPlugin] | None

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        deepspeed_plugin: DeepSpeedPlugin | Mapping[str, DeepSpeedPlugin] | None = None,
        **process_group: Any,
    ) -> None:
        self.__dict__ = self._shared_state
        if self.initialized:
            self._refuse_another(mixed_precision, deepspeed_plugin)
            return
        plugins = _plugins(deepspeed_plugin)
        if plugins is None:
            said = {} if mixed_precision is None else {"mixed_precision": mixed_precision}
            resolved = resolve(handed_over(os.environ).stronger(code_mentions("Accelerator", said)))
        else:
            if mixed_precision is not None:
                for plugin in plugins.values():
                    plugin.set_mixed_precision(mixed_precision)
            resolved = next(iter(plugins.values())).resolved
        PartialState(cpu, **process_group)
        self.resolved = resolved
        if PartialState().is_main_process:
            _say(resolved)
        self.deepspeed_plugins = plugins
        self.mixed_precision = resolved["mixed_precision"]
        if plugins:
            PartialState().distributed_type = DistributedType.DEEPSPEED
            self.select_deepspeed_plugin(next(iter(plugins)))

    def _refuse_another(self, mixed_precision: str | None, deepspeed_plugin: Any) -> None:
        if mixed_precision is not None and mixed_precision != self.mixed_precision:
            raise ConfigError(
                f"mixed_precision={mixed_precision!r} is asked for, but this process runs with "
                f"{self.mixed_precision!r} already. Say it to the first Accelerator of the process."
            )
        if deepspeed_plugin is not None and _plugins(deepspeed_plugin) != self.deepspeed_plugins:
            raise ConfigError(
                "a deepspeed_plugin is passed, but this process has its plugins already. Pass all of them, by name, to "
                "the first Accelerator of the process."
            )

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is not this object's own: the facts of the process. A reset leaves what only asks who
        # is first, or waits.
        if not self._shared_state and not hasattr(PartialState, name):
            raise StateResetError(f"AcceleratorState was reset, so it has no {name}. Make an Accelerator().")
        return getattr(PartialState(), name)

    @property
    def initialized(self) -> bool:
        """Whether the facts were found: true but after a reset."""
        return bool(self._shared_state)

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        """Forget the facts, for tests."""
        AcceleratorState._shared_state.clear()
        if reset_partial_state:
            PartialState._reset_state()

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The active plugin; None in a run without ZeRO."""
        plugins = self.deepspeed_plugins or {}
        return next((plugin for plugin in plugins.values() if plugin.selected), None)

    def get_deepspeed_plugin(self, name: str) -> DeepSpeedPlugin:
        """The plugin of that name; ConfigError if there is none."""
        plugins = self.deepspeed_plugins or {}
        if name not in plugins:
            raise ConfigError(f"there is no deepspeed_plugin {name!r}: expected one of {', '.join(plugins) or 'none'}.")
        return plugins[name]

    def select_deepspeed_plugin(self, name: str) -> None:
        """Make the plugin of that name the active one: what is prepared from now on follows it."""
        chosen = self.get_deepspeed_plugin(name)
        for plugin in (self.deepspeed_plugins or {}).values():
            plugin.selected = plugin is chosen

    def __repr__(self) -> str:
        lines = f"{PartialState()!r}Mixed precision type: {self.mixed_precision}\n"
        plugin = self.deepspeed_plugin
        return lines if plugin is None else f"{lines}ds_config: {plugin.deepspeed_config}\n"


def _plugins(given: DeepSpeedPlugin | Mapping[str, DeepSpeedPlugin] | None) -> dict[str, DeepSpeedPlugin] | None:
    if given is None:
        return {"default": DeepSpeedPlugin()} if wants_zero(handed_over(os.environ)) else None
    plugins = dict(given) if isinstance(given, Mapping) else {"default": given}
    for name, plugin in plugins.items():
        if not isinstance(plugin, DeepSpeedPlugin):
            raise ConfigError(f"deepspeed_plugin {name!r} is a {type(plugin).__name__}, expected a DeepSpeedPlugin.")
    return plugins


def _say(resolved: Resolved) -> None:
    """The warnings that the launcher has not given already."""
    given = resolve(handed_over(os.environ)).warnings
    for warning in resolved.warnings:
        if warning not in given:
            _logger.warning("%s", warning)


def get_active_deepspeed_plugin(state: AcceleratorState) -> DeepSpeedPlugin:
    """The active plugin; ConfigError in a run without ZeRO."""
    plugin = state.deepspeed_plugin
    if plugin is None:
        raise ConfigError("there is no deepspeed_plugin in this run. Ask for ZeRO by a flag, the YAML or an argument.")
    return plugin
