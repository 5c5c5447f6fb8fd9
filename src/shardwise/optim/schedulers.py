"""From the config's scheduler block to a scheduler: the DeepSpeed JSON's five, or any of torch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardwise.config.messages import shown
from shardwise.errors import ConfigError
from shardwise.optim.arguments import check_names, construct, find_by_name
from shardwise.optim.lr_range_test import LRRangeTest
from shardwise.optim.one_cycle import OneCycle
from shardwise.optim.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

# Schedulers of torch that a config cannot describe, with the reason.
_NOT_FROM_JSON = {
    "reducelronplateau": "it steps on a metric, which the engine does not have",
    "lambdalr": "it needs a function, which JSON cannot hold",
    "multiplicativelr": "it needs a function, which JSON cannot hold",
    "sequentiallr": "it needs other schedulers, which JSON cannot hold",
    "chainedscheduler": "it needs other schedulers, which JSON cannot hold",
}

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR", "build_scheduler"]


def build_scheduler(type: str, params: Mapping[str, Any], optimizer: Optimizer) -> LRScheduler:
    """Build the scheduler that a config names, found in any case: one of the five here, or of torch.optim.lr_scheduler.

    Raises ConfigError for an unknown type, unknown or missing parameters, or a value that the scheduler refuses.
    """
    if type.lower() in _NOT_FROM_JSON:
        raise ConfigError(
            f"scheduler.type is {shown(type)}, which a config cannot describe: {_NOT_FROM_JSON[type.lower()]}. "
            "Build it in the script, and pass the object to initialize()."
        )
    chosen = find_by_name("scheduler", type, _known())
    owner = f"The scheduler {chosen.__name__}"
    check_names(owner, chosen, params, supplied=("optimizer",))
    return construct(owner, chosen, optimizer, **params)


def _known() -> dict[str, type[LRScheduler]]:
    own = (WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest, OneCycle)
    of_torch = {
        name: entry
        for name, entry in vars(torch.optim.lr_scheduler).items()
        if isinstance(entry, type) and issubclass(entry, LRScheduler) and _from_json(name)
    }
    return {entry.__name__: entry for entry in own} | of_torch


def _from_json(name: str) -> bool:
    return name.lower() not in _NOT_FROM_JSON and name != "LRScheduler" and not name.startswith("_")
