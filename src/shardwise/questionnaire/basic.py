"""The questionnaire's defaults as a file, for notebooks and scripts that set a machine up."""

import os
from pathlib import Path
from typing import Literal

from shardwise.config.run.places import own_default
from shardwise.config.source import Source
from shardwise.launch.machine import this_machine
from shardwise.questionnaire.answers_file import answered
from shardwise.questionnaire.outcome import outcome_of
from shardwise.questionnaire.questions import questions
from shardwise.questionnaire.save import save


def write_basic_config(
    mixed_precision: str = "no", save_location: str | os.PathLike[str] | None = None
) -> Path | Literal[False]:
    """Write a config file with every question's default, unless there is one already.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        save_location: the file; the default place if None.

    Returns:
        The path of the file; False where a file was there, which stays as it is.
    """
    path = own_default(os.environ) if save_location is None else Path(save_location)
    if path.exists():
        return False
    answers = answered(
        questions(this_machine()), Source("write_basic_config()", {"mixed_precision": mixed_precision.lower()})
    )
    save(path, outcome_of(answers, path).text)
    return path
