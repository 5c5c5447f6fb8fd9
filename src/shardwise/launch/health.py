"""The machines of a run watching over each other while their ranks work.

Every machine's launcher counts signs of life in the store at machine 0. Machine 0 looks at the others' counters, and
the others at whether they still reach machine 0. Whatever ends the run badly (a rank's failure, a machine that is
silent, a request to end) becomes one verdict in the store, and on it every machine ends its own agent.

Where fewer machines may go on (``min_machines``) and restarts are allowed, a lost machine ends no run: the ranks of the
others are ended, and torch's agents start them again without it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from shardwise.launch.gathering import beat_key, ended_key, host_of, report_key
from shardwise.launch.job import Job
from shardwise.launch.local_ranks import LocalRanks
from shardwise.launch.verdict import Ending, Verdict, first_of

TICK_SECONDS = 0.5
# A rank's error makes others fail, and their machines report within what an agent grants its ranks to end.
SETTLE_SECONDS = 12.0
_FAREWELL_SECONDS = 10.0  # for the verdict to be heard everywhere, and be shown at machine 0
_STUCK_SECONDS = 20.0  # for an agent to end after a verdict; then its process is ended around it
_VERDICT, _REGROUP = "verdict", "regroup"


class Health:
    """One machine's part in it: two threads beside the agent, which has the main one.

    One thread alone talks to the store, so that a dead connection holds up nobody; the other looks at the clock.
    """

    def __init__(self, job: Job, host: str, store: Store, ranks: LocalRanks, note: Callable[[str], None]) -> None:
        self._me = job.meeting.machine_rank
        self._timeout_seconds = job.faults.timeout_seconds
        self._store = store
        self._ranks = ranks
        self._first_host = host_of(store, 0) or job.meeting.address
        self._others = Others(store, job, host, note) if self._me == 0 else None
        self._lock = threading.Lock()
        self._verdict: Verdict | None = None  # guarded by the lock, as the next
        self._agent_runs = True
        self._own: Verdict | None = None  # to report
        self._leaves = threading.Event()  # the agent has ended well
        self._decided = threading.Event()
        self._over = threading.Event()
        self._heard = time.monotonic()
        self._regroups = 0
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._talk, self._watch)]
        store.set_timeout(timedelta(seconds=max(1.0, self._timeout_seconds)))

    # --- in the main thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to watch; from now until `conclude`, a verdict ends this process's agent by SIGTERM."""
        for thread in self._threads:
            thread.start()

    def conclude(self, own: Verdict | None) -> Verdict | None:
        """Says how this machine's agent has ended (None: well), and returns how the run has.

        Waits for the other machines: to end as well, or to agree on what came first.
        """
        with self._lock:
            self._agent_runs = False
            if self._verdict is not None:
                return self._verdict
            self._own = own
        if own is None:
            self._leaves.set()
            while not self._over.wait(TICK_SECONDS) and not self._decided.is_set():
                pass
        else:
            self._decided.wait(SETTLE_SECONDS + self._timeout_seconds)
        with self._lock:
            return self._verdict or own

    def close(self) -> None:
        """Ends the watch; after a verdict, once the others have heard it and machine 0 has shown it."""
        if self._decided.is_set():
            self._over.wait(_FAREWELL_SECONDS)
        self._over.set()
        for thread in self._threads:
            thread.join(_FAREWELL_SECONDS)  # no longer: one may wait for an answer that never comes

    # --- in threads of their own --------------------------------------------------------------------------------------

    def _talk(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK_SECONDS):
            now = time.monotonic()
            if now - last > self._timeout_seconds / 2:  # this process was stopped: what it missed is nobody's silence
                self._forgive(now)
            last = now
            try:
                self._tick(now)
            except RuntimeError as error:  # of torch's store
                if not self._decided.is_set():
                    self._decide(self._first_lost(f"the connection to it broke ({type(error).__name__})"))
                break
            self._heard = time.monotonic()
            self._ranks.end_stopped()
        self._over.set()

    def _tick(self, now: float) -> None:
        self._store.add(beat_key(self._me), 1)
        if self._others is not None:
            self._tick_of_first(self._others, now)
        else:
            self._tick_of_other()
        regroups = self._store.add(_REGROUP, 0)
        if regroups > self._regroups:
            self._regroups = regroups
            self._ranks.end_all("Another machine was lost; the run begins anew with those that are left.")

    def _tick_of_first(self, others: "Others", now: float) -> None:
        if self._decided.is_set():
            if others.all_ended():
                self._over.set()
            return
        verdict = others.look(now, self._own)
        if verdict is not None:
            self._store.set(_VERDICT, verdict.pack())
            self._decide(verdict)
        elif others.regrouped():
            self._store.add(_REGROUP, 1)
        elif self._leaves.is_set() and others.all_ended():
            self._over.set()

    def _tick_of_other(self) -> None:
        if self._own is not None:
            self._store.set(report_key(self._me), self._own.pack())
        if self._store.check([_VERDICT]) and not self._decided.is_set():
            self._store.set(ended_key(self._me), "")
            self._decide(Verdict.unpack(self._store.get(_VERDICT)))
        elif self._leaves.is_set():
            self._store.set(ended_key(self._me), "")
            self._over.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK_SECONDS):
            now = time.monotonic()
            if now - last > self._timeout_seconds / 2:
                self._heard = now
            last = now
            if now - self._heard > self._timeout_seconds and not self._decided.is_set():
                self._decide(self._first_lost(f"it was not reached for {self._timeout_seconds:g} s (--health_timeout)"))
                break

    def _forgive(self, now: float) -> None:
        self._heard = now
        self._ranks.forgive()
        if self._others is not None:
            self._others.forgive(now)

    def _first_lost(self, how: str) -> Verdict:
        return _lost(0, self._first_host, how)

    def _decide(self, verdict: Verdict) -> None:
        with self._lock:
            if self._verdict is not None:
                return
            self._verdict = verdict
            self._decided.set()
            if self._agent_runs:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Thread(target=self._end_around_a_stuck_agent, args=(verdict.status,), daemon=True).start()

    def _end_around_a_stuck_agent(self, status: int) -> None:
        """The agent may wait in a dead connection, where it hears no signal. The guard ends the ranks."""
        deadline = time.monotonic() + _STUCK_SECONDS
        while time.monotonic() < deadline:
            time.sleep(TICK_SECONDS)
            with self._lock:
                if not self._agent_runs:
                    return
        os._exit(status & 0xFF)


