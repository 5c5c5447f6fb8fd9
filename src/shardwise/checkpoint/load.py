"""Reading a checkpoint: each rank reads the byte ranges that it will hold, whatever world and stage wrote them.

::

    open      manifest and tag; the same on every rank
    check     names and shapes fit, every byte to be read has its checksum; a fault on one rank is everybody's error
    install   only now the engine changes: new optimizer states are there already, weights are read a second time
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from shardwise.checkpoint.foreign.open import find_foreign, is_foreign, read_foreign
from shardwise.checkpoint.manifest import MANIFEST, Manifest, check_tag, complete_tags, find_tag, read_manifest
from shardwise.checkpoint.model import IncompatibleKeys, Loading, Reads, SavedModel, Trained, Wishes
from shardwise.checkpoint.save import Meeting, agree
from shardwise.checkpoint.shard_file import ShardFile, settle
from shardwise.checkpoint.tree import decode
from shardwise.errors import CheckpointError

logger = logging.getLogger(__name__)


class Files(Reads, Protocol):
    """The files of a checkpoint, ours or somebody else's."""

    def close(self) -> None:
        """Forget the files."""


class OwnFiles:
    """The files that a manifest of ours names, opened when they are first needed.

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
        """Note that the bytes of these elements are to be checked."""
        self._file(file).check(key, begin, end)

    def read_later(self, file: int, key: str, begin: int, out: torch.Tensor) -> None:
        """Note that ``out`` is to be filled with the elements from ``begin`` on."""
        self._file(file).read_later(key, begin, out)

    def settle(self) -> None:
        """Do what was noted: each block of each file is read once."""
        settle(self._open.values())

    def read_into(self, file: int, key: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` with the elements from ``begin`` on, now."""
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
        """Forget the files."""
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
        """Forget the files."""
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


def open_together(find: Callable[[], Path | None], meeting: Meeting) -> Checkpoint | None:
    """Open on every rank what ``find`` has found, or on none. Collective.

    Raises:
        CheckpointError: on some rank it is not to be read; or ranks have found different ones.
    """
    opened: list[Checkpoint] = []

    def look() -> str | None:
        own = find()
        if own is None:
            return None
        opened.append(Checkpoint(own))
        return f"{own.name} {opened[0].manifest.save_id}"

    said = agree(meeting, "the checkpoint to be loaded", look)
    other = next((rank for rank, found in enumerate(said) if found != said[0]), None)
    if other is not None:
        raise CheckpointError(
            f"rank 0 has found {said[0] or 'no checkpoint'} where rank {other} has found {said[other] or 'none'}: "
            "expected one directory that all machines share."
        )
    return opened[0] if opened else None


@contextmanager
def _as_saved(directory: Path) -> Iterator[None]:
    """What a manifest holds has the form of one, and yet may make no sense to who has to read it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{directory} does not hold what was saved: {type(error).__name__} {error}.") from error


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
        checkpoint: open, the same on all ranks.
        models: as many as it has, or fewer.
        wishes: what of them.
        meeting: of all ranks.
        step: of the first model, for messages of its transport.
        more: what else may fail and is to be read before anything changes.

    Returns:
        What names did not meet, for each model, and what ``more`` gave.

    Raises:
        CheckpointError: something does not fit or is damaged, on any rank; nothing was changed then, unless a file
            that was whole when it was checked could not be read a second time: its message says so.
    """
    found: list[tuple[list[Loading], Any]] = []

    def check() -> None:
        same_world = checkpoint.manifest.world == meeting.size
        with _as_saved(checkpoint.directory):
            loadings = [
                Loading(checkpoint.model(index), trained, wishes, same_world) for index, trained in enumerate(models)
            ]
            found.append((loadings, more()))

    agree(meeting, "what a load has found", check)
    loadings, extra = found[0]
    for loading in loadings:
        loading.begin(step)

    def read_weights() -> None:
        with _as_saved(checkpoint.directory):
            for loading in loadings:
                loading.read_weights()

    agree(meeting, "the weights of a load", read_weights)
    with _as_saved(checkpoint.directory):
        for loading in loadings:
            loading.install(step)
    return [loading.keys for loading in loadings], extra
