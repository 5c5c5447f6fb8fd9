"""What ``Engine.save_checkpoint`` and ``Engine.load_checkpoint`` do: one model and the script's own words for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise import roll_call
from shardwise.checkpoint import export, randomness
from shardwise.checkpoint.load import Checkpoint, load, locate, logger, open_together
from shardwise.checkpoint.model import IncompatibleKeys, Trained, Wishes
from shardwise.checkpoint.model_settings import pretrained, write_settings
from shardwise.checkpoint.save import Background, Content, Meeting, Place, agree, save
from shardwise.checkpoint.zero_to_fp32 import parse_size
from shardwise.comm.base import CollectiveId, Communicator
from shardwise.errors import CheckpointError

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class EngineMeeting:
    """Ranks of an engine meet over its transport."""

    comm: Communicator
    step: int

    @property
    def rank(self) -> int:
        """This rank."""
        return self.comm.world.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.comm.world.size

    def exchange(self, subject: str, payload: bytes) -> list[bytes]:
        """Every rank's payload. Collective."""
        return self.comm.exchange(CollectiveId(subject, "", self.step), payload)


@dataclass(frozen=True)
class Loaded:
    """What a load brought beside the model's states."""

    path: Path
    client_state: dict[str, Any]
    counters: Mapping[str, int]
    keys: IncompatibleKeys
    random_states: dict[str, Any] | None
    """This rank's; None where the world has another size."""


def save_engine(
    trained: Trained,
    place: Place,
    client_state: Mapping[str, Any],
    exclude_frozen: bool,
    allow_pickle: Collection[str],
    background: Background,
    async_save: bool,
) -> None:
    """Write one model with ``client_state``, at once or beside training. Collective."""
    roll_call.answer(f"save_checkpoint(tag={place.tag!r})")
    step = trained.counters["global_steps"]
    content = Content(
        models=[trained],
        shared=dict(client_state),
        of_rank={"random": randomness.take(trained.comm.device)},
        allow_pickle=allow_pickle,
        exclude_frozen=exclude_frozen,
    )
    save_by(background, async_save, place, content, EngineMeeting(trained.comm, step))


def save_by(background: Background, async_save: bool, place: Place, content: Content, meeting: Meeting) -> None:
    """Save at once, or beside training; after the one that is under way in any case. Collective."""
    if async_save:
        background.start(place, content, meeting)
    else:
        background.finish(meeting)
        save(place, content, meeting, background.claims)


def load_engine(
    trained: Trained,
    directory: PathLike,
    tag: str | None,
    wishes: Wishes,
    allow_pickle: Collection[str],
    before_install: Callable[[], None],
) -> Loaded | None:
    """Read one model; None where no checkpoint was ever completed in ``directory``. Collective."""
    roll_call.answer(f"load_checkpoint(tag={tag!r})")
    meeting = EngineMeeting(trained.comm, trained.counters["global_steps"])
    opened = open_together(lambda: locate(Path(directory), tag), meeting)
    if opened is None:
        if meeting.rank == 0:
            logger.warning("there is no checkpoint in %s: nothing was loaded.", directory)
        return None
    with opened as checkpoint:
        own = checkpoint.directory

        def more() -> tuple[Any, Any]:
            shared = checkpoint.shared(allow_pickle)
            if not isinstance(shared, dict):
                raise CheckpointError(f"{own} holds a client_state that is no dict.")
            same_world = checkpoint.manifest.world == meeting.size
            return shared, checkpoint.of_rank(meeting.rank)["random"] if same_world else None

        before_install()
        keys, (shared, random_states) = load(checkpoint, [trained], wishes, meeting, meeting.step, more)
        return Loaded(own, shared, checkpoint.manifest.models[0].counters, keys[0], random_states)


def write_engine(
    trained: Trained, output: Path, max_shard_size: int | str, safetensors: bool, with_frozen: bool
) -> None:
    """Write the whole weights from rank 0. Collective."""
    max_bytes = parse_size(max_shard_size)
    roll_call.answer(f"the writing of weights to {output.name!r}")
    step = trained.counters["global_steps"]
    meeting = EngineMeeting(trained.comm, step)
    export.write(trained, output, meeting, max_bytes, safetensors, step, with_frozen)


def export_pretrained(trained: Trained, module: nn.Module, output: Path, max_shard_size: int | str) -> None:
    """Write the directory that ``from_pretrained`` of transformers reads, from rank 0. Collective."""
    pretrained(module)
    write_engine(trained, output, max_shard_size, safetensors=True, with_frozen=True)
    meeting = EngineMeeting(trained.comm, trained.counters["global_steps"])
    dtypes = [v.dtype for v in trained.references.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]

    def work() -> None:
        if meeting.rank == 0:
            write_settings(module, dtypes[0] if dtypes else torch.get_default_dtype(), output)

    agree(meeting, "the end of an export", work)


def export_dcp(trained: Trained, output: Path) -> None:
    """Write a checkpoint of ``torch.distributed.checkpoint`` from rank 0, by way of one of ours. Collective."""
    from shardwise.checkpoint.dcp import write_dcp  # a second or more, for the few scripts that export

    roll_call.answer(f"export_dcp({output.name!r})")
    meeting = EngineMeeting(trained.comm, trained.counters["global_steps"])
    place = Place(output.with_name(f".{output.name}.export"), "whole", save_latest=False)
    save(place, Content([trained], {}, {"random": None}), meeting)

    def work() -> None:
        if meeting.rank == 0:
            try:
                with Checkpoint(place.own_directory) as checkpoint:
                    write_dcp(checkpoint, output)
            finally:
                shutil.rmtree(place.directory, ignore_errors=True)

    agree(meeting, "the end of an export", work)


def gather_engine(trained: Trained) -> dict[str, Any]:
    """The whole state dict on rank 0. Collective."""
    roll_call.answer("the gathering of weights")
    return export.gather(trained, trained.counters["global_steps"])
