"""``save_state`` and ``load_state``: everything that an ``Accelerator`` prepared, as one checkpoint.

All models, their optimizers and the schedulers that engines tick are models of the checkpoint; the script's own
schedulers, objects that were registered and the place in the accumulation window are kept once, positions of loaders
and random states for each rank. One manifest names them all, so they are complete together or not at all.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from shardwise import operations, roll_call
from shardwise.accumulation import GradientState
from shardwise.checkpoint import randomness
from shardwise.checkpoint.engine import EngineMeeting, save_by
from shardwise.checkpoint.load import Checkpoint, load, locate, open_together
from shardwise.checkpoint.manifest import MANIFEST, find_tag
from shardwise.checkpoint.model import Wishes
from shardwise.checkpoint.save import Background, Content, Meeting, Place, agree
from shardwise.checkpoint.zero_to_fp32 import parse_size, write_weights
from shardwise.errors import CheckpointError, ConfigError
from shardwise.handlers import ProjectConfiguration
from shardwise.scheduler import AcceleratedScheduler, EngineScheduler
from shardwise.zero.engine import Engine

logger = logging.getLogger(__name__)

TAG = "pytorch_model"
FOLDER = "checkpoints"
ROOT = "state"
_AUTOMATIC = re.compile(r"checkpoint_(\d+)")


@dataclass(frozen=True)
class ProcessMeeting:
    """Ranks of a run without engines meet over the process group."""

    rank: int
    size: int

    def exchange(self, subject: str, payload: bytes) -> list[bytes]:
        """Every rank's payload. Collective."""
        return list(operations.gather_object([payload]))


