"""The fear: a word of the user's reaches another machine changed, split or executed, or a secret goes along."""

import json
import random
import re
import shlex
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwise.errors import ConfigError
from shardwise.launch import node, starters
from shardwise.launch.capsule import Capsule, packed
from shardwise.launch.cluster_files import ClusterRun, ManifestKind, manifest, sbatch_script
from shardwise.launch.hostfile import Host
from shardwise.launch.job import Device, FaultPolicy, LaunchRequest, Meeting, ProgramKind
from shardwise.launch.starters import STARTERS, Start
from shardwise.launch.variables import forwarded, users_variables

NASTY = [
    "a b",
    "it's",
    'say "hi"',
    "$(touch executed)",
    "`touch executed`",
    "$HOME",
    "%n %h %%",
    "!x",
    "a\nb",
    "\\",
    "ü…",
    "",
]
HOSTS = (Host("alpha", (0, 1)), Host("beta", (0, 2)))
REQUEST = LaunchRequest(
    program="my train.py",
    arguments=tuple(NASTY),
    kind=ProgramKind.SCRIPT,
    device=Device.GPU,
    meeting=Meeting(2, 0, "alpha", 29500, "static"),
    faults=FaultPolicy(timeout_seconds=7.0),
)
CAPSULE = Capsule(HOSTS, REQUEST, '{"mentions": {}}', "/work/my dir", {"NCCL_DEBUG": "it's $(x) %n"})


# --- the capsule -----------------------------------


def test_a_capsule_comes_out_as_it_went_in() -> None:
    assert Capsule.unpack(CAPSULE.pack()) == CAPSULE


def test_each_machine_gets_its_own_slots() -> None:
    first, second = (CAPSULE.request_of(rank) for rank in (0, 1))
    assert (first.num_processes, first.num_local_processes, first.gpu_ids) == (4, 2, ())
    assert (second.num_local_processes, second.gpu_ids, second.meeting.machine_rank) == (2, ("0", "2"), 1)


def test_no_shell_finds_anything_in_a_capsule() -> None:
    chance = random.Random(1)
    signs = [*string.printable, "\x00", "é", "\u2028", "😀"]
    for _ in range(2_000):
        words = ["".join(chance.choices(signs, k=chance.randrange(12))) for _ in range(3)]
        text = packed(words)
        assert json.loads(text) == words
        assert re.fullmatch(r'(?:[A-Za-z0-9 _.,:/+=@{}\[\]"-]|\\u[0-9a-f]{4})*', text), text


# --- command lines -----------------------------------


def parts_of(start: Start) -> list[list[str]]:
    """The arguments for `node` in a command line that passes vectors."""
    found = []
    vector = list(start.vector)
    for i, word in enumerate(vector):
        if word == node.__file__:
            found.append(vector[i + 1 : i + 3])
    return found


@pytest.fixture
def nothing_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a launcher's program has its plain name."""
    monkeypatch.setenv("PATH", "")


@pytest.mark.usefixtures("nothing_on_path")
@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        (
            "openmpi",
            "mpirun --bind-to none --tag-output -v -np 1 --host alpha:1 NODE 0 CAPSULE "
            ": -np 1 --host beta:1 NODE 1 CAPSULE",
        ),
        ("mpich", "mpiexec -bind-to none -v -hosts alpha,beta -ppn 1 -n 2 NODE PMI_RANK CAPSULE"),
        ("mvapich", "mpiexec -bind-to none -v -hosts alpha,beta -ppn 1 -n 2 NODE PMI_RANK CAPSULE"),
        ("impi", "mpiexec.hydra -genv I_MPI_PIN 0 -v -hosts alpha,beta -ppn 1 -n 2 NODE PMI_RANK CAPSULE"),
        (
            "slurm",
            "srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --nodelist alpha,beta --kill-on-bad-exit=0 "
            "--cpu-bind=none --unbuffered -v NODE SLURMD_NODENAME CAPSULE",
        ),
    ],
)
def test_a_launcher_that_takes_a_vector_gets_one(launcher: str, expected: str) -> None:
    (start,) = STARTERS[launcher].starts(CAPSULE, ("-v",))
    places = {"NODE": [sys.executable, node.__file__], "CAPSULE": [CAPSULE.pack()]}
    vector = [part for word in expected.split() for part in places.get(word, [word])]
    assert list(start.vector) == vector


@pytest.mark.usefixtures("nothing_on_path")
def test_ssh_is_called_for_each_machine_with_one_quoted_line() -> None:
    starts = STARTERS["ssh"].starts(CAPSULE, ("-p", "2222"))
    for rank, start in enumerate(starts):
        *options, dashes, host, line = start.vector
        assert (options[0], options[-2:], dashes, host) == ("ssh", ["-p", "2222"], "--", HOSTS[rank].name)
        assert shlex.split(line) == ["exec", sys.executable, node.__file__, str(rank), CAPSULE.pack()]


