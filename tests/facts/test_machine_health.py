"""The fear: the machines of a run blame the wrong one, or differ without a word."""

import json
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from shardwise.errors import StateError
from shardwise.launch.facts import differences, facts_of, versions_here
from shardwise.launch.failure import RankFailure
from shardwise.launch.gathering import Misfit, beat_key, come_together, ended_key, report_key, run_id
from shardwise.launch.health import SETTLE_SECONDS, Others
from shardwise.launch.job import Device, FaultPolicy, Job, Meeting, ProgramKind
from shardwise.launch.verdict import Ending, Verdict, first_of
from tests.front.test_launch_machines import free_port

TIMEOUT = 60.0
JOB = Job(
    program="train.py",
    arguments=(),
    kind=ProgramKind.SCRIPT,
    device=Device.CPU,
    num_processes=6,
    num_local_processes=2,
    num_threads_per_process=1,
    threads_were_asked_for=False,
    max_restarts=0,
    meeting=Meeting(3, 0, "alpha", 29500),
    gpu_ids=(),
    faults=FaultPolicy(timeout_seconds=TIMEOUT),
)


def crash(rank: int, when: float, host: str) -> RankFailure:
    return RankFailure(rank, -signal.SIGSEGV, when, host=host)


def error(rank: int, when: float, host: str) -> RankFailure:
    return RankFailure(rank, 1, when, f"RuntimeError: of rank {rank}", "the stack", host)


def failed(machine: int, host: str, *failures: RankFailure) -> Verdict:
    return Verdict(Ending.FAILED, machine, host, failures, 6)


class Machines:
    """The other machines of a run as their keys in a store, and machine 0's look at them at any time."""

    def __init__(self, job: Job = JOB) -> None:
        self.store: Any = dist.HashStore()
        self.notes: list[str] = []
        self.others = Others(self.store, job, "alpha", self.notes.append)
        for rank, host in ((1, "beta"), (2, "gamma")):
            self.store.set(f"facts/{rank}", json.dumps({"host": host, "facts": {}}))
            self.beat(rank)

    def beat(self, *ranks: int) -> None:
        for rank in ranks:
            self.store.add(beat_key(rank), 1)

    def report(self, verdict: Verdict) -> None:
        self.store.set(report_key(verdict.machine_rank), verdict.pack())

    def look(self, now: float, own: Verdict | None = None) -> Verdict | None:
        return self.others.look(now, own)


# --- who was first -----------------------------------


def test_a_machine_is_lost_after_the_timeout_and_not_before() -> None:
    machines = Machines()
    assert machines.look(0) is None
    machines.beat(1, 2)
    assert machines.look(TIMEOUT - 1) is None
    machines.beat(1)
    verdict = machines.look(2 * TIMEOUT)
    assert verdict is not None
    assert (verdict.ending, verdict.machine_rank, verdict.host, verdict.status) == (Ending.LOST, 2, "gamma", 1)
    assert "Nothing was heard of it for 60 s (--health_timeout)" in verdict.words


def test_a_machine_that_has_ended_well_may_be_silent() -> None:
    machines = Machines()
    machines.look(0)
    machines.store.set(ended_key(1), "")
    machines.beat(2)
    assert machines.look(TIMEOUT - 1) is None
    machines.beat(2)
    assert machines.look(5 * TIMEOUT) is None
    machines.store.set(ended_key(2), "")
    assert machines.others.all_ended()


def test_what_was_missed_while_machine_0_was_stopped_is_nobodys_silence() -> None:
    machines = Machines()
    machines.look(0)
    machines.others.forgive(10 * TIMEOUT)
    assert machines.look(10 * TIMEOUT + 1) is None


def test_the_first_failure_is_waited_for_and_found_over_all_machines() -> None:
    machines = Machines()
    machines.look(0)
    machines.report(failed(1, "beta", error(2, 10.0, "beta")))
    assert machines.look(1) is None, "the others may have something to say"
    machines.report(failed(2, "gamma", error(5, 9.0, "gamma"), crash(4, 10.5, "gamma")))
    verdict = machines.look(2, own=failed(0, "alpha", error(0, 9.5, "alpha")))
    assert verdict is not None, "all have said it"
    assert (verdict.machine_rank, verdict.host, verdict.status) == (2, "gamma", 128 + signal.SIGSEGV)
    assert [failure.rank for failure in verdict.failures] == [4, 5, 0, 2]


def test_those_who_say_nothing_are_not_waited_for_long() -> None:
    machines = Machines()
    machines.look(0)
    machines.report(failed(1, "beta", error(2, 10.0, "beta")))
    assert machines.look(1) is None
    machines.beat(2)
    verdict = machines.look(2 + SETTLE_SECONDS)
    assert verdict is not None and verdict.failures[0].rank == 2


def test_a_request_to_end_one_machine_ends_the_run() -> None:
    machines = Machines()
    machines.look(0)
    machines.report(Verdict(Ending.SIGNALLED, 2, "gamma", signal_number=signal.SIGINT))
    verdict = machines.look(1)
    assert verdict is not None and (verdict.machine_rank, verdict.status) == (2, 130)


