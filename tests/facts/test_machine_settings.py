"""The fear: a setting of several machines that means one thing as an answer, and another as a flag or in a file."""

import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardwise.commands.launch_options import given
from shardwise.config.run.file import file_mentions, flag_mentions, read_run_file
from shardwise.config.run.precedence import resolve
from shardwise.config.run.said import Asked
from shardwise.config.source import Source
from shardwise.errors import ConfigError
from shardwise.launch.hosts import Fleet, fleet_from
from shardwise.launch.job import FaultPolicy, LaunchRequest, Meeting
from shardwise.launch.machine import Machine
from shardwise.launch.wishes import Program, request_from
from shardwise.questionnaire.answers_file import answered
from shardwise.questionnaire.questions import questions
from shardwise.questionnaire.run_file import as_run, as_text

SETTINGS: dict[str, Any] = {
    "num_machines": 2,
    "machine_rank": 1,
    "main_process_ip": "10.0.0.1",
    "main_process_port": 29400,
    "same_network": False,
    "rdzv_backend": "c10d",
    "max_restarts": 3,
    "monitor_interval": 0.5,
    "num_processes": 8,
}
LEADS = {"machine_type": "MULTI_CPU", "use_deepspeed": True}


def from_answers(at: Path, answers: dict[str, Any]) -> Asked:
    asked = questions(Machine(num_cores=8, num_gpus=0))
    text = as_text(as_run(answered(asked, Source("answers", LEADS | answers))), at / "run.yaml")
    (at / "run.yaml").write_text(text)
    return Asked({name: (said,) for name, said in file_mentions(read_run_file(at / "run.yaml")).items()})


def outcome(asked: Asked) -> tuple[LaunchRequest, Fleet | None]:
    settings = resolve(asked)
    fleet = fleet_from(settings.values, {})
    request = request_from(settings, Program("train.py"), fleet)
    return replace(request, places={}, device=None), fleet


def test_by_hand_each_setting_arrives_from_each_place(tmp_path: Path) -> None:
    by_answers = outcome(from_answers(tmp_path, SETTINGS))
    by_flags = outcome(Asked().stronger(flag_mentions(SETTINGS | {"zero_stage": 2})))
    assert by_answers == by_flags
    request, fleet = by_flags
    assert fleet is None
    assert request.meeting == Meeting(2, 1, "10.0.0.1", 29400, "c10d")
    assert (request.max_restarts, request.num_processes) == (3, 8)
    assert request.faults == FaultPolicy(monitor_interval_seconds=0.5)


@pytest.mark.parametrize(
    ("lead", "filter", "slots"),
    [
        ("use_exclusion_filter", {"deepspeed_exclusion_filter": "beta:0,1"}, {"alpha": (0, 1, 2, 3), "beta": (2, 3)}),
        ("use_inclusion_filter", {"deepspeed_inclusion_filter": "beta@alpha:2"}, {"alpha": (2,), "beta": (0, 1, 2, 3)}),
    ],
)
def test_a_hostfile_and_its_filters_arrive_from_each_place(
    tmp_path: Path, lead: str, filter: dict[str, str], slots: dict[str, tuple[int, ...]]
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("alpha slots=4\nbeta slots=4\n")
    own = {"deepspeed_multinode_launcher": "mpich", "deepspeed_hostfile": str(hostfile), **filter}
    common = SETTINGS | own | {"machine_rank": 0, "num_processes": sum(map(len, slots.values()))}
    by_answers = outcome(from_answers(tmp_path, common | {lead: True}))
    assert by_answers == outcome(Asked().stronger(flag_mentions(common | {"zero_stage": 2})))
    fleet = by_answers[1]
    assert fleet is not None and fleet.launcher == "mpich"
    assert {host.name: host.slots for host in fleet.hosts} == slots


def test_a_file_of_defaults_has_no_key_that_accelerate_refuses(tmp_path: Path) -> None:
    own = {"max_restarts": 0}
    from_answers(tmp_path, {key: value for key, value in SETTINGS.items() if key != "monitor_interval"} | own)
    text = (tmp_path / "run.yaml").read_text()
    assert "num_machines: 2" in text and "max_restarts" not in text and "monitor_interval" not in text


def test_the_health_timeout_is_a_setting_as_the_others(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("health_timeout: 7\n")
    mentions = {name: (said,) for name, said in file_mentions(read_run_file(path)).items()}
    assert outcome(Asked(mentions))[0].faults.timeout_seconds == 7
    assert outcome(Asked(mentions).stronger(flag_mentions({"health_timeout": 3.5})))[0].faults.timeout_seconds == 3.5


def test_any_settings_are_a_run_or_a_config_error(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=3\n")
    right: dict[str, Any] = {name: str(value) for name, value in SETTINGS.items() if name != "same_network"} | {
        "deepspeed_hostfile": str(hostfile),
        "deepspeed_inclusion_filter": "a",
        "deepspeed_exclusion_filter": "b:1",
        "deepspeed_multinode_launcher": "ssh",
        "health_timeout": "9",
    }
    pieces = [*"ab@:,012~/\0é٣ \n=#-{['\"\\", "$(x)", "%n", "null", "yes", "1e9", "9" * 30, "slots=", str(hostfile)]
    chance = random.Random(20240302)
    runs = 0
    for _ in range(2_000):
        names = chance.sample(sorted(right), chance.randrange(8))
        wild = {name: "".join(chance.choices(pieces, k=chance.randrange(5))) for name in names if chance.random() < 0.2}
        flags = given({name: wild.get(name, right[name]) for name in names})
        with suppress(ConfigError):
            outcome(Asked().stronger(flag_mentions(flags)))
            runs += 1
    assert 200 < runs < 1_800, "the settings are too wild or too tame to say much"
