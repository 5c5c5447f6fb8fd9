"""One question as data: what is asked, when, and which answers it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from shardwise.config.messages import shown
from shardwise.config.run.yaml_text import read_scalar

Answers = Mapping[str, Any]  # by the key of the question; what was not asked is absent

_YES = ("yes", "y", "true", "1")
_NO = ("no", "n", "false", "0")


class Kind(Enum):
    """What an answer is."""

    CHOICE = auto()
    YES_NO = auto()
    WHOLE = auto()
    NUMBER = auto()
    PATH = auto()
    WORDS = auto()


class _Nothing(Enum):
    NEEDED = auto()


NEEDED = _Nothing.NEEDED  # in the default's place: the question must be answered


@dataclass(frozen=True)
class Choice:
    """One of the answers that a question offers."""

    value: Any
    label: str
    refused: str = ""  # why it is shown and cannot be chosen


@dataclass(frozen=True)
class When:
    """A condition on earlier answers, in words for those who answer a question that is not asked."""

    words: str
    holds: Callable[[Answers], bool]


@dataclass(frozen=True)
class Question:
    """A question. Its key is the setting that the answer becomes, or a name of its own for one that only leads on."""

    key: str
    text: str
    kind: Kind
    default: Any = NEEDED  # a value, or a function of the answers so far
    choices: tuple[Choice, ...] = ()
    asked_when: tuple[When, ...] = ()  # all of them
    hint: str = ""  # one line of explanation

    def is_asked(self, answers: Answers) -> bool:
        """Whether the question comes up after these answers."""
        return all(when.holds(answers) for when in self.asked_when)

    def default_after(self, answers: Answers) -> Any:
        """The answer that an empty line gives, or NEEDED."""
        return self.default(answers) if callable(self.default) else self.default

    def read(self, given: Any) -> Any:
        """A typed line, or a value of a file, as a value of this kind; what is of no such kind stays as it is."""
        if self.kind is Kind.YES_NO:
            word = str(given).strip().lower()
            return True if word in _YES else False if word in _NO else given
        if not isinstance(given, str):
            return given
        if self.kind in (Kind.WHOLE, Kind.NUMBER):
            return read_scalar(given.strip())
        if self.kind is Kind.CHOICE:
            return next((choice.value for choice in self.choices if str(choice.value) == given), given)
        return given.strip()

    def fault(self, value: Any) -> str | None:
        """Why a value is no answer of this kind; whether the setting takes it is the schema's to say."""
        if self.kind is Kind.YES_NO and not isinstance(value, bool):
            return f"found {shown(value)}, expected yes or no."
        if self.kind is Kind.CHOICE:
            return self._fault_of_choice(value)
        if self.kind in (Kind.PATH, Kind.WORDS) and value in ("", None):
            return "found nothing, and there is no default. Give an answer."
        return None

    def _fault_of_choice(self, value: Any) -> str | None:
        for choice in self.choices:
            if choice.value == value and type(choice.value) is type(value):
                return f"found {shown(value)}: {choice.refused}." if choice.refused else None
        offered = ", ".join(shown(choice.value) for choice in self.choices if not choice.refused)
        return f"found {shown(value)}, expected one of {offered}."
