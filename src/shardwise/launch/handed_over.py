"""A rank's side of the launcher's hand-over."""

from collections.abc import Mapping
from pathlib import Path

from shardwise.config.run.handover import unpack
from shardwise.config.run.said import Asked
from shardwise.errors import StateError
from shardwise.launch.environment import RUN_VARIABLE


def handed_over(environ: Mapping[str, str]) -> Asked:
    """What was asked of the launcher that has started this process; nothing, where none has.

    Raises StateError where that launcher's run is over.
    """
    place = environ.get(RUN_VARIABLE)
    if not place:
        return Asked()
    try:
        text = Path(place).read_text()
    except OSError as error:
        raise StateError(
            f"{RUN_VARIABLE} is {place}, which cannot be read ({error.strerror}): the run that it belongs to is over. "
            f"Start the script by `shardwise launch`, or unset {RUN_VARIABLE} to run it by itself."
        ) from None
    return unpack(text)
