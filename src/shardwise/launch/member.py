"""A machine's launcher, where another machine has started it: `python -m shardwise.launch.member RANK PARENT CAPSULE`.

It is what `node` becomes. From here on the machine does what it would have done had a user typed the command on it.
"""

import os
import signal
import sys
import threading
import time

from rich.console import Console

from shardwise.errors import ConfigError, ShardwiseError
from shardwise.launch import runner
from shardwise.launch.capsule import Capsule
from shardwise.launch.gathering import Misfit, come_together
from shardwise.launch.job import resolve_job
from shardwise.launch.machine import this_machine

PATIENCE_SECONDS = 180  # for the other machines, which one command starts at about the same time
_LOOK_SECONDS = 0.5
_STUCK_SECONDS = 20.0


def main() -> int:
    """Runs this machine's part; returns the exit status."""
    rank, parent, capsule = int(sys.argv[1]), int(sys.argv[2]), Capsule.unpack(sys.argv[3])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    console = Console(stderr=True)
    host = capsule.hosts[rank].name
    try:
        return _run(rank, capsule, runner.Member(host, PATIENCE_SECONDS, shares_screen=True), console)
    except Misfit as error:
        if rank == 0:  # every machine has the same words
            _print_error(console, str(error))
    except ShardwiseError as error:
        _print_error(console, f"on {host}: {error}")
    return 2


def _run(rank: int, capsule: Capsule, member: runner.Member, console: Console) -> int:
    request = capsule.request_of(rank)
    try:
        job = resolve_job(request, this_machine())
    except ConfigError as error:
        if request.meeting.num_machines > 1:  # so that the others do not wait for this one
            come_together(request.meeting, member.host, {"error": str(error)}, PATIENCE_SECONDS)
        raise
    return runner.run(job, capsule.asked, console, member)


def _end_with(parent: int) -> None:
    """Ends this process like a request to, once what has started it is gone: the connection, or the launcher."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STUCK_SECONDS)
    os._exit(128 + signal.SIGTERM)  # the guard ends the ranks


def _print_error(console: Console, text: str) -> None:
    console.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