def test_pdsh_replaces_the_rank_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/50% python/bin/python")
    (start,) = STARTERS["pdsh"].starts(CAPSULE)
    assert start.vector[:-1] == ("pdsh", "-S", "-R", "ssh", "-f", "2", "-w", "alpha,beta")
    assert start.variables == {"PDSH_RCMD_TYPE": "ssh"}
    line = re.sub("%(.)", lambda sign: {"n": "1", "%": "%"}[sign[1]], start.vector[-1])  # as pdsh(1) has it
    assert shlex.split(line) == ["exec", "/opt/50% python/bin/python", node.__file__, "1", CAPSULE.pack()]


def test_a_shell_hands_on_every_word_and_executes_none(tmp_path: Path) -> None:
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    line = starters.quoted((sys.executable, "-c", show, *NASTY, CAPSULE.pack()))
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [*NASTY, CAPSULE.pack()]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("pdsh", "pdsh is not on PATH.*apt-get install pdsh"),
        ("ssh", "ssh is not on PATH.*openssh-client"),
        ("openmpi", "mpirun is not on PATH.*openmpi-bin"),
        ("mpich", "mpiexec is not on PATH.*apt-get install mpich"),
        ("mvapich", "mpiexec is not on PATH.*no Debian package|in no Debian package"),
        ("impi", "mpiexec.hydra is not on PATH.*intel-oneapi-mpi"),
        ("slurm", "srun is not on PATH.*slurm-client"),
    ],
)
@pytest.mark.usefixtures("nothing_on_path")
def test_a_missing_launcher_is_named_with_its_package(launcher: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        STARTERS[launcher].check_installed()


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("launcher", "name", "version", "words"),
    [
        ("openmpi", "mpirun", "HYDRA build details:", r"mpirun calls itself HYDRA, .*openmpi-bin"),
        ("openmpi", "mpirun", "Intel(R) MPI Library for Linux* OS", r"calls itself Intel\(R\) MPI"),
        ("mpich", "mpiexec", "mpiexec (OpenRTE) 4.1.4", "mpiexec calls itself OpenRTE, .*install mpich"),
        ("mvapich", "mpiexec", "mpiexec (Open MPI) 5.0.3", "mpiexec calls itself Open MPI"),
    ],
)
def test_another_mpis_program_of_the_same_name_is_refused(
    launcher: str, name: str, version: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / name, f"echo '{version}'")
    with pytest.raises(ConfigError, match=words):
        STARTERS[launcher].check_installed()
    program(tmp_path / name, "echo 'its own'")
    STARTERS[launcher].check_installed()
    program(tmp_path / name, "exit 1")
    STARTERS[launcher].check_installed()


def test_pdsh_without_ssh_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / "pdsh", "")
    with pytest.raises(ConfigError, match=r"pdsh works by ssh, which is not on PATH.*openssh-client"):
        STARTERS["pdsh"].check_installed()
    program(tmp_path / "ssh", "")
    STARTERS["pdsh"].check_installed()


def test_a_command_line_that_the_system_would_refuse_is_refused() -> None:
    long = replace(CAPSULE, request=replace(REQUEST, arguments=("x" * 200_000,)))
    with pytest.raises(ConfigError, match=r"more than the system takes\. Put long arguments of the script into a file"):
        STARTERS["pdsh"].starts(long)


# --- on the machine -----------------------------------


@pytest.mark.parametrize(
    ("place", "environment", "rank"),
    [("1", {}, 1), ("PMI_RANK", {"PMI_RANK": "1"}, 1), ("SLURMD_NODENAME", {"SLURMD_NODENAME": "alpha"}, 0)],
)
def test_a_machine_finds_its_place(place: str, environment: dict[str, str], rank: int, monkeypatch: Any) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert node.rank_of(place, ["alpha", "beta"]) == rank


