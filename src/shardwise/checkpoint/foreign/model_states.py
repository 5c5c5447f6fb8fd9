"""What DeepSpeed's ``*_model_states.pt`` say: names, shapes, ties, buffers, and the run beside the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.foreign.torch_file import Stored, TorchFile
from shardwise.errors import CheckpointError

_RESERVED = frozenset({
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps", "global_samples",
    "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version", "num_experts",
    "ds_autoep_layers", "autoep_layers", "universal_checkpoint_info", "sparse_tensor_module_names",
    "csr_tensor_module_names",
})  # fmt: skip
"""What DeepSpeed keeps in the dict that the script's own values lie in, too."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelStates:
    """One rank's file."""

    path: Path
    module: Mapping[str, Stored]
    """Tensors of the state dict; at stage 3 parameters are empty ones there."""
    buffers: tuple[str, ...]
    groups: tuple[Shapes, ...]
    """Shapes of trainable parameters, in the order in which they lie end to end; () where none were sharded."""
    frozen: Shapes
    """Of parameters whose parts lie in ``fragments``."""
    fragments: Mapping[str, Stored]
    ties: Mapping[str, str]
    values: Mapping[str, Any]
    """Everything that the file holds."""

    @property
    def client_state(self) -> dict[str, Any]:
        """The script's own values."""
        return {key: value for key, value in self.values.items() if key not in _RESERVED}

    @property
    def counters(self) -> dict[str, int]:
        """Counted as our engine counts."""
        steps = count(self.values, "global_steps", self.path)
        config = self.values.get("ds_config")
        accumulation = config.get("gradient_accumulation_steps", 1) if isinstance(config, dict) else 1
        return {
            "global_steps": steps,
            "micro_steps": steps * (accumulation if type(accumulation) is int else 1),
            "skipped_steps": count(self.values, "skipped_steps", self.path),
            "num_passes": 0,
        }


def count(values: Mapping[str, Any], key: str, path: Path) -> int:
    """A number of something; 0 where it is not there.

    Raises:
        CheckpointError: it is no such number.
    """
    found = values.get(key, 0)
    if type(found) is not int or found < 0:
        raise CheckpointError(f"{path} is damaged: its {key} is {str(found)[:40]!r}, expected a number of steps.")
    return found


def read_model_states(path: Path) -> ModelStates:
    """One file.

    Raises:
        CheckpointError: it cannot be read, or is of a layout that this does not know.
    """
    values = dict_of(TorchFile(path).value, "", path)
    if not isinstance(values.get("module"), dict):
        raise CheckpointError(
            f"{path} holds no state dict under 'module': a pipeline wrote it, or somebody else than DeepSpeed. "
            "Expected a checkpoint of plain ZeRO."
        )
    sizes = (
        values.get("mp_world_size", 1),
        *dict_of(values.get("checkpoint_parallel_dimensions") or {}, "", path).values(),
    )
    if any(size != 1 for size in sizes) or values.get("ds_autoep_layers") or values.get("autoep_layers"):
        raise CheckpointError(
            f"{path} is of a run with tensor, pipeline or expert parallelism (degrees {list(sizes)}): expected one of "
            "data parallelism alone. Consolidate it with DeepSpeed's own tools first."
        )
    module = {name: value for name, value in values["module"].items() if isinstance(value, Stored)}
    groups = values.get("param_shapes") or ()
    # Before stages 1 and 2 had several groups there was one dict.
    groups = (groups,) if isinstance(groups, dict) else tuple(groups)
    buffers = tuple(name for name in values.get("buffer_names") or () if name in module)
    ties = dict_of(values.get("shared_params") or {}, "shared_params", path)
    return ModelStates(
        path=path,
        module=module,
        buffers=buffers,
        groups=tuple(_shapes(group, path) for group in groups),
        frozen=_shapes(values.get("frozen_param_shapes") or {}, path),
        fragments={
            name: stored_of(value, path) for name, value in (values.get("frozen_param_fragments") or {}).items()
        },
        ties={**_ties_in_place(module, buffers), **ties},
        values=values,
    )


def _shapes(found: Any, path: Path) -> Shapes:
    return {str(name): tuple(shape) for name, shape in dict_of(found, "param_shapes", path).items()}


def _ties_in_place(module: Mapping[str, Stored], buffers: Sequence[str]) -> dict[str, str]:
    """Names of parameters that lie in the same bytes."""
    first: dict[tuple[int, tuple[int, ...], torch.dtype], str] = {}
    ties = {}
    for name, stored in module.items():
        if stored.numel and name not in buffers:
            kept = first.setdefault((stored.begin, stored.shape, stored.dtype), name)
            if kept != name:
                ties[name] = kept
    return ties


def dict_of(value: Any, key: str, path: Path) -> dict[str, Any]:
    """The value as the dict that is expected of it.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no file of a DeepSpeed checkpoint: expected a dict {key or 'as its value'}.")
    return value


def stored_of(value: Any, path: Path) -> Stored:
    """The value as the tensor that is expected of it.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(value, Stored):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__} where a tensor was expected: states that were offloaded to files, "
            "or another layout than that of ZeRO."
        )
    return value


def names_of(states: ModelStates, parameters: Mapping[str, Any]) -> dict[str, str]:
    """The state dict's names, and the parameter that each is."""
    names = {}
    for name in states.module:
        kept = states.ties.get(name, name)
        if name not in states.buffers and kept in parameters:
            names[name] = kept
    return {**names, **{name: name for name in parameters if name not in names}}
