"""The roll call: ranks meet here before a collective of the front end, so one that went elsewhere is found in seconds.

A collective waits as long as its time-out for a rank that never comes, and two different ones may take each other's
messages. Before the collective every rank therefore answers the roll call, through the store of the process group:

    fast path   add 1 to the counter of (which call, steps done, what for); the rank that makes it full opens the
                door, the others wait for that. Two small messages: less than a barrier of gloo.
    slow path   after PATIENCE_SECONDS, leave a note that says where this rank is, and read the others' notes.

An error needs proof that a rank will not come: its note names another place, it has done another number of steps, or
it has left its script. A rank of which nothing is known is slow, and is waited for until the group's time-out.

Whoever answered knows that all ranks did: the roll call is a barrier of the hosts.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch.distributed import ProcessGroup

from shardwise import torch_compat
from shardwise.errors import CollectiveError

PATIENCE_SECONDS = 2.0
LOOK_AGAIN_SECONDS = 0.5
FIRST_NAP_SECONDS = 0.0001
LONGEST_NAP_SECONDS = 0.02
DETAILS_SHOWN = 160  # characters of a long structure
ADVICE = "Call it on all ranks, outside of conditions such as `if is_main_process`."


class DistributedOperationException(CollectiveError):
    """The ranks meet in one operation, but with data of different structure, shapes or dtypes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is: what it tells the others."""

    number: int
    """Roll calls so far, this one included."""
    steps: int
    """Steps done so far that every rank does, between the same roll calls (see ``passed_step``)."""
    operation: str
    details: str = ""
    """What must agree beyond the operation: the structure of its data."""
    ended: bool = False

    def __str__(self) -> str:
        if self.ended:
            return "has left its script (or failed: see its output)"
        details = f" of {self.details}" if self.details else ""
        return f"is in {self.operation}{details}" if self.operation else f"has begun step {self.steps} of training"


class KeyValueStore(Protocol):
    """What a roll call needs of torch's store."""

    @property
    def timeout(self) -> timedelta:
        """How long the group's ranks wait for each other."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter and return it."""

    def set(self, key: str, value: str, /) -> None:
        """Write."""

    def get(self, key: str, /) -> bytes:
        """Read; waits for the key."""

    def check(self, keys: list[str], /) -> bool:
        """Whether they are there."""

    def delete_key(self, key: str, /) -> bool:
        """Forget."""