class Others:
    """The machines as machine 0 sees them, which alone decides what came first."""

    def __init__(self, store: Store, job: Job, host: str, note: Callable[[str], None]) -> None:
        self._store = store
        self._num_machines = job.meeting.num_machines
        self._fewest = job.meeting.min_machines if job.max_restarts else None
        self._timeout_seconds = job.faults.timeout_seconds
        self._host = host
        self._note = note
        self._hosts: dict[int, str] = {}  # of those that have come
        self._beats: dict[int, tuple[int, float]] = {}  # the last count, and when it was new
        self._lost: set[int] = set()  # that the run goes on without
        self._first_report: float | None = None
        self._regroup = False

    def look(self, now: float, own: Verdict | None) -> Verdict | None:
        """The verdict, if there is something to decide; `own` is machine 0's report."""
        reports = {0: own} if own is not None else {}
        silent = []
        for rank in self._come():
            if self._store.check([ended_key(rank)]):
                continue
            if self._store.check([report_key(rank)]):
                reports[rank] = Verdict.unpack(self._store.get(report_key(rank)))
            if self._is_silent(rank, now):
                silent.append(rank)
        failed = [report for rank, report in reports.items() if report.ending is Ending.FAILED]
        if failed:
            self._first_report = self._first_report or now
            all_said = len(reports) + len(silent) > len(self._hosts)
            return first_of(list(reports.values())) if all_said or now - self._first_report > SETTLE_SECONDS else None
        if own is not None:
            return own
        for rank in silent:
            if rank not in reports:
                how = f"nothing was heard of it for {self._timeout_seconds:g} s (--health_timeout)"
                reports[rank] = _lost(rank, self._hosts[rank], how)
        for rank, report in reports.items():
            if not self._goes_on_without(rank, report):
                self._lost.update(silent)  # nobody waits for what they say to it
                return report
        return None

    def regrouped(self) -> bool:
        """Whether a machine has been lost since the last question, and the run goes on."""
        asked, self._regroup = self._regroup, False
        return asked

    def all_ended(self) -> bool:
        """Whether every machine that has come, and is not lost, has said that it ends."""
        return all(rank in self._lost or self._store.check([ended_key(rank)]) for rank in self._come())

    def forgive(self, now: float) -> None:
        """Counts silence from now on."""
        self._beats = {rank: (count, now) for rank, (count, _) in self._beats.items()}

    def _come(self) -> list[int]:
        for rank in range(1, self._num_machines):
            if rank not in self._hosts:
                host = host_of(self._store, rank)
                if host is not None:
                    self._hosts[rank] = host
        return list(self._hosts)

    def _is_silent(self, rank: int, now: float) -> bool:
        count = self._store.add(beat_key(rank), 0)
        before, since = self._beats.get(rank, (-1, now))
        if count != before:
            self._beats[rank] = (count, now)
            if rank in self._lost and not self._store.check([report_key(rank)]):
                self._lost.discard(rank)
                self._note(f"machine {rank} ({self._hosts[rank]}) is back.")
            return False
        return now - since > self._timeout_seconds

    def _goes_on_without(self, rank: int, report: Verdict) -> bool:
        if rank in self._lost:
            return True
        left = 1 + len(self._hosts) - len(self._lost | {rank})
        if self._fewest is None or left < self._fewest:
            return False
        self._lost.add(rank)
        self._regroup = True
        why = report.words or "it was asked to end."
        self._note(
            f"machine {rank} ({self._hosts[rank]}) is lost: {why} {left} of {self._num_machines} machines go on."
        )
        return True


def _lost(rank: int, host: str, how: str) -> Verdict:
    words = f"{how[0].upper()}{how[1:]}. Look at that machine, and at the network between it and the others."
    return Verdict(Ending.LOST, rank, host, words=words)
