"""Reading a checkpoint: each rank maps the byte ranges that it will hold, whatever world and stage wrote them.

::

    open      manifest and tag; the same on every rank
    check     names and shapes fit, every byte to be read has its checksum; a fault on one rank is everybody's error
    install   only now the engine changes
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import torch

from shardwise.checkpoint.foreign.open import find_foreign, is_foreign, read_foreign
from shardwise.checkpoint.manifest import MANIFEST, Manifest, check_tag, complete_tags, find_tag, read_manifest
from shardwise.checkpoint.model import IncompatibleKeys, Loading, Reads, SavedModel, Trained, Wishes
from shardwise.checkpoint.save import Meeting, agree
from shardwise.checkpoint.shard_file import ShardFile
from shardwise.checkpoint.tree import decode
from shardwise.errors import CheckpointError

logger = logging.getLogger(__name__)


class Files(Reads, Protocol):
    """The files of a checkpoint, ours or somebody else's."""

    def close(self) -> None:
        """Take the mappings away."""


class OwnFiles:
    """The files that a manifest of ours names, mapped when they are first needed.

    Args:
        directory: of the checkpoint itself.
        manifest: what is in it.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._open: dict[int, ShardFile] = {}

    @property
    def world(self) -> int:
        """Ranks that wrote it."""
        return self._manifest.world

    def _file(self, number: int) -> ShardFile:
        if number not in self._open:
            if not 0 <= number < len(self._manifest.files):
                raise CheckpointError(f"{self._directory} refers to its file number {number}, which it does not have.")
            self._open[number] = ShardFile(self._directory, self._manifest.files[number])
        return self._open[number]

    def check(self, file: int, key: str, begin: int, end: int) -> None:
        """Check the bytes of these elements."""
        self._file(file).check(key, begin, end)

    def read_into(self, file: int, key: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` with the elements from ``begin`` on."""
        self._file(file).read_into(key, begin, out)

    def entry(self, file: int, key: str) -> torch.Tensor:
        """A whole tensor of a file."""
        return self._file(file).read(key)

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of a tree; the rank that wrote it stands in its key."""
        number = str(key).partition("/")[0]
        if not number.isdecimal():
            raise CheckpointError(f"{self._directory} refers to a tensor {str(key)[:80]!r}, which no rank has written.")
        return self.entry(int(number), key)

    def close(self) -> None:
        """Take the mappings away."""
        for file in self._open.values():
            file.close()
        self._open.clear()


class Checkpoint:
    """A complete checkpoint, open for reading. A context.

    Args:
        directory: of the checkpoint itself; DeepSpeed's are understood, too.

    Raises:
        CheckpointError: there is none.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest
        self._files: Files
        if not (directory / MANIFEST).exists() and is_foreign(directory):
            source = read_foreign(directory)
            self.manifest, self._files = source.manifest, source
        else:
            self.manifest = read_manifest(directory)
            self._files = OwnFiles(directory, self.manifest)

    @property
    def is_bare(self) -> bool:
        """Whether nothing of single ranks was kept: DeepSpeed does not, nor does a conversion."""
        return all(of_rank == {"random": None} for of_rank in self.manifest.ranks)

    def model(self, index: int) -> SavedModel:
        """A model by its place."""
        if index >= len(self.manifest.models):
            raise CheckpointError(
                f"{self.directory} holds {len(self.manifest.models)} model(s): there is none for model {index}. "
                "Prepare as many models as when it was saved."
            )
        return SavedModel(index, self.manifest.models[index], self._files)

    def shared(self, allow_pickle: Collection[str] = (), root: str = "client_state") -> Any:
        """What was kept once for all ranks."""
        return decode(self.manifest.shared, self._files.tensor, root, allow_pickle)

    def of_rank(self, rank: int, allow_pickle: Collection[str] = ()) -> Any:
        """What a rank kept for itself."""
        return decode(self.manifest.ranks[rank], self._files.tensor, "rank", allow_pickle)

    def close(self) -> None:
        """Take the mappings away."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def locate(directory: Path, tag: str | None) -> Path | None:
    """Where the checkpoint lies: of ``tag``, or of the tag that ``latest`` names; None where none was ever completed.

    Raises:
        CheckpointError: the one that is asked for is not there, or not complete.
    """
    asked = tag is not None
    if tag is None:
        tag = find_tag(directory)
        if tag is None:
            return find_foreign(directory)
    own = directory / check_tag(tag)
    if not (own / MANIFEST).is_file() and not is_foreign(own):
        others = complete_tags(directory) if directory.is_dir() else []
        why = "" if asked else "which `latest` names, "
        raise CheckpointError(
            f"checkpoint {tag!r}, {why}is not in {directory}, or was never completed. "
            + (f"Complete are: {', '.join(others[-8:])}. Give one of them as tag." if others else "There is no other.")
        )
    return own


def open_together(own: Path, meeting: Meeting) -> Checkpoint:
    """Open the checkpoint in ``own`` on every rank. Collective.

    Raises:
        CheckpointError: some rank cannot read it.
    """
    opened: list[Checkpoint] = []
    try:
        agree(meeting, "the opening of a checkpoint", lambda: opened.append(Checkpoint(own)))
    except BaseException:
        for checkpoint in opened:
            checkpoint.close()
        raise
    return opened[0]


def load(
    checkpoint: Checkpoint,
    models: list[Trained],
    wishes: Wishes,
    meeting: Meeting,
    step: int,
    more: Callable[[], Any] = lambda: None,
) -> tuple[list[IncompatibleKeys], Any]:
    """Read ``models`` from the checkpoint. Collective.

    Args:
        checkpoint: open.
        models: as many as it has, or fewer.
        wishes: what of them.
        meeting: of all ranks.
        step: of the first model, for messages of its transport.
        more: what else may fail and is to be read before anything changes.

    Returns:
        What names did not meet, for each model, and what ``more`` gave.

    Raises:
        CheckpointError: something does not fit or is damaged, on any rank; nothing was changed then.
    """
    found: list[tuple[list[Loading], Any]] = []

    def check() -> str:
        same_world = checkpoint.manifest.world == meeting.size
        loadings = [
            Loading(checkpoint.model(index), trained, wishes, same_world) for index, trained in enumerate(models)
        ]
        found.append((loadings, more()))
        return checkpoint.manifest.save_id

    ids = agree(meeting, "what a load has found", check)
    if len(set(ids)) > 1:
        raise CheckpointError(f"ranks read different checkpoints under {checkpoint.directory}: expected one directory.")
    loadings, extra = found[0]
    for loading in loadings:
        loading.install(step)
    return [loading.keys for loading in loadings], extra
