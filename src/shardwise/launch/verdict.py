"""How a run on several machines ended badly: one account, that every machine gives alike."""

import json
import signal
from dataclasses import asdict, dataclass
from enum import StrEnum

from rich.console import Console

from shardwise.launch.failure import RankFailure, in_order, print_failures


class Ending(StrEnum):
    """What came first."""

    FAILED = "failed"  # a rank
    LOST = "lost"  # a machine was not heard of any more
    SIGNALLED = "signalled"  # a machine's launcher was asked to end


@dataclass(frozen=True)
class Verdict:
    """The first of what went wrong, and where."""

    ending: Ending
    machine_rank: int
    host: str
    failures: tuple[RankFailure, ...] = ()  # where ranks failed, the first one first
    num_processes: int = 0
    words: str = ""  # where a machine was lost: how that was seen
    signal_number: int = 0

    @property
    def status(self) -> int:
        """The exit status that each machine's launcher owes its caller."""
        if self.failures:
            return self.failures[0].status
        return 128 + self.signal_number if self.signal_number else 1

    def print(self, console: Console) -> None:
        """Shows it."""
        match self.ending:
            case Ending.FAILED:
                print_failures(list(self.failures), self.num_processes, console)
            case Ending.LOST:
                console.rule(f"machine {self.machine_rank} ({self.host}) is lost", style="red", characters="─")
                console.print(self.words, markup=False, highlight=False, soft_wrap=True)
            case Ending.SIGNALLED:
                name = signal.Signals(self.signal_number).name
                console.print(
                    f"Machine {self.machine_rank} ({self.host}) was ended by {name}; every rank of the run is ended.",
                    style="yellow",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )

    def pack(self) -> str:
        """Write it as text for the other machines."""
        return json.dumps(asdict(self))

    @classmethod
    def unpack(cls, text: str | bytes) -> "Verdict":
        """Read what `pack` wrote."""
        data = json.loads(text)
        failures = tuple(RankFailure(**failure) for failure in data["failures"])
        return cls(**data | {"ending": Ending(data["ending"]), "failures": failures})


def first_of(verdicts: list[Verdict]) -> Verdict:
    """One account from those of several machines: ranks' own errors first, as they say why the rest followed."""
    failed = [verdict for verdict in verdicts if verdict.failures]
    if not failed:
        return verdicts[0]
    failures = in_order(failure for verdict in failed for failure in verdict.failures)
    of_first = next(verdict for verdict in failed if failures[0] in verdict.failures)
    return Verdict(
        Ending.FAILED, of_first.machine_rank, of_first.host, tuple(failures), max(v.num_processes for v in failed)
    )
