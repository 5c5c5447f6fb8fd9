"""The machines of a run coming together, before any rank starts: they meet at machine 0's store, and compare.

The store is torch's TCPStore at the address and port of the meeting; torch's rendezvous uses the same server later.
"""

import json
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from shardwise.errors import ConfigError, StateError
from shardwise.launch.facts import differences
from shardwise.launch.job import Meeting

_ATTEMPT_SECONDS = 2  # to connect
_ANSWER_SECONDS = 30  # of a store that listens
_LOOK_AGAIN_SECONDS = 0.05
_HEARD_SECONDS = 5  # for the others to hear why nothing starts
_FEW = 8  # names in a message
_TOGETHER, _RUN = "together", "run"


class Misfit(ConfigError):
    """Machines that cannot run together; every machine says it in the same words."""


def come_together(meeting: Meeting, host: str, facts: Mapping[str, Any], patience_seconds: float) -> Store:
    """The store that the machines share, once every one of them is known to fit the others.

    ``facts`` are those of ``facts_of``, or what keeps this machine from its part, under ``error``. Where the run may
    start with fewer machines (``min_machines``), each compares itself with machine 0 alone.

    Raises:
        StateError: some did not come within ``patience_seconds``.
        Misfit: some differ, or cannot do their part; the same words on every machine.
    """
    deadline = time.monotonic() + patience_seconds
    store = _connect(meeting, deadline)
    try:
        faults = _compare(store, meeting, host, facts, deadline)
    except DistError:  # of torch's store
        raise _not_met(meeting, "machine 0 has ended.") from None
    if faults:
        raise Misfit(faults)
    return store


def _compare(store: Store, meeting: Meeting, host: str, facts: Mapping[str, Any], deadline: float) -> str:
    """What is wrong, in words; nothing where the machines fit."""
    rank = meeting.machine_rank
    if rank == 0:
        store.set(_RUN, uuid.uuid4().hex)
    for key in (report_key(rank), ended_key(rank)):  # of one that had this place before
        store.delete_key(key)
    store.add(beat_key(rank), 1)
    store.set(_facts_key(rank), json.dumps({"host": host, "facts": dict(facts)}))
    whole = meeting.min_machines is None
    if rank != 0:
        _wait(meeting, deadline, lambda: store.check([_TOGETHER if whole else _facts_key(0)]))
        faults = store.get(_TOGETHER).decode() if whole else _misfit(store, rank)
        store.set(_heard_key(rank), "")
        return faults
    others = range(1, meeting.num_machines) if whole else range(0)
    missing = {_facts_key(other): other for other in others}

    def all_here() -> bool:
        for key in [key for key in missing if store.check([key])]:
            del missing[key]
        return not missing

    _wait(meeting, deadline, all_here, missing)
    faults = "\n".join(dict.fromkeys(filter(None, (_misfit(store, other) for other in (0, *others)))))
    store.set(_TOGETHER, faults)
    if faults:  # the store ends with this machine
        until = time.monotonic() + _HEARD_SECONDS
        while time.monotonic() < until and not all(store.check([_heard_key(other)]) for other in others):
            time.sleep(_LOOK_AGAIN_SECONDS)
    return faults


def run_id(store: Store) -> str:
    """The run's name, which no other run has; for machines that have come together."""
    return store.get(_RUN).decode()


def beat_key(rank: int) -> str:
    """Where a machine counts its signs of life."""
    return f"beat/{rank}"


def report_key(rank: int) -> str:
    """Where a machine says how its agent failed."""
    return f"report/{rank}"


def ended_key(rank: int) -> str:
    """Where a machine says that it ends, well or on the verdict."""
    return f"ended/{rank}"


def host_of(store: Store, rank: int) -> str | None:
    """The name of a machine that has come; None where it has not."""
    if not store.check([_facts_key(rank)]):
        return None
    return str(json.loads(store.get(_facts_key(rank)))["host"])


def _heard_key(rank: int) -> str:
    return f"heard/{rank}"


def _facts_key(rank: int) -> str:
    return f"facts/{rank}"


def _misfit(store: Store, rank: int) -> str:
    """What is different on a machine, in words; nothing where it fits."""
    first = json.loads(store.get(_facts_key(0)))
    other = json.loads(store.get(_facts_key(rank)))
    for machine, told in ((0, first), (rank, other)):
        if "error" in told["facts"]:
            return f"Machine {machine} ({told['host']}): {told['facts']['error']}"
    found = list(differences(first["facts"], other["facts"]))
    if not found:
        return ""
    return (
        f"Machine {rank} ({other['host']}) does not fit machine 0 ({first['host']}): it has {'; '.join(found)}. "
        "Make them alike, and start all again."
    )


def _connect(meeting: Meeting, deadline: float) -> Store:
    """The store: machine 0 serves it, the others wait for that, in attempts between which Ctrl-C is heard."""
    serves = meeting.machine_rank == 0
    problem = ""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise _not_met(meeting, problem)
        try:
            if not serves:  # torch's own waiting is loud, and deaf
                socket.create_connection((meeting.address, meeting.port), min(_ATTEMPT_SECONDS, left)).close()
            store = TCPStore(
                meeting.address,
                meeting.port,
                is_master=serves,
                timeout=timedelta(seconds=_ANSWER_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,  # torch's rendezvous in this process finds the same server
            )
            return PrefixStore("shardwise.launch", store)
        except (OSError, RuntimeError) as error:  # of the network, and of torch's store
            problem = _first_line(error)
            time.sleep(_LOOK_AGAIN_SECONDS)


def _wait(
    meeting: Meeting, deadline: float, condition: Callable[[], bool], missing: Mapping[str, int] | None = None
) -> None:
    while not condition():
        if time.monotonic() > deadline:
            names = [f"machine {rank}" for rank in (missing or {}).values()]
            more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
            raise _not_met(meeting, f"{', '.join(names[:_FEW])}{more} did not come." if names else "some did not come.")
        time.sleep(_LOOK_AGAIN_SECONDS)


def _not_met(meeting: Meeting, problem: str) -> StateError:
    return StateError(
        f"Machine {meeting.machine_rank} of {meeting.num_machines} has not met the others at "
        f"{meeting.address}:{meeting.port}: {problem} Start the same command on every machine, "
        "each with its own --machine_rank, and see that they reach that address and port."
    )


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if line.endswith(".") else line + "."
