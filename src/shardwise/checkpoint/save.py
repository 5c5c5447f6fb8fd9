"""Writing a checkpoint: every rank its own file, rank 0 the manifest that makes them one.

::

    gather    each rank finds what it has; a mistake on one rank is everybody's error before a file is made
    write     each rank its file, under a name that no other save has; wait for the disk
    agree     what it holds, sizes and checksums travel to rank 0; a full disk on one rank is everybody's error
    commit    rank 0: manifest (one rename), then ``latest`` (one rename), then what nobody needs any more goes

A crash before the commit leaves files that no manifest names; the next save of the same tag removes them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from shardwise.attempt import attempt_of
from shardwise.checkpoint import manifest as manifests
from shardwise.checkpoint.claim import Claims
from shardwise.checkpoint.direct_file import Slab
from shardwise.checkpoint.host_copy import HostCopy
from shardwise.checkpoint.manifest import Manifest, ModelRecord
from shardwise.checkpoint.model import Part, Trained, merge, owners_of_buffers
from shardwise.checkpoint.shard_file import Entry, FileRecord, write_shard_file
from shardwise.checkpoint.tree import encode
from shardwise.errors import CheckpointError, ShardwiseError

logger = logging.getLogger(__name__)

SCRIPT = "zero_to_fp32.py"
PATIENCE_SECONDS = 300.0
"""How long rank 0 waits beside training for another rank whose file nothing is written to."""
_POLL_SECONDS = 0.02


class Meeting(Protocol):
    """How ranks tell each other what they have."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def exchange(self, subject: str, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order. Collective, and a barrier."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint is made of."""

    models: Sequence[Trained]
    shared: Any
    """Of rank 0."""
    of_rank: Any
    """Of each rank."""
    allow_pickle: Collection[str] = ()
    """Places of values, such as ``client_state.arguments``, that may be kept as pickles."""
    exclude_frozen: bool = False
    root: str = "client_state"
    """What places of ``shared`` begin with."""


@dataclass(frozen=True)
class Place:
    """Where a checkpoint goes, and what else happens there."""

    directory: Path
    tag: str
    save_latest: bool = True
    keep_last: int | None = None
    """How many checkpoints of the directory stay."""
    claimed: Path | None = None
    """Where no other run may save while this one lives; default: ``directory``."""

    @property
    def own_directory(self) -> Path:
        """Of the checkpoint itself."""
        return self.directory / self.tag


def save(place: Place, content: Content, meeting: Meeting, claims: Claims | None = None) -> None:
    """Write a checkpoint. Collective.

    Args:
        place: where.
        content: what.
        meeting: of all ranks.
        claims: keep other runs from saving there, from now on; None: only while this save lasts.

    Raises:
        CheckpointError: something cannot be kept, or the disk does not take it, or another run saves there; what was
            there before still is.
    """
    _Save(place, content, meeting, claims or Claims(), None).run()


class Background:
    """The save that goes on beside training, if there is one: never more than one.

    Ranks cannot meet over their transport meanwhile, for training does. Each leaves a note beside its file when the
    disk has it; rank 0 commits when all notes are there.
    """

    def __init__(self) -> None:
        self.claims = Claims(attempt_of(os.environ))
        self._saving: _Save | None = None
        self._thread: threading.Thread | None = None
        self._slabs: list[Slab] = []

    def start(self, place: Place, content: Content, meeting: Meeting) -> None:
        """Copy what is to be written to host memory, and write it while training goes on. Collective.

        The optimizer's state is copied while training goes on, too: the next step waits for that.

        Raises:
            CheckpointError: something cannot be kept; or the save before this one failed.
        """
        self.finish(meeting)
        self._saving = _Save(place, content, meeting, self.claims, HostCopy(self._slabs))
        if self._saving.is_in_files:
            # A copy in host memory is what they are there to avoid.
            self._slabs.clear()
            logger.warning("optimizer state or parameters rest in files: the save is written before training goes on.")
            saving, self._saving = self._saving, None
            saving.run()
            return
        # No daemon: a script that ends waits for its last checkpoint.
        may_begin = threading.Event()
        self._thread = threading.Thread(
            target=self._saving.run_beside_training, args=(may_begin,), name="shardwise-save"
        )
        self._thread.start()
        try:
            for trained in content.models:
                if trained.step is not None:
                    trained.step.readers.add(self._saving.is_copied)
        finally:
            may_begin.set()

    def finish(self, meeting: Meeting) -> None:
        """Return when the save is complete on all ranks. Collective where one was started.

        Raises:
            CheckpointError: it failed; what was complete before still is.
        """
        saving = self._saving
        if saving is not None:
            self.join()
            agree(meeting, "the end of a save beside training", saving.raise_failure)

    def join(self) -> None:
        """Return when this rank has nothing more to do with it."""
        if self._thread is not None:
            self._thread.join()
        self._thread = self._saving = None

    def close(self) -> None:
        """``join``; other runs may then save where this one did, and the memory kept for the next save is free."""
        self.join()
        self.claims.release()
        self._slabs.clear()

    @property
    def kept_bytes(self) -> int:
        """Host memory that is kept from one save to the next: touching new memory takes longer than copying."""
        return sum(slab.nbytes for slab in self._slabs)


class _Save:
    """One save as this rank does it."""

    def __init__(self, place: Place, content: Content, meeting: Meeting, claims: Claims, copy: HostCopy | None) -> None:
        self._place = place
        self._meeting = meeting
        self._claims = claims
        self._copy = copy
        """Of what is written beside training; made while the rest is gathered."""
        self._trees: list[Entry] = []
        self._tree_numbers = itertools.count()
        self._states: list[Entry] | None = None
        """What only steps change; None while it is not planned."""
        self.is_copied = threading.Event()
        """Set when training may change the optimizer's state, too, while the save goes on."""
        try:
            self._gather(content)
        finally:
            if copy is not None:
                copy.wait()

    # --- gather

    def _gather(self, content: Content) -> None:
        meeting, rank = self._meeting, self._meeting.rank

        def collect() -> dict[str, Any]:
            manifests.check_tag(self._place.tag)
            self._parts = [
                Part(index, trained, self._put, content.exclude_frozen) for index, trained in enumerate(content.models)
            ]
            in_files = any(part.is_in_files for part in self._parts)
            if self._copy is not None and not in_files:
                self._copy.take([entry for part in self._parts for entry in part.entries])
            self._of_rank = encode(content.of_rank, self._put, "rank", content.allow_pickle)
            said = {"in_files": in_files, "buffers": [part.buffers for part in self._parts]}
            if rank == 0:
                self._shared = encode(content.shared, self._put, content.root, content.allow_pickle)
                said["id"] = secrets.token_hex(4)
                self._prepare_directory()
            if self._copy is None or in_files or not all(part.can_wait for part in self._parts):
                self._states = self._plan_states()
            return said

        words = agree(meeting, "what a checkpoint keeps", collect)
        self._id = words[0]["id"]
        self.is_in_files = any(word["in_files"] for word in words)
        """Whether some of it is in no memory of some rank."""
        self._owners = [
            owners_of_buffers([word["buffers"][index] for word in words]) for index in range(len(self._parts))
        ]
        rest, self._trees = self._trees, []
        for part, owners in zip(self._parts, self._owners, strict=True):
            rest += part.buffer_entries([name for name, ranks in owners.items() if rank in ranks])
        self._entries: list[Entry] = []
        if self._copy is None or self.is_in_files:
            states = self._plan_states() if self._states is None else self._states
            self._entries = [entry for part in self._parts for entry in part.entries] + states + rest
        else:
            self._copy.take(rest)
            self._copy.watch(watched for part in self._parts for watched in part.watched())
            if self._states is not None:
                self._copy.take_later(self._states)
        for part in self._parts:
            part.forget_entries()  # a state that a load replaces must not live on until the next save

    def _put(self, tensor: torch.Tensor) -> str:
        """Take a tensor of a tree; its key."""
        key = f"{self._meeting.rank}/tree/{next(self._tree_numbers)}"
        self._trees.append(Entry.of(key, tensor))
        return key

    def _plan_states(self) -> list[Entry]:
        planned = [entry for part in self._parts for entry in part.plan_states()]
        trees, self._trees = self._trees, []
        return planned + trees

    def _prepare_directory(self) -> None:
        directory, own = self._place.directory, self._place.own_directory
        directory.mkdir(parents=True, exist_ok=True)
        if self._claims.take(self._place.claimed or directory):
            manifests.remove_leftovers(directory)
        own.mkdir(exist_ok=True)
        _remove_half_saves(own)

    # --- write, agree, commit

    def run(self) -> None:
        try:
            files = agree(self._meeting, "the files of a checkpoint", self._write)
        except BaseException:
            self._path().unlink(missing_ok=True)
            raise
        agree(self._meeting, "the end of a checkpoint", lambda: self._commit(files))

    def run_beside_training(self, may_begin: threading.Event) -> None:
        """What ``run`` does, meeting in the directory; a failure is kept for ``raise_failure``.

        Args:
            may_begin: is waited for: a new thread that computes at once keeps Python from the caller for milliseconds.
        """
        may_begin.wait()
        self._failure: Exception | None = None
        try:
            try:
                self._complete_copy()
                said: dict[str, Any] = {"result": self._write()}
            except (ShardwiseError, OSError) as error:
                self._path().unlink(missing_ok=True)
                self._failure = error
                said = {"error": _explain(error)}
            self._entries = []
            self._leave_note(json.dumps(said).encode())
            if self._meeting.rank == 0 and self._failure is None:
                self._commit([self._await_note(rank) for rank in range(self._meeting.size)])
        except Exception as error:  # of a thread nobody would hear
            self._failure = error
        if self._failure is not None:  # said at once as well: a script may end without another call
            logger.error("the checkpoint %s was not completed: %s", self._place.own_directory, self._failure)

    def _complete_copy(self) -> None:
        try:
            if self._copy is not None:
                if self._states is None:
                    self._copy.take_later(self._plan_states())
                self._entries = self._copy.complete()
        finally:
            self._copy = self._states = None
            self.is_copied.set()

    def raise_failure(self) -> None:
        """What went wrong beside training."""
        if self._failure is not None:
            raise self._failure

    def _note(self, rank: int) -> Path:
        return self._path(rank).with_suffix(".done")

    def _leave_note(self, content: bytes) -> None:
        note = self._note(self._meeting.rank)
        try:
            manifests.replace_file(note, content)
        except OSError:
            note.touch()  # a disk without room for words may have room for a name
            raise

    def _await_note(self, rank: int) -> dict[str, Any]:
        seen, deadline = -1, 0.0
        while not self._note(rank).exists():
            with contextlib.suppress(OSError):  # it has its length from the beginning; the time of its last write moves
                written = self._path(rank).stat().st_mtime_ns
                seen, deadline = (seen, deadline) if written == seen else (written, time.monotonic() + PATIENCE_SECONDS)
            deadline = deadline or time.monotonic() + PATIENCE_SECONDS
            if time.monotonic() > deadline:
                raise CheckpointError(f"rank {rank} has written nothing for {PATIENCE_SECONDS:.0f} s.")
            time.sleep(_POLL_SECONDS)
        said = json.loads(self._note(rank).read_bytes() or b'{"error": "its disk took nothing more."}')
        if "error" in said:
            raise CheckpointError(f"rank {rank}: {said['error']}")
        record: dict[str, Any] = said["result"]
        return record

    def _path(self, rank: int | None = None) -> Path:
        number = self._meeting.rank if rank is None else rank
        return self._place.own_directory / f"rank_{number:05d}.{self._id}.safetensors"

    def _write(self) -> dict[str, Any]:
        record = write_shard_file(self._path(), self._entries)
        return {
            "name": record.name,
            "bytes": record.nbytes,
            "checksums": record.checksums,
            "models": [part.words() for part in self._parts],
            "of_rank": self._of_rank,
        }

    def _commit(self, files: Sequence[Mapping[str, Any]]) -> None:
        if self._meeting.rank != 0:
            return
        own = self._place.own_directory
        claimed = self._place.claimed or self._place.directory
        self._claims.check(claimed)
        for file in files:
            path = own / file["name"]
            if not path.exists() or path.stat().st_size != file["bytes"]:
                raise CheckpointError(
                    f"{path} was written by another rank and is not seen by rank 0. Expected a directory that all "
                    "machines share."
                )
        manifests.sync_directory(own)
        manifests.sync_directory(own.parent)
        write_script(self._place.directory)
        self._claims.check(claimed)  # once more, after what may take long
        manifests.write_manifest(own, self._manifest(files))
        if self._place.save_latest:
            manifests.write_latest(self._place.directory, self._place.tag)
        manifests.remove_files(own, keep=[file["name"] for file in files])
        if self._place.keep_last is not None:
            rotate(self._place.directory, self._place.keep_last, self._place.tag)

    def _manifest(self, files: Sequence[Mapping[str, Any]]) -> Manifest:
        models: list[ModelRecord] = []
        for index, (part, owners) in enumerate(zip(self._parts, self._owners, strict=True)):
            models.append(merge(part, [file["models"][index] for file in files], owners))
        return Manifest(
            save_id=self._id,
            world=self._meeting.size,
            files=tuple(FileRecord(file["name"], file["bytes"], tuple(file["checksums"])) for file in files),
            models=tuple(models),
            shared=self._shared,
            ranks=tuple(file["of_rank"] for file in files),
        )


