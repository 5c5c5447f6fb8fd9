"""The fear: machines that train side by side without knowing of each other, or a device that nobody chose."""

import json
import shutil
import socket
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import shardwise
from shardwise.config.run.file import file_mentions, flag_mentions, read_run_file
from shardwise.config.run.precedence import resolve
from shardwise.config.run.said import Asked
from shardwise.errors import ConfigError, StateError
from shardwise.launch import runner
from shardwise.launch.environment import rank_environment
from shardwise.launch.job import Device, Job, LaunchRequest, Meeting, notes_on, resolve_job
from shardwise.launch.machine import Machine
from shardwise.launch.wishes import Program, request_from
from tests.front.command import FIXTURES, SHARDWISE, plain_environment

SCRIPT = str(FIXTURES / "report.py")
LAPTOP = Machine(num_cores=8, num_gpus=0)
SERVER = Machine(num_cores=32, num_gpus=4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


PORT = free_port()  # one that no other job of this machine listens on
TWO = {"num_machines": 2, "num_processes": 4, "main_process_ip": "10.0.0.1", "main_process_port": PORT}


def request(
    flags: dict[str, Any] | None = None, yaml: str | None = None, gpu_flag: str | None = None, at: Path = Path()
) -> LaunchRequest:
    asked = Asked()
    if yaml is not None:
        path = at / "run.yaml"
        path.write_text(yaml)
        asked = Asked({name: (said,) for name, said in file_mentions(read_run_file(path)).items()})
    return request_from(resolve(asked.stronger(flag_mentions(flags or {}))), Program(name=SCRIPT, gpu_flag=gpu_flag))


# --- several machines -----------------------------------


@pytest.mark.world
@pytest.mark.parametrize("backend", ["static", pytest.param("c10d", marks=pytest.mark.slow)])
def test_ranks_of_two_machines_are_one_world(tmp_path: Path, backend: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    config = tmp_path / "run.yaml"
    config.write_text(
        "distributed_type: MULTI_CPU\nnum_machines: 2\nnum_processes: 4\nmain_process_ip: 127.0.0.1\n"
        f"main_process_port: {free_port()}\nrdzv_backend: {backend}\n"
    )
    options = ["launch", "--config_file", str(config), "--num_cpu_threads_per_process", "1", "--machine_rank"]
    machines = [
        subprocess.Popen(
            [*SHARDWISE, *options, str(rank), str(FIXTURES / "all_reduce.py"), str(out)],
            env=plain_environment(tmp_path),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)  # the first may have to wait for machine 0
    ]
    errors = [machine.communicate()[1] for machine in machines]

    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(errors)
    reports = [json.loads((out / f"{rank}.json").read_text()) for rank in range(4)]
    assert [report["sum"] for report in reports] == [1111.0] * 4
    assert {report["WORLD_SIZE"] for report in reports} == {"4"}
    assert {report["LOCAL_WORLD_SIZE"] for report in reports} == {"2"}
    assert [report["LOCAL_RANK"] for report in reports] == ["0", "1", "0", "1"]
    assert [report["GROUP_RANK"] for report in reports] == ["0", "0", "1", "1"]


@pytest.mark.world
@pytest.mark.slow
def test_machines_that_differ_are_named_before_anything_starts(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(Path(shardwise.__file__).parent, other / "shardwise", ignore=shutil.ignore_patterns("__pycache__"))
    start = other / "shardwise" / "__init__.py"
    start.write_text(start.read_text().replace(f'"{shardwise.__version__}"', '"0.0.9"'))
    out = tmp_path / "out"
    out.mkdir()
    common = [*SHARDWISE, "launch", "--cpu", "--num_machines", "2", "--num_processes", "2", "--main_process_port"]
    common += [str(free_port()), "--main_process_ip", "127.0.0.1", "--machine_rank"]
    script = [str(FIXTURES / "all_reduce.py"), str(out)]
    machines = [
        subprocess.Popen(
            [*common, str(rank), *own, *script],
            env=plain_environment(tmp_path, **variables),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own, variables in (
            (0, ["--zero_stage", "3"], {}),
            (1, ["--zero_stage", "2"], {"PYTHONPATH": str(other)}),
        )
    ]
    screens = [machine.communicate()[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [2, 2], screens
    name = socket.gethostname()
    words = (
        f"Machine 1 ({name}) does not fit machine 0 ({name}): it has shardwise 0.0.9 instead of "
        f"{shardwise.__version__}; setting zero_stage 2 instead of 3. Make them alike, and start all again."
    )
    for screen in screens:
        assert words in screen
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("backend", ["static", "c10d"])
@pytest.mark.parametrize("machine_rank", [0, 1])
def test_a_machine_that_meets_nobody_says_where_it_looked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, machine_rank: int
) -> None:
    monkeypatch.setattr(runner, "MEETING_SECONDS", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flags = TWO | {"main_process_ip": "127.0.0.1", "main_process_port": free_port(), "machine_rank": machine_rank}
    job = resolve_job(request({**flags, "rdzv_backend": backend}), LAPTOP)
    words = f"Machine {machine_rank} of 2 has not met the others at 127.0.0.1:{job.meeting.port}"
    with pytest.raises(StateError, match=words):
        runner.run(job, "{}", Console())


@pytest.mark.parametrize(
    ("flags", "backend"),
    [
        ({}, "static"),
        ({"rdzv_backend": "c10d"}, "c10d"),
        ({"same_network": False}, "c10d"),
        ({"same_network": False, "rdzv_backend": "static"}, "static"),
        ({"deepspeed_multinode_launcher": "standard"}, "static"),
    ],
)
def test_machines_meet_by_what_was_said(flags: dict[str, Any], backend: str) -> None:
    meeting = request({**TWO, "machine_rank": 1, **flags}).meeting
    assert meeting == Meeting(num_machines=2, machine_rank=1, address="10.0.0.1", port=PORT, backend=backend)


def test_processes_are_counted_over_all_machines() -> None:
    job = resolve_job(request({**TWO, "num_processes": 8}), SERVER)
    assert (job.num_processes, job.num_local_processes, job.num_threads_per_process) == (8, 4, 8)
    with pytest.raises(ConfigError, match="--num_processes is 10, 5 of them on this machine, but torch sees 4"):
        resolve_job(request({**TWO, "num_processes": 10}), SERVER)


def test_what_machines_need_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as found:
        request({"num_machines": 3})
    for words in ("how many processes", "--main_process_ip", "--main_process_port"):
        assert words in str(found.value)


def test_numbers_from_two_places_must_fit(tmp_path: Path) -> None:
    yaml = f"num_machines: 2\nnum_processes: 4\nmain_process_ip: 10.0.0.1\nmain_process_port: {PORT}\n"
    assert request({"machine_rank": 1}, yaml, at=tmp_path).meeting.machine_rank == 1
    with pytest.raises(ConfigError, match=r"machine_rank is 2 \(--machine_rank\), expected less than .*line 1"):
        request({"machine_rank": 2}, yaml, at=tmp_path)
    with pytest.raises(ConfigError, match=r"num_processes is 3 \(--num_processes\), expected a multiple"):
        request({"num_processes": 3}, yaml, at=tmp_path)
    with pytest.raises(ConfigError, match=r"machine_rank is 1 .*expected less than num_machines, which is 1"):
        request({}, "machine_rank: 1\n", at=tmp_path)


def test_only_machine_0_needs_its_port_free() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        flags = TWO | {"main_process_port": taken.getsockname()[1]}
        resolve_job(request({**flags, "machine_rank": 1}), LAPTOP)
        with pytest.raises(ConfigError, match=r"cannot be used.*the same on every machine"):
            resolve_job(request(flags), LAPTOP)


# --- the device -----------------------------------


def device_of(job: Job) -> tuple[Device, int]:
    return job.device, job.num_processes


@pytest.mark.parametrize(
    ("yaml", "machine", "expected"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 3\n", SERVER, (Device.CPU, 3)),
        ("use_cpu: true\n", SERVER, (Device.CPU, 2)),
        ("distributed_type: NO\n", SERVER, (Device.GPU, 1)),
        ("distributed_type: NO\n", LAPTOP, (Device.CPU, 1)),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\n", SERVER, (Device.GPU, 2)),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\n", LAPTOP, (Device.CPU, 2)),
        ("distributed_type: DEEPSPEED\nnum_processes: 2\n", LAPTOP, (Device.CPU, 2)),
        ("gpu_ids: 1,3\n", SERVER, (Device.GPU, 2)),
        ("gpu_ids: all\n", SERVER, (Device.GPU, 4)),
        ("gpu_ids: 0\nuse_cpu: true\n", SERVER, (Device.CPU, 2)),
    ],
)
def test_a_yaml_chooses_the_device(tmp_path: Path, yaml: str, machine: Machine, expected: tuple[Device, int]) -> None:
    assert device_of(resolve_job(request({}, yaml, at=tmp_path), machine)) == expected


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("distributed_type: MULTI_GPU\nnum_processes: 2\n", 'distributed_type is "MULTI_GPU" ('),
        ("gpu_ids: 0,1\nnum_processes: 2\n", 'gpu_ids is "0,1" ('),
        ("use_cpu: false\nnum_processes: 2\n", "use_cpu is false ("),
    ],
)
def test_a_yaml_from_a_machine_with_gpus_says_on_a_laptop_what_it_does(tmp_path: Path, yaml: str, words: str) -> None:
    asked = request({}, yaml, at=tmp_path)
    (note,) = notes_on(asked, resolve_job(asked, LAPTOP))
    assert words in note and "line 1" in note
    assert "uses the CPU with gloo, in 2 processes" in note
    assert notes_on(asked, resolve_job(asked, SERVER)) == ()
    chosen = request({"use_cpu": True}, yaml, at=tmp_path)
    assert notes_on(chosen, resolve_job(chosen, LAPTOP)) == ()


def test_more_processes_than_gpus_are_refused_with_the_place_where_they_were_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_processes \(.*run\.yaml, line 1\) is 8, but torch sees 4 CUDA device"):
        resolve_job(request({}, "num_processes: 8\n", at=tmp_path), SERVER)


def test_one_process_and_several_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is one process, but num_processes is 4"):
        request({}, "distributed_type: NO\nnum_processes: 4\n", at=tmp_path)
    assert request({"num_processes": 4}, "distributed_type: NO\n", at=tmp_path).num_processes == 4


@pytest.mark.parametrize("flag", ["--gpu", "--multi_gpu"])
def test_a_flag_that_insists_on_gpus_is_named_where_there_are_none(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} was given, but torch sees no CUDA device"):
        resolve_job(request(gpu_flag=flag), LAPTOP)


def test_gpu_ids_are_the_devices_that_ranks_see() -> None:
    job = resolve_job(request({"gpu_ids": "1, 3"}), SERVER)
    assert device_of(job) == (Device.GPU, 2)
    assert rank_environment(job, {}, Path("asked.json"))["CUDA_VISIBLE_DEVICES"] == "1,3"


@pytest.mark.parametrize(
    ("flags", "machine", "words"),
    [
        ({"gpu_ids": "0"}, LAPTOP, "--gpu_ids was given, but torch sees no CUDA device"),
        ({"gpu_ids": "0,0"}, SERVER, "a GPU is named twice"),
        ({"gpu_ids": "0,x"}, SERVER, 'names GPU "x", but torch sees 4'),
        ({"gpu_ids": "0,9"}, SERVER, 'names GPU "9".*: 0, 1, 2, 3'),
        ({"gpu_ids": "0"}, replace(SERVER, visible_gpus=("2", "3")), "CUDA_VISIBLE_DEVICES is set"),
        ({"gpu_ids": "0,1", "num_processes": 3}, SERVER, "gpu_ids names 2"),
        ({"gpu_ids": "0,1", "use_cpu": True}, SERVER, "use_cpu is true .*but --gpu_ids was given"),
    ],
)
def test_gpu_ids_that_cannot_be_used_are_refused(flags: dict[str, Any], machine: Machine, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_job(request(flags), machine)
