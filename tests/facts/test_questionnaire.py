"""The fear: questions that come up at the wrong time, forget answers, or make a file that no launch accepts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.config.run.gather import gather
from shardwise.config.run.precedence import resolve
from shardwise.config.run.yaml_text import parse_yaml
from shardwise.config.source import Source
from shardwise.errors import ConfigError
from shardwise.launch.machine import Machine
from shardwise.questionnaire.answers_file import answered, read_answers
from shardwise.questionnaire.interview import Move, Turn, fault_of, interview
from shardwise.questionnaire.outcome import outcome_of
from shardwise.questionnaire.question import NEEDED, Answers, Kind
from shardwise.questionnaire.questions import questions
from shardwise.questionnaire.run_file import as_run, as_text
from shardwise.questionnaire.save import save

LAPTOP = questions(Machine(num_cores=4, num_gpus=0))
SERVER = questions(Machine(num_cores=64, num_gpus=4))

# The file that `accelerate config` made of the answers in GPUS_AND_JSON.
ACCELERATES = """
compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_config_file: ds_config.json
  zero3_init_flag: true
distributed_type: DEEPSPEED
downcast_bf16: 'no'
dynamo_backend: 'NO'
fsdp_config: {}
machine_rank: 0
main_training_function: main
megatron_lm_config: {}
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
use_cpu: false
"""
NOT_OURS = {"dynamo_backend", "fsdp_config", "megatron_lm_config"}
GPUS_AND_JSON = {
    "machine_type": "MULTI_GPU",
    "use_deepspeed": True,
    "use_deepspeed_config_file": True,
    "deepspeed_config_file": "ds_config.json",
    "zero3_init_flag": True,
}
JSON = """{
    "bf16": {"enabled": true},
    "zero_optimization": {"stage": 3},
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 10
}"""


class Script:
    """Somebody who answers each question, in turn, by the lines under its key; an empty line where there is none."""

    def __init__(self, **lines: Any) -> None:
        self.lines = {key: list(value) if isinstance(value, list) else [value] for key, value in lines.items()}
        self.turns: list[Turn] = []

    def __call__(self, turn: Turn) -> Any:
        self.turns.append(turn)
        lines = self.lines.get(turn.question.key)
        return lines.pop(0) if lines else turn.default

    @property
    def keys(self) -> list[str]:
        return [turn.question.key for turn in self.turns]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("ds_config.json").write_text(JSON)
    return tmp_path


def resolved_from(run: dict[str, Any], path: Path, flags: dict[str, Any] | None = None) -> Any:
    path.write_text(as_text(run, path))
    asked, _ = gather(flags or {}, path, {"HOME": str(path.parent)})
    return resolve(asked)


# --- the order, and what comes up -------------------------------------------------------------------------------------


def test_without_zero_few_questions_come_up() -> None:
    script = Script()
    interview(SERVER, script)
    assert script.keys == [
        "compute_environment",
        "machine_type",
        "num_machines",
        "debug",
        "use_deepspeed",
        "num_processes",
        "gpu_ids",
        "mixed_precision",
    ]


def test_stage_3_on_nvme_and_two_machines_asks_everything_in_order() -> None:
    script = Script(
        num_machines="2",
        main_process_ip="10.0.0.1",
        same_network="no",
        max_restarts="3",
        use_deepspeed="yes",
        zero_stage=3,
        offload_optimizer_device="nvme",
        offload_param_device="nvme",
        clip_gradients="yes",
        use_moe="yes",
        deepspeed_moe_layer_cls_names="Experts, Router",
    )
    answers = interview(SERVER, script)
    assert script.keys == [
        *("compute_environment", "machine_type", "num_machines", "machine_rank", "main_process_ip"),
        *("main_process_port", "same_network", "rdzv_backend", "max_restarts", "monitor_interval", "debug"),
        *("use_deepspeed", "use_deepspeed_config_file"),
        *("zero_stage", "offload_optimizer_device", "offload_param_device", "offload_param_nvme_path"),
        *("offload_optimizer_nvme_path", "gradient_accumulation_steps", "clip_gradients", "gradient_clipping"),
        *("zero3_save_16bit_model", "zero3_init_flag", "use_moe", "deepspeed_moe_layer_cls_names"),
        *("deepspeed_multinode_launcher", "num_processes", "mixed_precision"),
    ]
    assert answers["num_processes"] == 8  # all GPUs of both
    assert answers["deepspeed_moe_layer_cls_names"] == "Experts,Router"


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, []),
        (1, ["offload_optimizer_device"]),
        (2, ["offload_optimizer_device"]),
        (3, ["offload_optimizer_device", "offload_param_device", "zero3_save_16bit_model", "zero3_init_flag"]),
    ],
)
def test_a_stage_is_asked_only_what_it_can_do(stage: int, expected: list[str]) -> None:
    script = Script(use_deepspeed="yes", zero_stage=stage)
    interview(LAPTOP, script)
    assert [key for key in script.keys if key.startswith(("offload", "zero3"))] == expected


def test_beside_a_json_only_what_it_does_not_say_is_asked(folder: Path) -> None:
    script = Script(**GPUS_AND_JSON)
    interview(SERVER, script)
    lead = ["use_deepspeed_config_file", "deepspeed_config_file"]
    assert script.keys[5:] == [*lead, "zero3_init_flag", "use_moe", "num_processes"]


def test_zero_init_is_not_asked_beside_a_json_of_stage_2(folder: Path) -> None:
    Path("ds_config.json").write_text(JSON.replace('"stage": 3', '"stage": 2'))
    script = Script(**GPUS_AND_JSON)
    interview(SERVER, script)
    assert "zero3_init_flag" not in script.keys


# --- going back, and wrong answers ------------------------------------------------------------------------------------


def test_going_back_offers_the_earlier_answers_again() -> None:
    script = Script(
        use_deepspeed=["yes", Move.BACK],
        use_deepspeed_config_file=["no"],
        zero_stage=[3],
        offload_optimizer_device=["cpu"],
        offload_param_device=[Move.BACK],
    )
    script.lines["offload_optimizer_device"].append(Move.BACK)
    script.lines["zero_stage"].append(Move.BACK)
    script.lines["use_deepspeed_config_file"].append(Move.BACK)
    script.lines["debug"] = ["no", "yes"]
    answers = interview(LAPTOP, script)
    again = {turn.question.key: turn.default for turn in script.turns}  # the last time each was put
    assert again["use_deepspeed"] is True
    assert again["zero_stage"] == 3
    assert again["offload_optimizer_device"] == "cpu"
    assert answers["zero_stage"] == 3 and answers["debug"] is True
    assert script.keys.count("offload_param_device") == 2


def test_there_is_no_way_back_before_the_first_question() -> None:
    script = Script(compute_environment=[Move.BACK, "LOCAL_MACHINE"])
    interview(LAPTOP, script)
    assert [turn.is_first for turn in script.turns[:3]] == [True, True, False]


@pytest.mark.parametrize(
    ("key", "wrong", "right", "message"),
    [
        ("num_processes", "0", "3", "found 0, expected a number at least 1."),
        ("num_processes", "four", "3", 'found "four", expected a whole number.'),
        ("gradient_accumulation_steps", "1.5", "2", "found 1.5, expected a whole number."),
        ("gradient_clipping", "-1", "2", "found -1, expected a number at least 0."),
        ("use_moe", "perhaps", "no", 'found "perhaps", expected yes or no.'),
        ("deepspeed_config_file", "there/is/none.json", "ds_config.json", "no file"),
    ],
)
def test_a_wrong_answer_is_refused_at_once_and_asked_again(
    folder: Path, key: str, wrong: str, right: str, message: str
) -> None:
    lead = "yes" if key == "deepspeed_config_file" else "no"
    script = Script(use_deepspeed="yes", use_deepspeed_config_file=lead, clip_gradients="yes", **{key: [wrong, right]})
    answers = interview(LAPTOP, script)
    first, second = (turn for turn in script.turns if turn.question.key == key)
    assert first.fault is None
    assert second.fault is not None and message in second.fault
    assert str(answers[key]).lower() in (right, f"{right}.0", "false")


def test_numbers_of_machines_and_processes_must_fit() -> None:
    script = Script(num_machines="2", machine_rank=["2", "1"], main_process_ip="a", num_processes=["3", "4"])
    answers = interview(LAPTOP, script)
    faults = [turn.fault for turn in script.turns if turn.fault]
    assert len(faults) == 2 and "less than num_machines" in faults[0] and "multiple of num_machines" in faults[1]
    assert (answers["machine_rank"], answers["num_processes"]) == (1, 4)


def test_all_faults_of_a_json_are_shown_and_it_is_asked_for_again(folder: Path) -> None:
    Path("bad.json").write_text('{\n"train_batch_size": "8",\n"zero_optimization": {"stag": 3}\n}')
    script = Script(**(GPUS_AND_JSON | {"deepspeed_config_file": ["bad.json", "ds_config.json"]}))
    answers = interview(LAPTOP, script)
    (fault,) = (turn.fault for turn in script.turns if turn.fault)
    assert (
        "line 2, train_batch_size" in fault
        and 'line 3, zero_optimization.stag: unknown key. Did you mean "stage"' in fault
    )
    assert answers["deepspeed_config_file"] == "ds_config.json"


@pytest.mark.parametrize(("launcher", "is_asked"), [("standard", False), ("slurm", False), ("pdsh", True)])
def test_a_hostfile_is_asked_for_where_the_launcher_needs_one(launcher: str, is_asked: bool) -> None:
    answers = {"machine_type": "MULTI_CPU", "num_machines": 2, "use_deepspeed": True}
    by_key = {question.key: question for question in LAPTOP}
    assert fault_of(by_key["deepspeed_multinode_launcher"], launcher, answers) is None
    answers["deepspeed_multinode_launcher"] = launcher
    assert all(when.holds(answers) for when in by_key["deepspeed_hostfile"].asked_when) is is_asked


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_has_the_layout_of_accelerates(folder: Path) -> None:
    answers = interview(SERVER, Script(**GPUS_AND_JSON))
    path = folder / "run.yaml"
    resolved_from(as_run(answers), path)
    ours, theirs = yaml.safe_load(path.read_text()), yaml.safe_load(ACCELERATES)
    assert ours.keys() - {"debug"} == theirs.keys() - NOT_OURS
    assert all(ours[key] == theirs[key] for key in theirs.keys() - NOT_OURS)
    assert list(ours) == sorted(ours)


def test_no_clipping_means_no_clipping(folder: Path) -> None:
    answers = interview(LAPTOP, Script(use_deepspeed="yes", clip_gradients="no"))
    run = as_run(answers)
    assert "gradient_clipping" not in run["deepspeed_config"]
    assert resolved_from(run, folder / "run.yaml").ds_config["gradient_clipping"] == 0.0


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_words_that_look_like_numbers_stay_words(folder: Path, name: str) -> None:
    Path("1e8").write_text(JSON)
    answers = interview(LAPTOP, Script(**(GPUS_AND_JSON | {"deepspeed_config_file": "1e8"})))
    resolved = resolved_from(as_run(answers), folder / name)
    assert resolved["deepspeed_config_file"] == "1e8"
    assert resolved["mixed_precision"] == "bf16"


def test_zero_on_the_cpu_is_a_run_on_the_cpu(folder: Path) -> None:
    answers = interview(LAPTOP, Script(machine_type="MULTI_CPU", use_deepspeed="yes"))
    resolved = resolved_from(as_run(answers), folder / "run.yaml")
    assert (resolved["distributed_type"], resolved["use_cpu"], resolved["num_processes"]) == ("DEEPSPEED", True, 2)


def _any_line(draw: Callable[[st.SearchStrategy[Any]], Any], turn: Turn) -> Any:
    question = turn.question
    options = {
        Kind.CHOICE: [choice.value for choice in question.choices if not choice.refused],
        Kind.YES_NO: ["yes", "no"],
        Kind.WHOLE: ["1", "2", "4"],
        Kind.NUMBER: ["0", "0.5", "1"],
        Kind.PATH: ["ds_config.json"],
        Kind.WORDS: ["0,1", "Experts", "1e8", "no"],
    }[question.kind]
    usual = [] if turn.default is NEEDED or turn.fault else [turn.default]
    return draw(st.sampled_from([*usual, *options]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), machine=st.sampled_from([LAPTOP, SERVER]))
def test_every_way_through_the_questions_makes_a_file_that_a_launch_accepts(
    folder: Path, data: Any, machine: Any
) -> None:
    turns: list[Turn] = []

    def ask(turn: Turn) -> Any:
        turns.append(turn)
        if len(turns) < 30 and data.draw(st.integers(0, 9)) == 0:
            return Move.BACK
        return _any_line(data.draw, turn)

    answers = interview(machine, ask)
    outcome = outcome_of(answers, folder / "run.yaml")
    for name, value in answers.items():
        if name in outcome.resolved.values and name not in ("distributed_type", "deepspeed_moe_layer_cls_names"):
            assert outcome.resolved[name] == value, name


# --- answers from a file ----------------------------------------------------------------------------------------------


def answers_of(text: str, questions: Sequence[Any] = LAPTOP) -> Answers:
    return answered(questions, parse_yaml(text, "answers.yaml"))


def test_a_file_gives_the_same_answers_as_somebody_who_types_them(folder: Path) -> None:
    text = "machine_type: MULTI_GPU\nuse_deepspeed: yes\nuse_deepspeed_config_file: 'yes'\n"
    text += "deepspeed_config_file: ds_config.json\nzero3_init_flag: true\n"
    Path("answers.yaml").write_text(text)
    Path("answers.json").write_text(
        '{"machine_type": "MULTI_GPU", "use_deepspeed": true, "use_deepspeed_config_file": "yes",\n'
        '"deepspeed_config_file": "ds_config.json", "zero3_init_flag": "yes"}'
    )
    typed = interview(SERVER, Script(**GPUS_AND_JSON))
    for name in ("answers.yaml", "answers.json"):
        assert answered(SERVER, read_answers(Path(name))) == typed


def test_an_empty_file_takes_every_default() -> None:
    assert answered(LAPTOP, Source("answers", {})) == interview(LAPTOP, Script())


def test_all_that_is_wrong_with_a_file_is_one_error_with_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        answers_of("num_machines: 2\nnum_proces: 4\nuse_deepspeed: no\nzero_stage: 3\nmain_process_ip: ''\n")
    assert str(caught.value).splitlines() == [
        "answers.yaml has 3 faults:",
        '  line 2, num_proces: no question has this key. Did you mean "num_processes"?',
        "  line 4, zero_stage: not asked after the other answers: it needs use_deepspeed: yes. Remove it.",
        "  line 5, main_process_ip: found nothing, and there is no default. Give an answer.",
    ]


def test_a_missing_answer_without_a_default_is_a_fault() -> None:
    with pytest.raises(ConfigError, match="main_process_ip: missing, and it has no default"):
        answers_of("num_machines: 2")


def test_a_wrong_answer_that_leads_on_blames_no_later_answer() -> None:
    with pytest.raises(ConfigError) as caught:
        answers_of("use_deepspeed: perhaps\nzero_stage: 3")
    assert "has 1 fault:" in str(caught.value) and "zero_stage" not in str(caught.value)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_the_previous_file_is_kept_and_an_equal_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.yaml"
    assert save(path, "a: 1\n") is None
    assert save(path, "a: 1\n") is None
    kept = save(path, "a: 2\n")
    assert kept is not None and kept.read_text() == "a: 1\n" and path.read_text() == "a: 2\n"
    assert sorted(file.name for file in path.parent.iterdir()) == ["run.yaml", "run.yaml.bak"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("a: 1\n")
    link.symlink_to(real)
    save(link, "a: 2\n")
    assert link.is_symlink() and real.read_text() == "a: 2\n"


def test_a_place_that_cannot_be_written_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save(tmp_path / "file" / "run.yaml", "a: 1\n")