def test_a_run_that_may_goes_on_without_the_lost_one() -> None:
    machines = Machines(replace(JOB, max_restarts=2, meeting=replace(JOB.meeting, min_machines=2)))
    machines.look(0)
    machines.beat(1)
    assert machines.look(2 * TIMEOUT) is None
    assert machines.others.regrouped() and not machines.others.regrouped()
    assert machines.notes == [
        "machine 2 (gamma) is lost: Nothing was heard of it for 60 s (--health_timeout). Look at that machine, and at "
        "the network between it and the others. 2 of 3 machines go on."
    ]
    machines.beat(1, 2)
    assert machines.look(2 * TIMEOUT + 1) is None
    assert machines.notes[1:] == ["machine 2 (gamma) is back."]
    machines.beat(2)
    assert machines.look(4 * TIMEOUT) is None and machines.others.regrouped()
    verdict = machines.look(6 * TIMEOUT)
    assert verdict is not None, "one machine is too few"


def test_a_verdict_says_the_same_everywhere() -> None:
    verdict = first_of([failed(1, "beta", error(3, 2.0, "beta")), failed(0, "alpha", error(0, 1.0, "alpha"))])
    assert Verdict.unpack(verdict.pack()) == verdict
    console = Console(record=True, width=100)
    verdict.print(console)
    text = console.export_text()
    assert "rank 0 of 6 on alpha failed (exit code 1)" in text
    assert "rank 3 on beta failed too (exit code 1): RuntimeError: of rank 3" in text


# --- machines that differ -----------------------------------


def facts(program: Path, **settings: Any) -> Mapping[str, Any]:
    asked = {
        "mentions": {name: [[value, "file", "run.yaml, line 1"]] for name, value in settings.items()},
        "json": {"data": {"zero_optimization": {"stage": 3}}},
    }
    versions = {"shardwise": "1.0", "torch": "2.11", "python": "3.11"}
    return facts_of(replace(JOB, program=str(program)), json.dumps(asked), versions)


def test_what_differs_is_named_and_what_may_differ_is_not(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("1")
    other.write_text("2")
    first = facts(one, mixed_precision="bf16", machine_rank=0, gpu_ids="0", deepspeed_hostfile="a")
    assert list(differences(first, facts(one, mixed_precision="bf16", machine_rank=1, deepspeed_hostfile="b"))) == []
    second = {**facts(other, mixed_precision="no"), "torch": "2.12", "DeepSpeed JSON's zero_optimization.stage": 2}
    assert list(differences(first, second)) == [
        "torch 2.12 instead of 2.11",
        "another text in the script",
        'setting mixed_precision "no" instead of "bf16"',
        "DeepSpeed JSON's zero_optimization.stage 2 instead of 3",
    ]
    assert set(versions_here()) == {"shardwise", "torch", "python"}


def gather(count: int, told: Mapping[int, Mapping[str, Any]], patience: float = 60) -> dict[int, Exception | None]:
    """What `come_together` says on each machine, all of them in one process."""
    port = free_port()
    ends: dict[int, Exception | None] = {}
    stores, runs = [], []

    def one(rank: int) -> None:
        try:
            meeting = Meeting(count, rank, "127.0.0.1", port)
            stores.append(come_together(meeting, f"host{rank}", told[rank], patience))
            runs.append(run_id(stores[-1]))
            ends[rank] = None
        except (Misfit, StateError) as problem:
            ends[rank] = problem

    threads = [threading.Thread(target=one, args=(rank,)) for rank in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(runs)) <= 1, "machines that have come together know the run by one name"
    return ends


def test_machines_that_fit_come_together() -> None:
    assert gather(3, {rank: {"torch": "2.11"} for rank in (0, 1, 2)}) == {0: None, 1: None, 2: None}


def test_every_machine_says_which_one_does_not_fit() -> None:
    told: dict[int, dict[str, Any]] = {0: {"torch": "2.11"}, 1: {"torch": "2.11"}, 2: {"torch": "2.12"}}
    words = "Machine 2 (host2) does not fit machine 0 (host0): it has torch 2.12 instead of 2.11. "
    assert {str(problem).startswith(words) for problem in gather(3, told).values()} == {True}


def test_every_machine_says_what_keeps_one_from_its_part() -> None:
    told = {0: {"torch": "2.11"}, 1: {"error": "No script 'train.py' in /work."}}
    assert {str(problem) for problem in gather(2, told).values()} == {
        "Machine 1 (host1): No script 'train.py' in /work."
    }


def test_a_machine_0_that_cannot_do_its_part_is_named_by_all() -> None:
    told = {0: {"error": "No GPU."}, 1: {"torch": "2.11"}, 2: {"torch": "2.12"}}
    assert {str(problem) for problem in gather(3, told).values()} == {"Machine 0 (host0): No GPU."}


def test_those_that_do_not_come_are_named() -> None:
    problem = gather(3, {0: {"torch": "2.11"}}, patience=0.5)[0]
    assert "has not met the others at 127.0.0.1" in str(problem) and "machine 1, machine 2 did not come." in str(
        problem
    )
