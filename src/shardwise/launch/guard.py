"""The process that outlives the launcher, if only for a moment, and ends whatever its ranks have left running.

Run by path (`python guard.py RUN_DIRECTORY`) from the standard library alone. Its standard input is a pipe whose other
end the launcher alone holds: it closes when the launcher closes it, and also when the launcher is killed in any way.
"""

import os
import shutil
import signal
import sys
from pathlib import Path


def main() -> None:
    """Waits for the launcher's end, ends every process group that a rank has signed in, and removes the directory."""
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(request, signal.SIG_IGN)  # the guard ends after its launcher, never before
    run_directory = Path(sys.argv[1])
    sys.stdin.buffer.read()
    # Renamed first: a rank that starts only now finds no directory to sign in to, and leaves by itself.
    closed = run_directory.rename(run_directory.with_name(run_directory.name + ".closed"))
    end_groups(closed / "ranks")
    shutil.rmtree(closed, ignore_errors=True)


def end_groups(signed_in: Path) -> None:
    """Kills the process group of every rank that has signed in there."""
    for entry in signed_in.iterdir():
        end_group(int(entry.name), signed_in_as=entry.read_text())


def end_group(leader: int, signed_in_as: str) -> None:
    """Kills the rank's process group, if its number has not gone to another process since.

    While a member of the group lives, the system does not give the leader's number away.
    """
    try:
        now = Path(f"/proc/{leader}/stat").read_text()
    except OSError:
        now = ""  # no such process any more, or no /proc here
    if now and signed_in_as and start_time(now) != start_time(signed_in_as):
        return
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # nothing of it runs any more (macOS says PermissionError for a group of zombies)


def start_time(stat: str) -> str:
    """Field 22 of /proc/PID/stat (see proc(5)): clock ticks from boot to the start of the process."""
    # Fields are counted from behind the program's name (field 2), which may hold spaces and parentheses itself.
    return stat.rpartition(")")[2].split()[19]


if __name__ == "__main__":
    main()
