"""Gradient accumulation: on which micro-batches gradients are averaged and the optimizer steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from shardwise.data.active import ActiveLoaders, TracksEnd
from shardwise.errors import ConfigError


@dataclass
class GradientAccumulationPlugin:
    """How gradients are accumulated.

    Attributes:
        num_steps: micro-batches a step; None leaves it to the other places where it can be said.
        adjust_scheduler: a scheduler counts micro-batches that do not step, too.
        sync_with_dataloader: the last batch of a loader ends a step, however many came before.
        sync_each_batch: gradients are averaged after every micro-batch, for less memory and more traffic.
    """

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise ConfigError(f"GradientAccumulationPlugin(num_steps={self.num_steps}): expected at least 1.")

    def to_kwargs(self) -> dict[str, Any]:
        """The arguments that differ from the defaults."""
        default = asdict(GradientAccumulationPlugin())
        return {name: value for name, value in asdict(self).items() if value != default[name]}


class GradientState:
    """Whether this micro-batch steps, and where the active loader stands; one for all of a process.

    Optimizers, schedulers and loaders that were prepared ask it. ``sync_gradients`` may be set by hand, in a loop that
    does without ``accumulate``.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}

    sync_gradients: bool
    """Whether the present micro-batch is the last one of its step."""
    plugin: GradientAccumulationPlugin
    loaders: ActiveLoaders
    micro_batch: int
    """Micro-batches of ``accumulate`` so far, from the last end of a loader."""
    has_own_gradient: bool
    """Whether the present micro-batch has been through backward."""

    def __init__(self, gradient_accumulation_plugin: GradientAccumulationPlugin | None = None) -> None:
        self.__dict__ = self._shared_state
        if not self.initialized:
            self.sync_gradients = True
            self.plugin = gradient_accumulation_plugin or GradientAccumulationPlugin(num_steps=1)
            self.loaders = ActiveLoaders()
            self.micro_batch = 0
            self.has_own_gradient = False
        elif gradient_accumulation_plugin is not None:
            self.plugin = gradient_accumulation_plugin

    @property
    def initialized(self) -> bool:
        """True but after a reset."""
        return bool(self._shared_state)

    @staticmethod
    def _reset_state() -> None:
        """Forget everything, for tests."""
        GradientState._shared_state.clear()

    def begin_micro_batch(self) -> bool:
        """Count one more; whether it is the last one of its step."""
        plugin = self.plugin
        self.has_own_gradient = False
        if plugin.sync_with_dataloader and self.loaders.end_of_dataloader:
            self.micro_batch = 0
            self.sync_gradients = True
        else:
            self.micro_batch += 1
            self.sync_gradients = self.micro_batch % (plugin.num_steps or 1) == 0
        return self.sync_gradients

    @property
    def num_steps(self) -> int:
        """Micro-batches a step."""
        return self.plugin.num_steps or 1

    @property
    def adjust_scheduler(self) -> bool:
        """Whether schedulers count micro-batches that do not step."""
        return self.plugin.adjust_scheduler

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether the last batch of a loader ends a step."""
        return self.plugin.sync_with_dataloader

    @property
    def sync_each_batch(self) -> bool:
        """Whether gradients are averaged after every micro-batch."""
        return self.plugin.sync_each_batch

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is being iterated."""
        return self.loaders.in_dataloader

    @property
    def active_dataloader(self) -> TracksEnd | None:
        """The loader that gave a batch last."""
        return self.loaders.active_dataloader

    @property
    def dataloader_references(self) -> list[TracksEnd | None]:
        """All loaders that are being iterated, outermost first."""
        return self.loaders.dataloader_references

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the active loader has given its last batch."""
        return self.loaders.end_of_dataloader

    @property
    def remainder(self) -> int:
        """True samples of the active loader's last round; 0 if it is full, -1 if nobody knows."""
        return self.loaders.remainder

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\n"
            f"Gradient accumulation plugin: {self.plugin}\n"
        )