def agree(meeting: Meeting, subject: str, work: Callable[[], Any]) -> list[Any]:
    """Do ``work`` on every rank and exchange its result as JSON. Collective.

    Raises:
        CheckpointError: it failed on some rank: the same error on every rank, with the rank that it came from.
    """
    failure: BaseException | None = None
    try:
        said: dict[str, Any] = {"result": work()}
    except (ShardwiseError, OSError) as error:
        failure = error
        said = {"error": _explain(error)}
    except Exception as error:  # the others must not wait for a rank that ends
        failure = error
        said = {"error": f"{type(error).__name__}: {error}"}
    answers = [json.loads(answer) for answer in meeting.exchange(subject, json.dumps(said).encode())]
    for rank, answer in enumerate(answers):
        if "error" in answer:
            text = answer["error"]
            if failure is not None and not isinstance(failure, (ShardwiseError, OSError)):
                raise failure
            raise CheckpointError(f"rank {rank}: {text}" if meeting.size > 1 else text) from failure
    return [answer["result"] for answer in answers]


def _explain(error: ShardwiseError | OSError) -> str:
    if isinstance(error, OSError):
        return (
            f"the checkpoint could not be written or read: {error.strerror or error} ({error.filename or 'no file'}). "
            "Checkpoints that were complete are as they were. Make room or mend the directory, and try again."
        )
    return str(error)