@pytest.mark.parametrize("value", ["gamma", "2", ""])
def test_a_machine_without_a_place_says_so(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", value)
    with pytest.raises(SystemExit, match="expected a rank or one of alpha, beta"):
        node.rank_of("PMI_RANK", ["alpha", "beta"])


# --- variables -----------------------------------


def test_secrets_and_what_is_one_machines_own_stay_here() -> None:
    environ = {
        **dict.fromkeys(["NCCL_DEBUG", "PYTHONPATH", "OMP_NUM_THREADS", "HF_HOME", "WANDB_MODE", "PATH"], "goes"),
        **dict.fromkeys(["HF_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD"], "secret"),
        **dict.fromkeys(["CUDA_VISIBLE_DEVICES", "HOME", "SSH_AUTH_SOCK", "AWS_SECRET_ACCESS_KEY", "RANK"], "stays"),
    }
    environ["MLFLOW_TRACKING_URI"] = "https://me:secret@tracking.example/x"
    assert set(forwarded(environ).values()) == {"goes"}
    assert "HF_ENDPOINT" in forwarded({"HF_ENDPOINT": "https://mirror.example:8080/@x"})
    assert forwarded(environ, ["HF_TOKEN"])["HF_TOKEN"] == "secret"
    with pytest.raises(ConfigError, match="names NOWHERE, which is not set"):
        forwarded(environ, ["NOWHERE"])


def test_a_users_file_is_read_and_never_written(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / ".deepspeed_env").write_text("A=1\nB=of home\n")
    (here / ".deepspeed_env").write_text("# mine\n\nB= $(touch x) 'as it is' \n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    values, files = users_variables({"HOME": str(home)}, here)
    assert values == {"A": "1", "B": " $(touch x) 'as it is' "}
    assert files == (home / ".deepspeed_env", here / ".deepspeed_env")
    assert users_variables({"DS_ENV_FILE": str(home / ".deepspeed_env")}, here)[0]["B"] == "of home"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_wrong_line_of_a_users_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport B=2\nC\n")
    with pytest.raises(ConfigError, match=r"line 2: expected NAME=value.\n.*line 3"):
        users_variables({}, tmp_path)
    with pytest.raises(ConfigError, match="DS_ENV_FILE is /nowhere"):
        users_variables({"DS_ENV_FILE": "/nowhere"}, tmp_path)


# --- files of schedulers -----------------------------------

RUN = ClusterRun("My train_01", 3, 4, True, "/work/my dir", {"A": "$(X) it's"})


def test_a_script_for_sbatch_is_a_script_that_a_shell_reads_as_meant(tmp_path: Path) -> None:
    directory = tmp_path / "my $(dir)"
    directory.mkdir()
    show = "import json, os, sys; print(json.dumps([os.getcwd(), sys.argv[1:]]))"
    text = sbatch_script(replace(RUN, directory=str(directory)), [sys.executable, "-c", show, *NASTY])
    for option in ("job-name=my-train-01", "nodes=3", "ntasks-per-node=1", "gpus-per-node=4"):
        assert f"#SBATCH --{option}\n" in text
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [str(directory), NASTY]
    assert "gpus" not in sbatch_script(replace(RUN, on_gpus=False), ["x"])


def as_kubernetes_expands(word: str, environment: dict[str, str]) -> str:
    """kubernetes.io: $(NAME) is the variable's value, or stays where there is none; $$ is $."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else environment.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, word)


@pytest.mark.parametrize("kind", ManifestKind)
def test_a_manifest_hands_on_every_word_and_says_where_the_pods_meet(kind: ManifestKind) -> None:
    text = manifest(kind, RUN, "image:1", ["shardwise", "launch", "--cpu"], ["train.py", *NASTY])
    assert "&id" not in text
    data = yaml.safe_load(text)
    assert data["kind"] == kind
    assert re.fullmatch("[a-z][a-z0-9-]*[a-z0-9]", data["metadata"]["name"])
    if kind is ManifestKind.PYTORCH_JOB:
        specs = data["spec"]["pytorchReplicaSpecs"]
        assert {name: spec["replicas"] for name, spec in specs.items()} == {"Master": 1, "Worker": 2}
        pods = [spec["template"]["spec"] for spec in specs.values()]
        given = {"RANK": "2", "MASTER_ADDR": "my-train-01-master-0", "MASTER_PORT": "23456"}
        address, port = given["MASTER_ADDR"], given["MASTER_PORT"]
    else:
        (job,) = data["spec"]["replicatedJobs"]
        assert (job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (3, 3)
        pods = [job["template"]["spec"]["template"]["spec"]]
        given, address, port = {"MACHINE_RANK": "2"}, "my-train-01-machines-0-0.my-train-01", "29500"
    for pod in pods:
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
        given |= {"touch executed": "oops", "X": "oops"}  # as if they were there
        words = [as_kubernetes_expands(word, given) for word in container["command"]]
        assert words == [
            *["shardwise", "launch", "--cpu", "--deepspeed_multinode_launcher", "standard", "--num_machines", "3"],
            *["--machine_rank", "2", "--main_process_ip", address, "--main_process_port", port],
            *["train.py", *NASTY],
        ]
        values = {each["name"]: each.get("value") for each in container["env"]}
        assert as_kubernetes_expands(values["A"], given) == "$(X) it's"
