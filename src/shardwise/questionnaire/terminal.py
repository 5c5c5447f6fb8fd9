"""Putting the questions to somebody at a terminal: arrow keys for choices, a typed line for the rest."""

import sys
from typing import Any

import questionary
from rich.console import Console
from rich.text import Text

from shardwise.errors import ConfigError
from shardwise.questionnaire.interview import Move, Turn
from shardwise.questionnaire.question import NEEDED, Kind

BACK = "<"
INTRODUCTION = f"An empty line takes the answer in [brackets]; {BACK} goes back to the question before; Ctrl-C leaves."


def need_a_terminal(example: str) -> None:
    """ConfigError where nobody can answer."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "There is no terminal to ask the questions at. Give --default for the usual answers, or --answers "
            f"FILE with a YAML or JSON that holds them.\nExample of such a file:\n{example}"
        )


class TerminalAsker:
    """Puts one question after the other at this terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, turn: Turn) -> Any:
        """What was typed or chosen, or Move.BACK."""
        if turn.fault is not None:
            self.console.print(Text(turn.fault, style="red"), soft_wrap=True)
        given = _choose(turn) if turn.question.kind is Kind.CHOICE else _type(turn)
        return Move.BACK if given == BACK else turn.default if given == "" and turn.default is not NEEDED else given


def _choose(turn: Turn) -> Any:
    question = turn.question
    choices = [
        questionary.Choice(choice.label, choice.value, disabled=choice.refused or None) for choice in question.choices
    ]
    if not turn.is_first:
        choices.append(questionary.Choice("← back", BACK))
    default = next(choice for choice in choices if choice.value == turn.default)
    return questionary.select(question.text, choices, default=default, instruction=_aside(question.hint)).unsafe_ask()


def _type(turn: Turn) -> Any:
    question = turn.question
    message = " ".join(part for part in (question.text, _aside(question.hint), _brackets(turn)) if part) + ":"
    ask = questionary.path if question.kind is Kind.PATH else questionary.text
    return str(ask(message, qmark="?").unsafe_ask()).strip()


def _aside(hint: str) -> str:
    return f"({hint})" if hint else ""


def _brackets(turn: Turn) -> str:
    if turn.question.kind is Kind.YES_NO:
        return "[YES/no]" if turn.default is True else "[yes/NO]"
    return "" if turn.default in (NEEDED, None) else f"[{turn.default}]"
