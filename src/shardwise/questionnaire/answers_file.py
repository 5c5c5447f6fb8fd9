"""The same questions, answered by a file: `shardwise config --answers FILE`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwise.config.messages import Fault, nearest, report, shown
from shardwise.config.run.yaml_text import parse_yaml
from shardwise.config.source import Source, parse
from shardwise.errors import ConfigError
from shardwise.questionnaire.interview import fault_of, following, settled
from shardwise.questionnaire.question import NEEDED, Answers, Kind, Question

EXAMPLE = "use_deepspeed: yes\nzero_stage: 3\nclip_gradients: yes\ngradient_clipping: 1.0\nnum_processes: 4"


def read_answers(path: Path) -> Source:
    """Read a YAML, or a JSON where the name ends so, that holds answers by the keys of their questions."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"The answers {path} cannot be read: {error.strerror}. Give --answers a file.") from None
    source = parse(text, str(path)) if path.suffix == ".json" else parse_yaml(text, str(path))
    if source.data is None:
        source.data = {}  # an empty file takes every default
    if not isinstance(source.data, dict):
        raise ConfigError(f"{path} holds {shown(source.data)}, expected answers by key, such as:\n{EXAMPLE}")
    return source


def answered(questions: Sequence[Question], source: Source) -> Answers:
    """The answers of a file, completed by defaults; one ConfigError with all that is wrong or missing in it."""
    walk = _Walk(questions, source)
    faults = [*source.faults, *walk.faults, *walk.unknown(), *walk.not_asked()]
    if faults:
        raise ConfigError(report(source.name, faults, source.lines))
    return walk.answers


class _Walk:
    """One way through the questions, with the faults met on it."""

    def __init__(self, questions: Sequence[Question], source: Source) -> None:
        self.questions = questions
        self.given: dict[str, Any] = source.data
        self.answers: dict[str, Any] = {}
        self.faults: list[Fault] = []
        self.lost = False  # a wrong answer on which later questions may depend
        while (question := following(questions, self.answers)) is not None:
            self._answer(question)

    def _answer(self, question: Question) -> None:
        key = question.key
        default = question.default_after(self.answers)
        if key in self.given:
            value = question.read(self.given[key])
            fault = fault_of(question, value, self.answers)
            if fault is None:
                self.answers[key] = settled(question, value, self.answers)
                return
            self.faults.append(Fault((key,), fault))
            self.lost |= question.kind not in (Kind.NUMBER, Kind.WORDS)
        elif default is NEEDED:
            self.faults.append(Fault((key,), f"missing, and it has no default. {question.text} Add it."))
        self.answers[key] = None if default is NEEDED else default

    def unknown(self) -> list[Fault]:
        """Keys that no question has."""
        keys = {question.key for question in self.questions}
        faults = []
        for name in self.given:
            if name not in keys:
                meant = nearest(str(name), keys)
                hint = f'Did you mean "{meant}"?' if meant else f"The questions are {', '.join(sorted(keys))}."
                faults.append(Fault((str(name),), f"no question has this key. {hint}"))
        return faults

    def not_asked(self) -> list[Fault]:
        """Answers to questions that do not come up; unknown after a wrong answer that decides which ones do."""
        if self.lost:
            return []
        asked_when = {question.key: question.asked_when for question in self.questions if question.key in self.given}
        return [
            Fault((key,), f"not asked after the other answers: it needs {self._reason(key)}. Remove it.")
            for key in asked_when
            if key not in self.answers
        ]

    def _reason(self, key: str) -> str:
        """The first condition that fails, of every form of the question."""
        reasons = [
            next(when.words for when in question.asked_when if not when.holds(self.answers))
            for question in self.questions
            if question.key == key
        ]
        return " or ".join(reasons)