def _remove_half_saves(own: Path) -> None:
    """Remove what saves that never ended have left in a tag's directory, where it is known what is not theirs."""
    if not (own / manifests.MANIFEST).exists():
        manifests.remove_files(own, keep=())
        return
    # A manifest that cannot be read now may be read later: its files stay until a new manifest has taken its place.
    with contextlib.suppress(CheckpointError):
        manifests.remove_files(own, keep=[file.name for file in manifests.read_manifest(own).files])


def rotate(directory: Path, keep_last: int, newest: str) -> None:
    """Remove the oldest complete checkpoints, so that ``keep_last`` stay; never the newest, and never the latest."""
    protected = {newest, manifests.find_tag(directory)}
    others = [tag for tag in manifests.complete_tags(directory) if tag not in protected]
    for tag in others[: max(0, len(others) + len(protected - {None}) - keep_last)]:
        manifests.remove_checkpoint(directory / tag)


def write_script(directory: Path) -> None:
    """Put the script beside the checkpoints that makes ordinary weights of them, without shardwise."""
    source = Path(__file__).with_name(SCRIPT).read_bytes()
    target = directory / SCRIPT
    with contextlib.suppress(OSError):
        if target.read_bytes() == source:
            return
    manifests.replace_file(target, source, mode=0o777)