@dataclass
class Registered:
    """What a script registered with its accelerator for the time of saving and loading."""

    objects: list[Any] = field(default_factory=list)
    save_hooks: OrderedDict[int, Callable[..., Any]] = field(default_factory=OrderedDict)
    load_hooks: OrderedDict[int, Callable[..., Any]] = field(default_factory=OrderedDict)
    background: Background = field(default_factory=Background)

    def add(self, objects: Iterable[Any]) -> None:
        """Keep the state of these, too.

        Raises:
            ConfigError: an object has no state_dict and load_state_dict.
        """
        objects = list(objects)
        for each in objects:
            if not (callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))):
                raise ConfigError(
                    f"register_for_checkpointing() got a {type(each).__name__} without state_dict() and "
                    "load_state_dict(). Give its class both, or register what holds its state."
                )
        self.objects += objects

    def add_hook(self, hooks: OrderedDict[int, Callable[..., Any]], hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook`` from now on, until ``remove()`` of what is returned."""
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle


@dataclass(frozen=True)
class Prepared:
    """What belongs into a checkpoint of an accelerator."""

    engines: Sequence[Engine]
    schedulers: Sequence[AcceleratedScheduler]
    loaders: Sequence[Any]
    registered: Registered
    gradient_state: GradientState
    device: torch.device
    rank: int
    size: int

    @property
    def meeting(self) -> Meeting:
        """How its ranks meet."""
        if self.engines:
            trained = self.engines[0].trained()
            return EngineMeeting(trained.comm, self.step)
        return ProcessMeeting(self.rank, self.size)

    @property
    def step(self) -> int:
        """For messages."""
        return self.engines[0].global_steps if self.engines else 0

    @property
    def own_schedulers(self) -> list[AcceleratedScheduler]:
        """Those that no engine ticks."""
        return [each for each in self.schedulers if not isinstance(each, EngineScheduler)]

    def shared(self) -> dict[str, Any]:
        """One for all ranks."""
        return {
            "schedulers": [each.state_dict() for each in self.own_schedulers],
            "custom": [each.state_dict() for each in self.registered.objects],
            "accumulation": {
                "micro_batch": self.gradient_state.micro_batch,
                "sync_gradients": self.gradient_state.sync_gradients,
            },
        }

    def of_rank(self) -> dict[str, Any]:
        """Each rank's own."""
        return {
            "loaders": [loader.state_dict() for loader in self.loaders],
            "random": randomness.take(self.device),
        }


def write_module(model: nn.Module, directory: Path, max_shard_size: int | str, safetensors: bool) -> None:
    """Write the weights of a model that no engine holds; call it on one process."""
    weights: dict[str, torch.Tensor] = {}
    first_names: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and first_names.setdefault(id(value), name) == name:
            weights[name] = value.detach()
        elif isinstance(value, torch.Tensor):
            ties[name] = first_names[id(value)]
    write_weights(directory, weights, ties, parse_size(max_shard_size), safetensors)


# --- where ------------------------------------------------------------------------------------------------------------


def automatic_folders(project: ProjectConfiguration) -> list[tuple[int, Path]]:
    """The numbers and folders of complete checkpoints under automatic names, oldest first."""
    base = _base(project)
    found = []
    for path in base.glob("checkpoint_*") if base.is_dir() else ():
        match = _AUTOMATIC.fullmatch(path.name)
        if match is not None and find_tag(path) is not None:
            found.append((int(match[1]), path))
    return sorted(found)


def _base(project: ProjectConfiguration) -> Path:
    if project.project_dir is None:
        raise ConfigError(
            "automatic_checkpoint_naming needs a project_dir: pass Accelerator(project_dir=...), or "
            "ProjectConfiguration(project_dir=...)."
        )
    return Path(project.project_dir) / FOLDER


def output_folder(output_dir: str | os.PathLike[str] | None, project: ProjectConfiguration) -> Path:
    """Where ``save_state`` writes.

    Raises:
        ConfigError: nobody says where, or a checkpoint of that number is there.
    """
    if project.automatic_checkpoint_naming:
        folder = _base(project) / f"checkpoint_{project.iteration}"
        if find_tag(folder) is not None:
            raise ConfigError(
                f"{folder} is there already, complete. Set project_configuration.iteration to a number that is free, "
                "or load_state() the newest one, which sets it."
            )
        return folder
    if output_dir is None:
        raise ConfigError(
            "save_state() got no directory. Pass one, or ProjectConfiguration(automatic_checkpoint_naming=True)."
        )
    return Path(output_dir)


def input_folder(input_dir: str | os.PathLike[str] | None, project: ProjectConfiguration) -> Path:
    """Where ``load_state`` reads; where all automatic names are, if no checkpoint has one yet."""
    if input_dir is not None:
        return Path(input_dir)
    folders = automatic_folders(project)
    return folders[-1][1] if folders else _base(project)


# --- saving and loading -----------------------------------------------------------------------------------------------


def save_state(
    prepared: Prepared,
    folder: Path,
    project: ProjectConfiguration,
    exclude_frozen: bool,
    allow_pickle: Collection[str],
    async_save: bool,
) -> str:
    """Write everything into ``folder``. Collective.

    Returns:
        The folder.

    Raises:
        CheckpointError: something cannot be kept or written; what was complete there still is.
    """
    for engine in prepared.engines:
        engine.check_savable("save_state")
    roll_call.answer("save_state")
    meeting = prepared.meeting
    if prepared.registered.save_hooks:
        if meeting.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        meeting.exchange("begin of the hooks", b"")
        for hook in list(prepared.registered.save_hooks.values()):
            hook(list(prepared.engines), [{} for _ in prepared.engines], str(folder))
    names = [TAG if number == 0 else f"{TAG}_{number}" for number in range(len(prepared.engines))]
    content = Content(
        models=[engine.trained(name) for name, engine in zip(names, prepared.engines, strict=True)],
        shared=prepared.shared(),
        of_rank=prepared.of_rank(),
        allow_pickle=allow_pickle,
        exclude_frozen=exclude_frozen,
        root=ROOT,
    )
    place = Place(folder, TAG, claimed=_base(project) if project.automatic_checkpoint_naming else None)
    save_by(prepared.registered.background, async_save, place, content, meeting)
    if project.automatic_checkpoint_naming:
        project.iteration += 1
        if project.total_limit is not None:
            limit = project.total_limit
            agree(
                meeting, "the end of save_state", lambda: _remove_oldest(project, limit) if meeting.rank == 0 else None
            )
    return str(folder)


def _remove_oldest(project: ProjectConfiguration, limit: int) -> None:
    folders = automatic_folders(project)
    for _, folder in folders[: max(0, len(folders) - max(1, limit))]:
        (folder / "latest").unlink(missing_ok=True)  # what is half removed is no checkpoint
        (folder / TAG / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def load_state(
    prepared: Prepared,
    input_dir: str | os.PathLike[str] | None,
    project: ProjectConfiguration,
    wishes: Wishes,
    module_only: bool,
    allow_pickle: Collection[str],
    missing_ok: bool,
) -> bool:
    """Go on where ``save_state`` was called, also in a world of another size. Collective.

    Returns:
        Whether there was a checkpoint; False only with ``missing_ok``.

    Raises:
        ConfigError: nobody says where.
        CheckpointError: other things are prepared than were saved, or a file is damaged; nothing was changed then.
    """
    if input_dir is None and not project.automatic_checkpoint_naming:
        raise ConfigError("load_state() got no directory. Pass the one that was given to save_state().")
    if input_dir is None:
        _base(project)
    roll_call.answer("load_state")
    meeting = prepared.meeting
    prepared.registered.background.finish(meeting)
    opened = open_together(lambda: locate(input_folder(input_dir, project), None), meeting)
    if opened is None and missing_ok:
        return False
    if opened is None:
        raise CheckpointError(
            f"{input_folder(input_dir, project)} holds no complete checkpoint. Pass the directory that was given to "
            "save_state, or missing_ok=True where a run may be the first one."
        )
    folder = opened.directory.parent
    for hook in list(prepared.registered.load_hooks.values()):
        hook(list(prepared.engines), str(folder))
    with opened as checkpoint:
        if checkpoint.is_bare:
            _load_bare(prepared, checkpoint, wishes, module_only)
            return True
        world = checkpoint.manifest.world
        rank = meeting.rank if world == meeting.size else 0
        _compare("model", len(checkpoint.manifest.models), len(prepared.engines))

        def more() -> tuple[dict[str, Any], dict[str, Any]]:
            shared, of_rank = checkpoint.shared(allow_pickle, ROOT), checkpoint.of_rank(rank, allow_pickle)
            if not module_only:
                _check_kept(shared, of_rank, prepared)
            return shared, of_rank

        for engine in prepared.engines:
            engine.put_away()
        models = [engine.trained() for engine in prepared.engines]
        _, (shared, of_rank) = load(checkpoint, models, wishes, meeting, prepared.step, more)
        if not module_only:
            for engine, record in zip(prepared.engines, checkpoint.manifest.models, strict=True):
                engine.take_counters(record.counters)
    if not module_only:
        _take(prepared, shared, of_rank, own_random=world == meeting.size, schedulers=wishes.scheduler)
    if project.automatic_checkpoint_naming and (match := _AUTOMATIC.fullmatch(folder.name)):
        project.iteration = max(project.iteration, int(match[1]) + 1)
    return True


def _load_bare(prepared: Prepared, checkpoint: Checkpoint, wishes: Wishes, module_only: bool) -> None:
    """DeepSpeed's, or one that was converted: a model's states, and nothing of what the script prepared beside it."""
    if len(prepared.engines) != 1:
        raise CheckpointError(
            f"{checkpoint.directory} holds one model, and {len(prepared.engines)} are prepared. Load each by its "
            f"engine: model.load_checkpoint({str(checkpoint.directory.parent)!r}, tag)."
        )
    (engine,) = prepared.engines
    engine.put_away()
    load(checkpoint, [engine.trained()], wishes, prepared.meeting, prepared.step)
    if module_only:
        return
    engine.take_counters(checkpoint.manifest.models[0].counters)
    counts = {
        "schedulers": len(prepared.own_schedulers),
        "loaders": len(prepared.loaders),
        "registered objects": len(prepared.registered.objects),
    }
    left = [f"{count} {what}" for what, count in counts.items() if count]
    if prepared.meeting.rank == 0:
        logger.warning(
            "%s holds the states of the model, its optimizer and its engine's scheduler. As they are stay: random "
            "states%s.", checkpoint.directory, "".join(f", {each}" for each in left),
        )  # fmt: skip


def _check_kept(shared: Any, of_rank: Any, prepared: Prepared) -> None:
    if not isinstance(shared, dict) or "accumulation" not in shared:
        raise CheckpointError("the checkpoint was written by save_checkpoint(), not by save_state(): load it with the "
                              "engine's load_checkpoint().")  # fmt: skip
    _compare("scheduler", len(shared["schedulers"]), len(prepared.own_schedulers))
    _compare("registered object", len(shared["custom"]), len(prepared.registered.objects))
    _compare("loader", len(of_rank["loaders"]), len(prepared.loaders))


def _compare(what: str, saved: int, present: int) -> None:
    if saved != present:
        raise CheckpointError(
            f"the checkpoint holds {saved} {what}(s), and {present} are prepared. Prepare and register the same things "
            "in the same order as when it was saved."
        )


def _take(
    prepared: Prepared, shared: dict[str, Any], of_rank: dict[str, Any], own_random: bool, schedulers: bool
) -> None:
    if schedulers:
        for scheduler, state in zip(prepared.own_schedulers, shared["schedulers"], strict=True):
            scheduler.load_state_dict(state)
    for each, state in zip(prepared.registered.objects, shared["custom"], strict=True):
        each.load_state_dict(state)
    for loader, state in zip(prepared.loaders, of_rank["loaders"], strict=True):
        loader.load_state_dict(state)
    prepared.gradient_state.micro_batch = shared["accumulation"]["micro_batch"]
    prepared.gradient_state.sync_gradients = shared["accumulation"]["sync_gradients"]
    if own_random:
        randomness.put_back(of_rank["random"], prepared.device)
