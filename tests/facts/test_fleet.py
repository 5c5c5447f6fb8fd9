"""The fear: settings name other machines, or other numbers of processes on them, than the run gets."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.run.file import file_mentions, flag_mentions, read_run_file
from shardwise.config.run.precedence import resolve
from shardwise.config.run.resolved import Resolved
from shardwise.config.run.said import Asked
from shardwise.errors import ConfigError
from shardwise.launch.hosts import Fleet, fleet_from, own_rank
from shardwise.launch.job import LaunchRequest, Meeting
from shardwise.launch.wishes import Program, idle_settings, meeting_notes, request_from

PDSH = ("pdsh", {"alpha": [0, 1, 2, 3], "beta": [0, 1, 2, 3]})


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("alpha slots=4\nbeta slots=4\n")
    return str(path)


def resolved(flags: dict[str, Any], yaml: str = "", at: Path | None = None) -> Resolved:
    mentions: dict[str, Any] = {}
    if at is not None:
        (at / "run.yaml").write_text(yaml)
        mentions = {name: (said,) for name, said in file_mentions(read_run_file(at / "run.yaml")).items()}
    named = {f"deepspeed_{name}" if name in SHORT else name: value for name, value in flags.items()}
    return resolve(Asked(mentions).stronger(flag_mentions(named)))


SHORT = ("hostfile", "inclusion_filter", "exclusion_filter", "multinode_launcher")


def fleet(flags: dict[str, Any], yaml: str = "", at: Path | None = None, **environ: str) -> Fleet | None:
    return fleet_from(resolved(flags, yaml, at).values, environ)


def shown(found: Fleet | None) -> tuple[str, dict[str, list[int]]] | None:
    return found and (found.launcher, {host.name: list(host.slots) for host in found.hosts})


# --- machines and their slots -----------------------------------


def test_a_hostfile_is_all_that_it_takes(hostfile: str) -> None:
    assert shown(fleet({"hostfile": hostfile})) == PDSH


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"num_processes": 8}, {"alpha": [0, 1, 2, 3], "beta": [0, 1, 2, 3]}),
        ({"num_processes": 4}, {"alpha": [0, 1], "beta": [0, 1]}),
        ({"num_machines": 2}, {"alpha": [0, 1, 2, 3], "beta": [0, 1, 2, 3]}),
        ({"inclusion_filter": "alpha@beta:0,2"}, {"alpha": [0, 1, 2, 3], "beta": [0, 2]}),
        ({"inclusion_filter": "alpha@beta:0,2", "num_processes": 6}, {"alpha": [0, 1, 2, 3], "beta": [0, 2]}),
        ({"exclusion_filter": "alpha:1"}, {"alpha": [0, 2, 3], "beta": [0, 1, 2, 3]}),
        ({"inclusion_filter": "beta"}, {"beta": [0, 1, 2, 3]}),
    ],
)
def test_numbers_and_filters_choose_from_it(hostfile: str, flags: dict[str, Any], expected: dict[str, Any]) -> None:
    found = fleet({"hostfile": hostfile, **flags})
    assert shown(found) == ("pdsh", expected)
    assert found is not None and found.notes == ()


def test_a_yaml_of_accelerates_may_say_less_than_the_filters(hostfile: str, tmp_path: Path) -> None:
    yaml = (
        f"num_processes: 8\ndeepspeed_config:\n  deepspeed_hostfile: {hostfile}\n  deepspeed_inclusion_filter: beta\n"
    )
    found = fleet({}, f"num_machines: 1\n{yaml}", tmp_path)
    assert found is None, "one machine is this one"
    found = fleet({}, yaml, tmp_path)
    assert shown(found) == ("pdsh", {"beta": [0, 1, 2, 3]})
    assert found is not None and "the filter chooses 4 slots, and so many run" in found.notes[0]


def test_fewer_machines_are_the_first(hostfile: str) -> None:
    Path(hostfile).write_text("alpha slots=4\nbeta slots=4\ngamma slots=4\n")
    found = fleet({"hostfile": hostfile, "num_machines": 2})
    assert shown(found) == PDSH and found is not None
    assert found.notes == ("num_machines is 2 (--num_machines): of the 3 machines the first are used.",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_machines": 3}, "num_machines is 3 .*but the hostfile and its filters name 2"),
        ({"num_processes": 5}, "num_processes is 5 .*expected 8, the slots of the hostfile"),
        ({"num_processes": 10}, "alpha has slots=4"),
        ({"inclusion_filter": "alpha", "num_processes": 8}, "but the filter chooses 4 slots. Leave one"),
        ({"inclusion_filter": "alpha", "exclusion_filter": "beta"}, "Give one of them"),
        ({"multinode_launcher": "standard"}, "standard, which is you: no list of machines is read"),
        ({"hostfile": "/nowhere"}, "/nowhere.*cannot be read"),
        ({"hostfile": "~nobody-has-this-home/hosts"}, "cannot be read: Could not determine home"),
        ({"hostfile": "a\0b"}, "cannot be read: embedded null byte"),
    ],
)
def test_what_does_not_fit_the_hostfile_is_refused(hostfile: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fleet({"hostfile": hostfile, **flags})


@pytest.mark.parametrize("launcher", ["pdsh", "ssh", "openmpi", "mpich", "mvapich", "impi", "nossh"])
def test_a_launcher_without_a_list_is_refused_with_the_ways_to_go(launcher: str) -> None:
    several = {"num_machines": 2, "num_processes": 4, "multinode_launcher": launcher}
    with pytest.raises(ConfigError, match=r"needs a list of the .*--deepspeed_hostfile.*--machine_rank"):
        fleet(several)
    assert fleet({"multinode_launcher": launcher}) is None  # one machine needs no launcher


# --- Slurm -----------------------------------


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)


@pytest.mark.usefixtures("scontrol")
def test_an_allocation_is_a_list_of_machines() -> None:
    flags = {"multinode_launcher": "slurm", "num_processes": 4}
    assert shown(fleet(flags, SLURM_JOB_NODELIST="node[1-2]")) == ("slurm", {"node1": [0, 1], "node2": [0, 1]})
    with pytest.raises(ConfigError, match="num_processes is 3"):
        fleet({**flags, "num_processes": 3}, SLURM_JOB_NODELIST="node[1-2]")
    with pytest.raises(ConfigError, match="Give --num_processes"):
        fleet({"multinode_launcher": "slurm"}, SLURM_JOB_NODELIST="node[1-2]")
    with pytest.raises(ConfigError, match=r"num_machines is 3 .*allocation has 2"):
        fleet({**flags, "num_machines": 3, "num_processes": 6}, SLURM_JOB_NODELIST="node[1-2]")
    with pytest.raises(ConfigError, match=r"`scontrol show hostnames x` fails"):
        fleet(flags, SLURM_JOB_NODELIST="x")


def test_slurm_without_an_allocation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no allocation of Slurm's. .*--slurm-script"):
        fleet({"multinode_launcher": "slurm", "num_processes": 4})


# --- where they meet -----------------------------------


def request(flags: dict[str, Any], min_machines: int | None = None, **more: Any) -> LaunchRequest:
    settings = resolved(flags | more)
    program = Program("train.py", min_machines=min_machines)
    return request_from(settings, program, fleet_from(settings.values, {}))


def test_they_meet_at_the_first_machine_or_where_it_was_said(hostfile: str) -> None:
    assert request({"hostfile": hostfile}).meeting == Meeting(2, 0, "alpha", 29500, "static")
    said = {"hostfile": hostfile, "main_process_ip": "10.0.0.9", "main_process_port": 4, "rdzv_backend": "c10d"}
    assert request(said).meeting == Meeting(2, 0, "10.0.0.9", 4, "c10d")
    Path(hostfile).write_text("localhost slots=1\nbeta slots=1\n")
    with pytest.raises(ConfigError, match="where the others would look for it on themselves"):
        request({"hostfile": hostfile})


def test_restarts_need_machines_that_can_meet_again(hostfile: str, tmp_path: Path) -> None:
    assert request({"hostfile": hostfile}, max_restarts=1).meeting.backend == "c10d"
    with pytest.raises(ConfigError, match="by which machines meet only once"):
        request({"hostfile": hostfile, "rdzv_backend": "static"}, max_restarts=1)
    of_file = resolved({"hostfile": hostfile}, "rdzv_backend: static\nmax_restarts: 1\n", tmp_path)
    wanted = request_from(of_file, Program("train.py"), fleet_from(of_file.values, {}))
    assert wanted.meeting.backend == "c10d"
    assert ["machines meet by c10d" in note for note in meeting_notes(of_file, wanted)] == [True]


def test_fewer_machines_need_a_restart(hostfile: str) -> None:
    by_ssh = {"hostfile": hostfile, "multinode_launcher": "ssh"}
    assert request(by_ssh, max_restarts=1, min_machines=1).meeting.min_machines == 1
    with pytest.raises(ConfigError, match="pdsh does not let a run go on when it loses one"):
        request({"hostfile": hostfile}, max_restarts=1, min_machines=1)
    assert request({"hostfile": hostfile}, max_restarts=1, min_machines=2).meeting.min_machines is None
    with pytest.raises(ConfigError, match="Give --max_restarts"):
        request({"hostfile": hostfile}, min_machines=1)
    with pytest.raises(ConfigError, match="and there are 2"):
        request({"hostfile": hostfile}, max_restarts=1, min_machines=3)


def test_without_a_launcher_a_machine_finds_itself(hostfile: str) -> None:
    rank = resolved({"hostfile": hostfile}).values["machine_rank"]
    found = fleet({"hostfile": hostfile, "multinode_launcher": "nossh"})
    assert found is not None
    with pytest.raises(ConfigError, match=f"has no machine {socket.gethostname()}.*--machine_rank"):
        own_rank(found.hosts, rank)
    assert own_rank(found.hosts, resolved({"hostfile": hostfile, "machine_rank": 1}).values["machine_rank"]) == 1
    with pytest.raises(ConfigError, match="machine_rank is 2"):
        own_rank(found.hosts, resolved({"hostfile": hostfile, "machine_rank": 2}).values["machine_rank"])
    Path(hostfile).write_text(f"alpha slots=4\n{socket.gethostname().partition('.')[0]} slots=4\n")
    found = fleet({"hostfile": hostfile, "multinode_launcher": "nossh"})
    assert found is not None and own_rank(found.hosts, rank) == 1


def test_lists_that_nobody_reads_are_noted(hostfile: str) -> None:
    notes = list(idle_settings(resolved({"hostfile": hostfile, "num_machines": 1})))
    assert len(notes) == 1 and "has no effect: num_machines is 1 (--num_machines)" in notes[0]
    notes = list(idle_settings(resolved({"inclusion_filter": "alpha"})))
    assert len(notes) == 1 and "there is no deepspeed_hostfile" in notes[0]
    assert list(idle_settings(resolved({"hostfile": hostfile}))) == []


# --- the command -----------------------------------


def test_a_dry_run_of_64_machines_loads_no_torch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"worker-{i} slots=8\n" for i in range(64)))
    script = tmp_path / "train.py"
    script.touch()
    code = "import sys; from shardwise.commands.main import app\ntry: app()\nfinally: print('torch' in sys.modules)"
    options = ["launch", "--deepspeed_hostfile", str(hosts), "--deepspeed_multinode_launcher", "ssh", "--dry_run"]
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, *options, str(script)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "False", "a second of start-up"
    assert sum(line.startswith("ssh ") for line in lines) == 64
    assert lines[63] == "machine 63: worker-63, 8 process(es), slots 0,1,2,3,4,5,6,7"
