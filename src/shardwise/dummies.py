"""``DummyOptim`` and ``DummyScheduler``: the script's word that the DeepSpeed JSON describes these two."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from shardwise.errors import StateError


class DummyOptim:
    """Stands where an optimizer would: the JSON's ``optimizer`` is built over its parameters.

    Args:
        params: parameters, or groups of them.
        lr: for an "auto" in the JSON.
        weight_decay: for an "auto" in the JSON.
        kwargs: other arguments of the optimizer, for "auto" in the JSON.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.001, weight_decay: float = 0.0, **kwargs: Any) -> None:
        self.params = list(params)
        self.lr = lr
        self.weight_decay = weight_decay
        self.kwargs = kwargs

    def __getattr__(self, name: str) -> Any:
        if name in ("step", "zero_grad", "state_dict", "param_groups"):
            raise StateError(f"DummyOptim has no {name} yet. Use what accelerator.prepare() returns in its place.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class DummyScheduler:
    """Stands where a scheduler would: the JSON's ``scheduler`` is built, or what ``lr_scheduler_callable`` makes.

    Args:
        optimizer: the optimizer, real or dummy, whose learning rate it sets.
        total_num_steps: for an "auto" in the JSON; counted as in a script for one process.
        warmup_num_steps: for an "auto" in the JSON.
        lr_scheduler_callable: builds a scheduler from the optimizer, where the JSON has none.
        kwargs: other arguments of the scheduler, for "auto" in the JSON.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer = optimizer
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.lr_scheduler_callable = lr_scheduler_callable
        self.kwargs = kwargs

    def __getattr__(self, name: str) -> Any:
        if name in ("step", "get_last_lr", "state_dict"):
            raise StateError(f"DummyScheduler has no {name} yet. Use what accelerator.prepare() returns in its place.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
