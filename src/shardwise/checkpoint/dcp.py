"""A checkpoint for ``torch.distributed.checkpoint``: what plain torch saves of a model and its optimizer.

::

    {"model": {name: weight or buffer},
     "optim": {"state": {name: {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}},
               "param_groups": [{..., "params": [names]}]}}

is the layout of ``torch.distributed.checkpoint.state_dict.get_state_dict``, so ``set_state_dict`` takes what
``dcp.load`` gives. Tensors are read one by one as their turn to be written comes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from shardwise.checkpoint.load import Checkpoint
from shardwise.checkpoint.whole import Whole, WholeModel
from shardwise.errors import CheckpointError


class _Streaming(DefaultSavePlanner):
    """Plans by tensors without memory and reads each when it is to be written."""

    def __init__(self, whole: Mapping[str, Whole]) -> None:
        super().__init__()
        self._whole = whole

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The value of an entry."""
        whole = self._whole.get(index.fqn)
        return super().lookup_object(index) if whole is None else whole.read()


def write_dcp(checkpoint: Checkpoint, output: Path, model: int = 0) -> None:
    """Write one model of an open checkpoint; no process group is needed, and none is used.

    Args:
        checkpoint: ours, or one that is understood.
        output: a directory that does not exist, or is empty.
        model: which one, where several were saved together.

    Raises:
        CheckpointError: something is there already.
    """
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output} is not empty. Give a directory that is new.")
    whole = WholeModel(checkpoint, model)
    lazy: dict[str, Whole] = {}

    def later(key: str, value: Whole) -> torch.Tensor:
        lazy[key] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    weights: dict[str, Any] = {name: later(f"model.{name}", value) for name, value in whole.weights()}
    weights |= dict(whole.buffers())
    states = {
        name: {
            kind: later(f"optim.state.{name}.{kind}", value) if isinstance(value, Whole) else value
            for kind, value in state.items()
        }
        for name, state in whole.states()
    }
    content: dict[str, Any] = {"model": weights}
    if states or whole.groups():
        content["optim"] = {"state": states, "param_groups": whole.groups()}
    writer = FileSystemWriter(str(output), single_file_per_rank=True, sync_files=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what was asked for
        dcp_save(content, storage_writer=writer, planner=_Streaming(lazy), no_dist=True)