class RollCall:
    """The roll calls of one process group: every rank answers the same ones in the same order."""

    def __init__(self, store: KeyValueStore, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._number = 0
        self._steps = 0
        self._last_door: str | None = None

    def answer(self, operation: str, details: str = "") -> None:
        """Wait until every rank is here, for the same operation with the same details.

        Raises:
            DistributedOperationException: another rank came with other details.
            CollectiveError: another rank is elsewhere, has ended, or did not come in time.
        """
        self._number += 1
        here = Place(self._number, self._steps, operation, details)
        door = f"{self._number}/{_digest(here)}"
        try:
            if self._store.add(door, 1) == self._size:
                self._store.set(f"{door}/open", "")
                self._forget_the_one_before()
            else:
                self._wait_for(f"{door}/open", here)
        except dist.DistError as error:
            raise CollectiveError(
                f"rank {self._rank} is in {operation}, but the ranks' store is gone: the process that keeps it "
                f"(rank 0, or the launcher) has ended. {ADVICE}"
            ) from error
        self._last_door = door

    def passed_step(self) -> None:
        """Count a step that every rank does in the same order relative to the roll calls, and tell the others.

        One small message. It is what a rank in a roll call can know of a rank that is blocked inside training.
        """
        self._steps += 1
        with suppress(dist.DistError):  # training goes on without the store; the next roll call says so
            self._note(Place(self._number, self._steps, ""))

    def leave(self) -> None:
        """Tell the others that this rank answers no more."""
        with suppress(dist.DistError, RuntimeError):
            self._note(Place(self._number + 1, self._steps, "", ended=True))

    def _wait_for(self, opened: str, here: Place) -> None:
        start = looked = time.monotonic()
        nap = 0.0
        while not self._store.check([opened]):
            now = time.monotonic()
            waited = now - start
            if waited > PATIENCE_SECONDS and now - looked > LOOK_AGAIN_SECONDS:
                self._note(here)
                self._look_around(here, opened)
                looked = now
            if waited > self._store.timeout.total_seconds():
                self._raise_absent(here, waited)
            time.sleep(nap)
            nap = min(max(FIRST_NAP_SECONDS, nap * 1.5), LONGEST_NAP_SECONDS)

    def _note(self, place: Place) -> None:
        self._store.set(f"place/{self._rank}", json.dumps(asdict(place)))

    def _notes(self) -> dict[int, Place]:
        """Where the other ranks said that they are; without those that said nothing."""
        found = {}
        for rank in range(self._size):
            key = f"place/{rank}"
            if rank != self._rank and self._store.check([key]):
                found[rank] = Place(**json.loads(self._store.get(key)))
        return found

    def _look_around(self, here: Place, opened: str) -> None:
        for rank, there in self._notes().items():
            if not _never_comes(here, there):
                continue
            if self._store.check([opened]):
                return  # all were here: what the note says came after
            self._raise_elsewhere(here, rank, there)

    def _raise_elsewhere(self, here: Place, rank: int, there: Place) -> None:
        if (there.operation, there.steps) == (here.operation, here.steps):
            mine, others = _where_they_differ(here.details, there.details)
            raise DistributedOperationException(
                f"{here.operation} needs data of the same structure, shapes and dtypes on all ranks: rank {self._rank} "
                f"has {mine}, rank {rank} has {others}. Bring them to one shape first, for example with "
                "`pad_across_processes`."
            )
        steps = f" after {there.steps} steps" if there.operation and there.steps != here.steps else ""
        mine = f" after {here.steps} steps" if steps else ""
        raise CollectiveError(
            f"rank {self._rank} {here}{mine}, but rank {rank} {there}{steps} and does not come. {ADVICE}"
        )

    def _raise_absent(self, here: Place, waited_seconds: float) -> None:
        present = {rank for rank, there in self._notes().items() if there.number >= here.number}
        absent = [str(rank) for rank in range(self._size) if rank != self._rank and rank not in present]
        raise CollectiveError(
            f"rank {self._rank} waited {waited_seconds:.0f} s in {here.operation}, but rank {', '.join(absent)} did "
            f"not come. {ADVICE} If a rank is only slow there, give a longer `timeout` when the process group is made."
        )

    def _forget_the_one_before(self) -> None:
        """Everybody is in this call, so nobody reads the keys of the one before."""
        if self._last_door is not None:
            self._store.delete_key(self._last_door)
            self._store.delete_key(f"{self._last_door}/open")


def _never_comes(here: Place, there: Place) -> bool:
    """Whether a rank that is (or was last) ``there`` is proof that it takes no part in the roll call ``here``."""
    if there.ended:
        return True
    if there.number == here.number:
        return there != here
    # It did not answer yet, but has begun a step that this rank will only begin after the roll call.
    return there.number == here.number - 1 and there.steps > here.steps


_current: tuple[weakref.ref[ProcessGroup], RollCall] | None = None
_num_groups = 0


def current() -> RollCall | None:
    """The roll calls of the default process group; None in a single process.

    Made at first use, which is best early: from then on the others learn when this rank's script ends.
    """
    global _current, _num_groups
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None or group.size() == 1:
        return None
    if _current is None or _current[0]() is not group:
        if _num_groups == 0:
            atexit.register(leave)
        _num_groups += 1  # a store may outlive its group: each group's keys are its own
        # A connection of its own: the group's may be held by torch's threads, and a server must not live on for us.
        store = torch_compat.store_under(f"shardwise/roll_call/{_num_groups}")
        _current = (weakref.ref(group), RollCall(store, group.rank(), group.size()))
    return _current[1]


def answer(operation: str, details: str = "") -> None:
    """Wait until every rank is here for the same operation; nothing to do in a single process (see ``RollCall``)."""
    calls = current()
    if calls is not None:
        calls.answer(operation, details)


def passed_step() -> None:
    """Tell that this rank has begun one more step that every rank does (see ``RollCall``)."""
    calls = current()
    if calls is not None:
        calls.passed_step()


def leave() -> None:
    """Tell the other ranks that this one leaves the process group, and forget the group. Done at the script's end."""
    global _current
    calls = current()
    if calls is None and _current is not None:
        calls = _current[1]  # the script has destroyed the group itself
    if calls is not None:
        calls.leave()
    _current = None


def _where_they_differ(mine: str, others: str) -> tuple[str, str]:
    """Both as they are; if long, their parts from shortly before the first difference on."""
    if len(mine) + len(others) <= 2 * DETAILS_SHOWN:
        return mine, others
    differs = next((i for i, (a, b) in enumerate(zip(mine, others, strict=False)) if a != b), 0)
    begin = max(0, differs - DETAILS_SHOWN // 2)
    shown = [f"{'...' if begin else ''}{text[begin : begin + DETAILS_SHOWN]}..." for text in (mine, others)]
    return shown[0], shown[1]


def _digest(place: Place) -> str:
    text = f"{place.steps}\n{place.operation}\n{place.details}"
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
