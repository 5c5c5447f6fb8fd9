"""Going through the questions: forwards, and back again with the earlier answers kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from shardwise.config.run.contradictions import misfits
from shardwise.config.run.file import check_run
from shardwise.config.run.said import Origin, Said
from shardwise.config.run.schema import PluginConfig, RunConfig
from shardwise.config.source import Source
from shardwise.questionnaire.json_file import json_fault
from shardwise.questionnaire.question import NEEDED, Answers, Question
from shardwise.questionnaire.run_file import as_run


class Move(Enum):
    """What somebody may want instead of answering."""

    BACK = auto()


@dataclass(frozen=True)
class Turn:
    """One question as it is put."""

    question: Question
    default: Any  # NEEDED where there is none; the earlier answer after going back
    is_first: bool
    fault: str | None = None  # why the last answer was refused


def interview(questions: Sequence[Question], ask: Callable[[Turn], Any]) -> Answers:
    """Put every question that comes up to `ask`, until all are answered.

    `ask` returns what was typed or chosen, or Move.BACK, which takes the last answer back. A wrong answer is asked for
    again, with the fault.
    """
    answers: dict[str, Any] = {}
    earlier: dict[str, Any] = {}
    fault = None
    while (question := following(questions, answers)) is not None:
        default = earlier.get(question.key, question.default_after(answers))
        given = ask(Turn(question, default, not answers, fault))
        fault = None
        if given is Move.BACK:
            if answers:
                answers.popitem()  # `earlier` keeps it
            continue
        value = question.read(given)
        fault = fault_of(question, value, answers)
        if fault is None:
            answers[question.key] = earlier[question.key] = settled(question, value, answers)
    return answers


def following(questions: Sequence[Question], answers: Answers) -> Question | None:
    """The next question that comes up and has no answer."""
    open_ones = (question for question in questions if question.key not in answers and question.is_asked(answers))
    return next(open_ones, None)


def defaults(questions: Sequence[Question], answers: Answers) -> Answers:
    """The answers, completed by the defaults of all other questions that come up."""
    complete = dict(answers)
    while (question := following(questions, complete)) is not None:
        default = question.default_after(complete)
        assert default is not NEEDED, question.key
        complete[question.key] = default
    return complete


def fault_of(question: Question, value: Any, answers: Answers) -> str | None:
    """Why `value` is no answer after these ones: by its kind, then by the schema and the rules of the run."""
    fault = question.fault(value)
    if fault is not None:
        return fault
    checked = check_run(Source("The answers", as_run({**answers, question.key: value})))
    for found in (*checked.faults, *checked.refused):
        if found.path[-1] == question.key:
            return found.text
    unfit = next(misfits(_sizes(checked.block)), None)
    if unfit is not None:
        return unfit
    return json_fault(value) if question.key == "deepspeed_config_file" else None


def settled(question: Question, value: Any, answers: Answers) -> Any:
    """A right answer as the schema reads it: "2" and 2.0 are 2."""
    key = question.key
    if key not in PluginConfig.model_fields and key not in RunConfig.model_fields:
        return value
    run = check_run(Source("The answers", as_run({**answers, key: value}))).block
    typed = getattr(run.deepspeed_config if key in PluginConfig.model_fields else run, key)
    return ",".join(typed) if isinstance(typed, tuple) else typed


def _sizes(run: RunConfig) -> dict[str, Said]:
    sizes = {name: getattr(run, name) for name in ("num_processes", "num_machines", "machine_rank")}
    sizes["deepspeed_hostfile"] = run.deepspeed_config.deepspeed_hostfile
    return {name: Said(value, Origin.FILE, "your answer") for name, value in sizes.items()}
