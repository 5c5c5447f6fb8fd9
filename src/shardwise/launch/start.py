"""Running the command lines that start a run on its machines, and ending them with it."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shardwise.errors import ConfigError
from shardwise.launch.runner import guarded_directory
from shardwise.launch.starters import Start

_LOOK_SECONDS = 0.1
# After one machine's end the others have this long: they know the cause by then, and end with it on the screen.
FAREWELL_SECONDS = 30.0
_GRACE_SECONDS = 15.0  # to end when asked to
_CANNOT_CONNECT = 255  # ssh's own exit status


class _Asked(BaseException):
    """A signal that asks this process to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def start(starts: Sequence[Start], console: Console, num_spare: int = 0) -> int:
    """Runs all of `starts` to their end; returns the exit status of the first that failed, or 0.

    So many of them as `num_spare` says may fail but the first, which is machine 0's and knows how the run has ended.

    Each is the leader of a process group of its own that a guard ends with this process, however that ends. The
    machines notice by themselves that what started them is gone.
    """
    with guarded_directory({}) as directory:
        running: list[tuple[subprocess.Popen[bytes], Start]] = []
        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, _raise) for number in handled}
        try:
            for each in starts:
                running.append((_process(each, directory / "ranks"), each))
            return _wait(running, console, num_spare)
        except _Asked as asked:
            console.print(
                f"Ended by {signal.Signals(asked.number).name}; every machine ends its ranks.", style="yellow"
            )
            _end([process for process, _ in running])
            return 128 + asked.number
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_address(address: str) -> None:
    """Raises ConfigError if the machines' meeting place is a name that nobody here knows."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise ConfigError(
            f"the machines are to meet at {address}, and this machine knows no such name ({error.strerror}): a name of "
            "~/.ssh/config is known to ssh alone. Give --main_process_ip, an address of the first machine."
        ) from None


def _raise(number: int, frame: object) -> None:
    raise _Asked(number)


def _process(start: Start, signed_in: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        start.vector,
        env={**os.environ, **start.variables},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # out of reach of the terminal's Ctrl-C: it comes here, and ends all in order
    )
    stat = Path(f"/proc/{process.pid}/stat")
    (signed_in / str(process.pid)).write_text(stat.read_text() if stat.exists() else "")
    return process


def _wait(running: list[tuple[subprocess.Popen[bytes], Start]], console: Console, num_spare: int) -> int:
    status, deadline = 0, float("inf")
    waiting = list(running)
    first, _ = running[0]
    while waiting and time.monotonic() < deadline:
        ended = [(process, start) for process, start in waiting if process.poll() is not None]
        for process, start in ended:
            waiting.remove((process, start))
            code = process.returncode if process.returncode >= 0 else 128 - process.returncode
            if code == _CANNOT_CONNECT and len(start.hosts) == 1:
                words = f"{start.vector[0]} has lost {start.hosts[0]}, or never reached it."
                console.print(words, markup=False, highlight=False, soft_wrap=True)
            if code and num_spare and process is not first:
                num_spare -= 1
            elif code and not status:
                patience = _GRACE_SECONDS if code == _CANNOT_CONNECT else FAREWELL_SECONDS
                status, deadline = code, time.monotonic() + patience
        time.sleep(_LOOK_SECONDS)
    _end([process for process, _ in waiting])
    return status


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
