"""The fear: a setting that was typed or written down, and that the job never hears of."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shardwise.commands.launch_options import _WITHOUT_VALUE, PANELS, given
from shardwise.commands.main import main
from shardwise.config.run.file import setting_names
from shardwise.config.run.said import Asked
from shardwise.errors import StateError
from shardwise.launch.handed_over import handed_over
from tests.front.command import FIXTURES, shardwise

SCRIPT = str(FIXTURES / "settings.py")
ZERO_3 = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_processes: 1
deepspeed_config:
  zero_stage: 3
  offload_param_device: nvme
  offload_param_nvme_path: /fast/from_yaml
"""


@dataclass(frozen=True)
class Screen:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    def row(self, name: str) -> str:
        """The row of a setting, or of a key of the DeepSpeed JSON, with single spaces."""
        (row,) = [line for line in self.out.splitlines() if line.startswith(name + " ")]
        return " ".join(row.split())


Command = Callable[..., Screen]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working directory."""
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME", "SHARDWISE_RUN", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dry_run(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`shardwise launch --dry-run OPTIONS script`, in this process; options in one text, as they are typed."""

    def run(options: str = "") -> Screen:
        monkeypatch.setattr(sys, "argv", ["shardwise", "launch", "--dry-run", *shlex.split(options), SCRIPT])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Screen(ended.value.code, captured.out, " ".join(captured.err.split()))

    return run


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- what reaches the ranks -----------------------------------


def test_nvme_paths_from_flag_and_from_yaml_reach_the_job_and_arguments_stay_as_typed(home: Path) -> None:
    config = write(home / "zero3.yaml", ZERO_3)
    arguments = ["two words", "it's", '"quoted"', "$(touch /tmp/never) `x` $HOME", "--zero_stage", "0", "", "--"]
    options = ["--config_file", str(config), "--offload_optimizer_device", "nvme"]
    options += ["--offload-optimizer-nvme-path=/fast/from flag"]

    for _ in range(2):  # the second run in the same directory finds nothing of the first in its way
        done = shardwise("launch", *options, SCRIPT, str(home), *arguments, temporary=home, cwd=home)
        assert done.returncode == 0, done.stderr
        report = json.loads((home / "0.json").read_text())
        (home / "0.json").unlink()
        assert report["arguments"] == arguments
        zero = report["ds_config"]["zero_optimization"]
        assert zero["stage"] == 3
        assert zero["offload_param"] == {"device": "nvme", "nvme_path": "/fast/from_yaml"}
        assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast/from flag"}
        assert report["places"]["offload_param_nvme_path"] == f"{config}, line 8"
        assert report["places"]["offload_optimizer_nvme_path"] == "--offload_optimizer_nvme_path"
        assert report["foreign"] == []
    assert [path.name for path in home.iterdir()] == ["zero3.yaml"]


def test_a_script_without_a_launcher_was_asked_nothing() -> None:
    assert handed_over({}) == Asked()


def test_a_rank_that_outlives_its_run_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"gone/asked\.json.*is over.*unset SHARDWISE_RUN"):
        handed_over({"SHARDWISE_RUN": str(tmp_path / "gone" / "asked.json")})


# --- flags -----------------------------------


def test_every_setting_that_acts_has_a_flag() -> None:
    flags = {name for names in PANELS.values() for name in names}
    only_in_files = {"compute_environment", "distributed_type"}  # --use_deepspeed and --multi_gpu say the second
    refused = {"dynamo_config", "dynamo_backend", "downcast_bf16", "mpirun_config", "commands", "command_file"}
    expected = {name for name in setting_names() if name not in only_in_files | refused}
    assert flags == {name for name in expected if not name.endswith("_config") and not name.startswith("tpu_")}


@pytest.mark.parametrize(
    ("typed", "held"),
    [
        ({"zero_stage": "3"}, {"zero_stage": 3}),
        ({"gradient_clipping": "null"}, {"gradient_clipping": None}),
        ({"mixed_precision": "no"}, {"mixed_precision": "no"}),
        ({"deepspeed_config_file": "1"}, {"deepspeed_config_file": "1"}),
        ({"gpu_ids": "0"}, {"gpu_ids": "0"}),
        ({"deepspeed_hostfile": "null"}, {"deepspeed_hostfile": None}),
        ({"zero3_init_flag": "False"}, {"zero3_init_flag": False}),
        ({"use_cpu": False, "debug": True, "zero_stage": None}, {"debug": True}),
    ],
)
def test_a_flag_holds_what_a_yaml_would_hold(typed: dict[str, Any], held: dict[str, Any]) -> None:
    assert given(typed) == held


@pytest.mark.parametrize("spelling", ["--zero_stage 3", "--zero-stage 3", "--zero_stage=3", "--zero-stage=3"])
def test_zero_stage_without_use_deepspeed_is_not_ignored(dry_run: Command, spelling: str) -> None:
    screen = dry_run(spelling)
    assert screen.row("zero_stage") == "zero_stage 3 --zero_stage"
    assert screen.row("zero_optimization.stage") == "zero_optimization.stage 3 --zero_stage"


def test_without_zero_there_is_no_json(dry_run: Command) -> None:
    screen = dry_run("--mixed_precision bf16")
    assert screen.row("mixed_precision") == 'mixed_precision "bf16" --mixed_precision'
    assert "DeepSpeed JSON" not in screen.out


@pytest.mark.parametrize("name", sorted(_WITHOUT_VALUE))
def test_bare_flags_say_yes(dry_run: Command, name: str) -> None:
    assert dry_run(f"--{name}").row(name) == f"{name} true --{name}"


def test_an_unknown_flag_is_named_with_its_neighbour(dry_run: Command) -> None:
    screen = dry_run("--zero_stag 3")
    assert screen.code == 2
    assert "--zero_stag " in screen.err and "--zero_stage" in screen.err


