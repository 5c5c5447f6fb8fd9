"""Which start of a run this process belongs to: `shardwise launch` starts every rank anew after a fault, and counts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_OWN = re.compile(r"[0-9a-f]{32}")  # as our launcher names runs; torchrun calls many of them "none"
_WORDS = re.compile(r"attempt (\d{1,6}) of run ([0-9a-f]{32})\Z")


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks of a run."""

    run: str
    """Names the run: 32 hexadecimal digits that no other run has."""
    number: int
    """From 0."""

    def __str__(self) -> str:
        return f"attempt {self.number} of run {self.run}"

    @classmethod
    def from_text(cls, text: str) -> Attempt | None:
        """The attempt whose words end ``text``."""
        found = _WORDS.search(text)
        return None if found is None else cls(found[2], int(found[1]))

    def follows(self, other: Attempt | None) -> bool:
        """Whether this is a later start of the same run: the launcher has given the other one up."""
        return other is not None and self.run == other.run and self.number > other.number


def attempt_of(environ: Mapping[str, str]) -> Attempt | None:
    """A rank's attempt, from the variables that torch's elastic agent sets; None where no name tells runs apart."""
    run, number = environ.get("TORCHELASTIC_RUN_ID", ""), environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return Attempt(run, int(number)) if _OWN.fullmatch(run) and number.isdecimal() else None
