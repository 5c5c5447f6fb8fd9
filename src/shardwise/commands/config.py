"""`shardwise config`: the questionnaire, and what keeps its file in order."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shardwise.questionnaire.question import Answers

config_app = typer.Typer(
    help="Answer questions about how to train; the file they make is read by `shardwise launch`.",
    epilog="Example: shardwise config --config_file run.yaml",
    invoke_without_command=True,
    # --config-file and --config_file are one option.
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
)

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config_file",
        "--output",
        help="File to write; JSON where it ends in .json.  [default: ~/.config/shardwise/default_config.yaml]",
    ),
]


@config_app.callback()
def config(
    context: typer.Context,
    config_file: ConfigFile = None,
    default: Annotated[bool, typer.Option("--default", help="Ask nothing: take every default.")] = False,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", help="Take the answers from this YAML or JSON, by the keys of the questions."),
    ] = None,
) -> None:
    """Answer questions about how to train; the file they make is read by `shardwise launch`.

    A file that was there before is kept beside it, with .bak after its name.
    """
    from shardwise.errors import ConfigError

    if context.invoked_subcommand is not None:
        if default or answers is not None or config_file is not None:
            raise ConfigError(
                f"Options were given before {context.invoked_subcommand}. Write them after it, "
                f"as in: shardwise config {context.invoked_subcommand} --config_file run.yaml"
            )
        return
    if default and answers is not None:
        raise ConfigError("Both --default and --answers were given. Choose one.")
    if default:
        _write(_defaults({}), config_file)
    elif answers is not None:
        _write(_from_file(answers), config_file)
    else:
        _write(_asked(), config_file)


@config_app.command("default", epilog="Example: shardwise config default --mixed_precision bf16")
def config_default(
    config_file: ConfigFile = None,
    mixed_precision: Annotated[
        str, typer.Option("--mixed_precision", help="Compute dtype: no (fp32), fp16 or bf16.")
    ] = "no",
) -> None:
    """Write the file with every question's default, and ask nothing."""
    _write(_defaults({"mixed_precision": mixed_precision}), config_file)


@config_app.command("update", epilog="Example: shardwise config update --config_file run.yaml")
def config_update(
    config_file: Annotated[
        Path | None,
        typer.Option("--config_file", help="File to mend.  [default: ~/.config/shardwise/default_config.yaml]"),
    ] = None,
) -> None:
    """Bring an old or hand-made file into the present form.

    Where it names a deepspeed_config_file, the settings that the JSON says itself are taken out: the JSON's hold. The
    file as it was is kept beside it, with .bak after its name.
    """
    from shardwise.questionnaire.run_file import as_text
    from shardwise.questionnaire.save import save
    from shardwise.questionnaire.tables import changes_table, screen
    from shardwise.questionnaire.update import updated

    console = screen()
    path = config_file or _own_default()
    update = updated(path)
    if not update.changes:
        console.print(f"{path} needs no change.")
        return
    kept = save(path, as_text(update.run, path))
    console.print(changes_table(update.changes))
    console.print(f"{path} is written; as it was before, it is kept in {kept}.")


def _own_default() -> Path:
    import os

    from shardwise.config.run.places import own_default

    return own_default(os.environ)


def _asked() -> "Answers":
    """The answers of somebody at the terminal."""
    from shardwise.questionnaire.answers_file import EXAMPLE
    from shardwise.questionnaire.terminal import INTRODUCTION, TerminalAsker, need_a_terminal

    need_a_terminal(EXAMPLE)

    from shardwise.launch.machine import this_machine
    from shardwise.questionnaire.interview import interview
    from shardwise.questionnaire.questions import questions
    from shardwise.questionnaire.tables import screen

    console = screen()
    console.print(INTRODUCTION)
    try:
        return interview(questions(this_machine()), TerminalAsker(console))
    except (KeyboardInterrupt, EOFError):
        typer.echo("Left before the end: no file was written.", err=True)
        raise typer.Exit(130) from None  # 128 + SIGINT


def _from_file(path: Path) -> "Answers":
    from shardwise.launch.machine import this_machine
    from shardwise.questionnaire.answers_file import answered, read_answers
    from shardwise.questionnaire.questions import questions

    return answered(questions(this_machine()), read_answers(path))


def _defaults(given: "Answers") -> "Answers":
    from shardwise.config.source import Source
    from shardwise.launch.machine import this_machine
    from shardwise.questionnaire.answers_file import answered
    from shardwise.questionnaire.questions import questions

    return answered(questions(this_machine()), Source("The command line", dict(given)))


def _write(answers: "Answers", config_file: Path | None) -> None:
    """Write the config file; show what it means for a run, and how to start one."""
    import shlex

    from shardwise.questionnaire.outcome import outcome_of
    from shardwise.questionnaire.save import save
    from shardwise.questionnaire.tables import screen, settings_table

    path = config_file or _own_default()
    outcome = outcome_of(answers, path)  # before anything is written: a fault leaves the old file as it is
    kept = save(path, outcome.text)
    console = screen()
    console.print(settings_table(outcome.resolved))
    for warning in (*outcome.resolved.warnings, *outcome.notes):
        console.print(f"note: {warning}")
    console.print(f"The configuration is saved at {path}")
    if kept is not None:
        console.print(f"The file that was there before is kept in {kept}")
    named = f"--config_file {shlex.quote(str(path))} " if config_file is not None else ""
    console.print(f"To train with it: shardwise launch {named}train.py")
