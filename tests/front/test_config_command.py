"""The fear: a questionnaire that works in a test of its parts and not at a real terminal; a file lost on the way."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pexpect
import pytest
import yaml

from shardwise.commands.main import main
from shardwise.config.run.gather import gather
from shardwise.config.run.precedence import resolve
from shardwise.launch.machine import Machine
from tests.front.command import SHARDWISE, plain_environment

DOWN, CTRL_C = "\x1b[B", "\x03"
BEFORE_AN_ANSWER_SECONDS = 120  # a net under a hang
JSON = (
    '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 10,\n'
    '"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}'
)
SCRIPT = "print('trained')"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home with a DeepSpeed JSON and a script: the working directory of the command."""
    (tmp_path / "ds_config.json").write_text(JSON)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def isolated(home: Path) -> dict[str, str]:
    """No file of whoever runs the tests is read or written."""
    return {"HOME": str(home), "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": "", "HF_HOME": "", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `shardwise ARGUMENTS` in this process, on a machine without a GPU and without a terminal."""
    for name, value in isolated(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(home)
    monkeypatch.setattr("shardwise.launch.machine.this_machine", lambda: Machine(num_cores=4, num_gpus=0))
    monkeypatch.setattr("sys.stdin", StringIO())

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["shardwise", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(ended.value.code, *capsys.readouterr())

    return run


class Terminal:
    """Somebody at a pseudo-terminal who waits for each question before answering it."""

    def __init__(self, home: Path, *arguments: str) -> None:
        # A real terminal answers where its cursor is; this one does not.
        environment = plain_environment(home, **isolated(home), TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
        self.child = pexpect.spawn(
            SHARDWISE[0],
            [*SHARDWISE[1:], *arguments],
            cwd=str(home),
            env=environment,
            dimensions=(50, 200),
            encoding="utf-8",
            timeout=BEFORE_AN_ANSWER_SECONDS,
        )

    def see(self, text: str) -> None:
        self.child.expect_exact(text)

    def answer(self, question: str, keys: str = "") -> None:
        self.see(question)
        self.child.send(f"{keys}\r")

    def end(self) -> int:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal(home: Path) -> Iterator[Any]:
    opened = []

    def open_one(*arguments: str) -> Terminal:
        opened.append(Terminal(home, *arguments))
        return opened[-1]

    yield open_one
    for one in opened:
        one.child.close(force=True)


def resolved_of(path: Path, environ: Mapping[str, str] = os.environ) -> Any:
    asked, _ = gather({}, path, environ)
    return resolve(asked)


def test_settings_are_asked_for_at_a_terminal(home: Path, terminal: Any, command: Any) -> None:
    screen = terminal("config", "--config-file", "run.yaml")
    screen.answer("Where do you train?")
    screen.answer("Which type of machine")  # multi-CPU, where no GPU is
    screen.answer("How many machines", "one")
    screen.see("expected a whole number")
    screen.answer("How many machines")
    screen.answer("Check the collectives")
    screen.answer("use DeepSpeed", "yes")
    screen.answer("name a JSON file")
    screen.answer("Which stage of ZeRO?", DOWN)  # from 2 to 3
    screen.answer("Offload the optimizer")
    screen.answer("Offload the parameters")
    screen.answer("gradient accumulation steps", "5")
    screen.answer("gradient clipping?", "yes")
    screen.answer("largest gradient norm", "<")
    screen.answer("gradient clipping? [YES/no]", "no")  # the earlier answer is the default after going back
    screen.answer("16-bit weights")
    screen.answer("zero.Init")
    screen.answer("Mixture-of-Experts")
    screen.answer("How many CPU processes", "3")
    screen.answer("mixed precision?", DOWN + DOWN)  # bf16
    screen.see("saved at run.yaml")
    screen.see("shardwise launch --config_file run.yaml train.py")
    assert screen.end() == 0

    resolved = resolved_of(home / "run.yaml")
    assert resolved["num_processes"] == 3
    assert resolved["mixed_precision"] == "bf16"
    assert resolved.ds_config["zero_optimization"]["stage"] == 3
    assert resolved.ds_config["gradient_accumulation_steps"] == 5
    assert resolved.ds_config["gradient_clipping"] == 0.0
    dry = command("launch", "--config_file", "run.yaml", "--dry-run", "train.py")
    assert dry.returncode == 0, dry.stderr
    assert "3 x " in dry.stdout


def test_a_json_is_asked_for_at_a_terminal(home: Path, terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "bad.json").write_text('{"zero_optimization": {"stage": 7}}')
    screen = terminal("config")
    screen.answer("Where do you train?")
    screen.answer("Which type of machine", DOWN)  # multi-GPU
    screen.answer("How many machines")
    screen.answer("Check the collectives")
    screen.answer("use DeepSpeed", "yes")
    screen.answer("name a JSON file", "yes")
    screen.answer("path of the JSON file", "bad.json")
    screen.see("zero_optimization.stage: found 7, expected one of 0, 1, 2 or 3")
    screen.answer("path of the JSON file", "ds_config.json")
    screen.answer("zero.Init", "yes")
    screen.answer("Mixture-of-Experts")
    screen.answer("How many GPU(s)", "4")
    screen.see("saved at")  # mixed precision is the JSON's
    assert screen.end() == 0

    path = home / ".config" / "shardwise" / "default_config.yaml"
    monkeypatch.chdir(home)
    assert yaml.safe_load(path.read_text())["deepspeed_config"] == {
        "deepspeed_config_file": "ds_config.json",
        "zero3_init_flag": True,
    }
    resolved = resolved_of(path)
    assert (resolved["num_processes"], resolved["mixed_precision"]) == (4, "bf16")
    assert resolved["gradient_accumulation_steps"] == 10


def test_leaving_writes_no_file_and_says_so(home: Path, terminal: Any) -> None:
    before = sorted(home.rglob("*"))
    screen = terminal("config")
    screen.answer("Where do you train?")
    screen.see("Which type of machine")
    screen.child.send(CTRL_C)
    screen.see("no file was written")
    assert screen.end() == 130
    assert sorted(home.rglob("*")) == before


def test_without_a_terminal_the_ways_out_are_named(home: Path, command: Any) -> None:
    done = command("config")
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no terminal")
    assert "--default" in done.stderr and "--answers FILE" in done.stderr
    example = done.stderr.partition("Example of such a file:\n")[2]
    (home / "answers.yaml").write_text(example)
    done = command("config", "--answers", "answers.yaml", "--output", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert resolved_of(home / "run.yaml").ds_config["zero_optimization"]["stage"] == 3


def test_default_is_written_to_our_own_place_and_the_previous_file_is_kept(home: Path, command: Any) -> None:
    path = home / ".config" / "shardwise" / "default_config.yaml"
    first = command("config", "--default")
    assert first.returncode == 0, first.stderr
    assert f"saved at {path}" in first.stdout and "shardwise launch train.py" in first.stdout
    assert resolved_of(path)["num_processes"] == 2
    second = command("config", "default", "--mixed-precision", "bf16")
    assert f"kept in {path}.bak" in second.stdout
    assert resolved_of(path)["mixed_precision"] == "bf16"
    assert resolved_of(Path(f"{path}.bak").rename(home / "old.yaml"))["mixed_precision"] == "no"


def test_wrong_answers_leave_the_file_as_it_was(home: Path, command: Any) -> None:
    (home / "run.yaml").write_text("num_processes: 2\n")
    (home / "answers.yaml").write_text("num_processes: 0\nuse_deepspeed: no\nzero_stage: 2\n")
    done = command("config", "--answers", "answers.yaml", "--config_file", "run.yaml")
    assert done.returncode == 2
    assert "line 1, num_processes: found 0" in done.stderr and "Traceback" not in done.stderr
    assert (home / "run.yaml").read_text() == "num_processes: 2\n"


def test_update_mends_a_file_once(home: Path, command: Any) -> None:
    old = (
        "distributed_type: DEEPSPEED\nfp16: true\nuse_cpu: true\nnum_processes: 2\ndynamo_backend: 'NO'\n"
        "deepspeed_config:\n  deepspeed_config_file: ds_config.json\n  gradient_accumulation_steps: 1\n"
    )
    (home / "run.yaml").write_text(old)
    launch = ("launch", "--config_file", "run.yaml", "--dry-run", "train.py")
    refused = command(*launch)
    assert refused.returncode == 2
    assert "shardwise config update --config_file run.yaml" in refused.stderr
    done = command("config", "update", "--config_file", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert "ds_config.json says 10" in done.stdout
    assert (home / "run.yaml.bak").read_text() == old
    again = command("config", "update", "--config-file", "run.yaml")
    assert "needs no change" in again.stdout
    assert (home / "run.yaml.bak").read_text() == old
    assert command(*launch).returncode == 0


def test_help_of_every_form_has_an_example(command: Any) -> None:
    for form in ([], ["default"], ["update"]):
        done = command("config", *form, "--help")
        assert f"Example: {' '.join(['shardwise', 'config', *form])}" in done.stdout