def test_all_faults_of_the_flags_are_told_at_once(dry_run: Command) -> None:
    screen = dry_run("--zero_stage 7 --num_processes 0 --offload_param_device disk")
    assert screen.code == 2
    for words in ("--zero_stage: found 7", "--num_processes: found 0", '--offload_param_device: found "disk"'):
        assert words in screen.err


def test_no_clipping_means_no_clipping(dry_run: Command) -> None:
    assert dry_run("--use_deepspeed").row("gradient_clipping") == "gradient_clipping 0.0 default"
    write(Path("run.yaml"), "distributed_type: DEEPSPEED\ndeepspeed_config: {gradient_clipping: 1.0}\n")
    screen = dry_run("--config_file run.yaml --gradient_clipping null")
    assert "gradient_clipping 0.0 --gradient_clipping" in " ".join(screen.out.split())


def test_quiet_leaves_notes_out_and_without_it_they_come_once(dry_run: Command) -> None:
    noisy = dry_run("--enable_cpu_affinity")
    assert noisy.err.count("enable_cpu_affinity: true (--enable_cpu_affinity) has no effect") == 1
    assert dry_run("-q --enable_cpu_affinity").err == ""


# --- files -----------------------------------


def test_a_flag_that_contradicts_the_json_is_an_error_and_one_that_agrees_a_warning(dry_run: Command) -> None:
    write(Path("ds.json"), '{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}')
    screen = dry_run("--deepspeed_config_file ds.json --zero_stage 2 --gradient_clipping 0.5")
    assert screen.code == 2
    assert "zero_stage: 2 (--zero_stage) but 3 (ds.json, line 1)" in screen.err
    assert "gradient_clipping: 0.5 (--gradient_clipping) but 1.0 (ds.json, line 1)" in screen.err
    screen = dry_run("--deepspeed_config_file ds.json --zero_stage 3")
    assert screen.code == 0
    assert "said twice, and agrees" in screen.err


def test_a_typo_inside_deepspeed_config_is_an_error(dry_run: Command) -> None:
    write(Path("run.yaml"), "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stag: 3\n")
    screen = dry_run("--config_file run.yaml")
    assert screen.code == 2
    assert "line 3" in screen.err and "zero_stag" in screen.err and "zero_stage" in screen.err


def test_a_config_file_that_is_not_there_is_an_error(dry_run: Command) -> None:
    screen = dry_run("--config_file nowhere.yaml")
    assert screen.code == 2
    assert "nowhere.yaml" in screen.err


def test_the_default_file_is_picked_up_and_flags_are_stronger(dry_run: Command, home: Path) -> None:
    config = write(home / ".config/shardwise/default_config.yaml", ZERO_3)
    assert dry_run().row("zero_stage") == f"zero_stage 3 {config}, line 6"
    screen = dry_run("--zero_stage 2 --offload_param_device none")
    assert screen.row("zero_stage") == "zero_stage 2 --zero_stage"
    assert screen.row("num_processes") == f"num_processes 1 {config}, line 4"


def test_accelerates_default_file_is_picked_up_and_that_is_said(dry_run: Command, home: Path) -> None:
    foreign = write(home / ".cache/huggingface/accelerate/default_config.yaml", ZERO_3)
    screen = dry_run()
    assert screen.row("zero_stage") == f"zero_stage 3 {foreign}, line 6"
    assert f"Settings come from Accelerate's {foreign}" in screen.err


def test_an_unusable_default_file_of_accelerate_is_left_aside_with_a_note(dry_run: Command, home: Path) -> None:
    foreign = write(home / ".cache/huggingface/accelerate/default_config.yaml", "distributed_type: FSDP\n")
    screen = dry_run("--zero_stage 1")
    assert screen.code == 0
    assert f"{foreign} is left aside" in screen.err and "FSDP" in screen.err
    assert screen.row("zero_stage") == "zero_stage 1 --zero_stage"


# --- nodes -----------------------------------

HPZ_3 = '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}'


def test_simulated_nodes_are_the_jsons(dry_run: Command) -> None:
    write(Path("ds.json"), HPZ_3)
    for options in ("-n 6 --zero_stage 3", "-n 6 --deepspeed_config_file ds.json"):
        screen = dry_run(f"{options} --num_nodes_simulated 2")
        assert screen.code == 0, screen.err
        assert screen.row("shardwise.simulated_nodes") == "shardwise.simulated_nodes 2 --num_nodes_simulated"


@pytest.mark.parametrize(
    "processes",
    [
        "-n 4",
        "-n 4 --num_machines 2 --main_process_ip 10.0.0.1 --main_process_port 29500",
        "--deepspeed_hostfile hosts",
        "--deepspeed_hostfile hosts --deepspeed_multinode_launcher nossh --machine_rank 0",
        "-n 4 --slurm_script job.sh",
    ],
)
def test_nodes_that_do_not_divide_the_processes_are_told_before_any_starts(dry_run: Command, processes: str) -> None:
    write(Path("hosts"), "alpha slots=2\nbeta slots=2\n")
    write(Path("ds.json"), HPZ_3)
    screen = dry_run(f"--cpu {processes} --deepspeed_config_file ds.json --num_nodes_simulated 8")
    assert screen.code == 2
    assert (
        "shardwise.simulated_nodes is 8 (--num_nodes_simulated), which does not divide 4 processes. "
        "Expected 1 or 2 or 4." in screen.err
    )
    assert (
        "zero_optimization.zero_hpz_partition_size is 3 (ds.json, line 1), which does not divide 4 processes. "
        "Expected 1 or 2 or 4, best the number of processes on a node." in screen.err
    )
    assert not Path("job.sh").exists()
