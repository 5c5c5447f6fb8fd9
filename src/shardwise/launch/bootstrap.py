"""The first code of every rank: signs the rank in with the guard, then becomes the user's program.

Run by path (`python bootstrap.py RUN_DIRECTORY`) and from the standard library alone, so that neither the package nor
torch is loaded before the program asks for it. An uncaught exception is written down, in the form that torch's elastic
agent reads, instead of being printed by every rank at once; the launcher prints the one that ended the run.
"""

import atexit
import faulthandler
import json
import os
import runpy
import shutil
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType


def main() -> None:
    """Signs in, leaves if the launcher is gone, and runs the program named in the run directory."""
    run_directory = Path(sys.argv[1])
    try:
        job = json.loads((run_directory / "job.json").read_text())
        sign_in(run_directory / "ranks")
    except FileNotFoundError:
        sys.exit("The run is over: its directory is gone.")
    # After signing in: either the guard has seen this rank, or the launcher was gone before and is missed here.
    if os.getppid() != job["launcher_pid"]:
        sys.exit("The run is over: its launcher is gone.")
    if job["kind"] == "command":
        os.execv(shutil.which(job["program"]) or job["program"], [job["program"], *job["arguments"]])
    run_python(job["program"], job["arguments"], is_module=job["kind"] == "module")


def sign_in(directory: Path) -> None:
    """Names this process, the leader of its group, to the guard, with what tells it from a later owner of its pid."""
    stat = Path("/proc/self/stat")
    (directory / str(os.getpid())).write_text(stat.read_text() if stat.exists() else "")


def run_python(program: str, arguments: list[str], *, is_module: bool) -> None:
    """Runs a script or a module as Python itself would have run it without a launcher."""
    outcome = Outcome()
    faulthandler.enable()
    sys.excepthook = outcome.uncaught
    atexit.register(outcome.leave)
    sys.argv = [program, *arguments]
    if not sys.flags.safe_path:  # else Python has put none of our directories in front, and would put none of theirs
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(program))
    try:
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as leaving:
        outcome.left(leaving)
        raise


class Outcome:
    """How the program ended, as far as it ended badly."""

    def __init__(self) -> None:
        self.exit_code = 0

    def uncaught(self, kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
        """The rank's `sys.excepthook`: keeps the traceback for the launcher, without the frames above the program."""
        self.exit_code = 1
        hidden = {__file__, runpy.__file__, "<frozen runpy>"}
        while frames is not None and frames.tb_frame.f_code.co_filename in hidden:
            frames = frames.tb_next
        summary = traceback.format_exception_only(kind, error)[-1].strip()
        leave_error(summary, stack="".join(traceback.format_exception(kind, error, frames)))

    def left(self, leaving: SystemExit) -> None:
        """Keeps for the launcher when and with what the program called `sys.exit`, if that says it failed."""
        if leaving.code is not None and leaving.code != 0:
            self.exit_code = leaving.code if isinstance(leaving.code, int) else 1
            leave_error(f"It left with sys.exit({leaving.code!r}).", stack="")

    def leave(self) -> None:
        """Ends a failed rank before native teardown, as the last of its `atexit` functions: it is registered first.

        There, threads of a process group that still wait for peers may abort the process, with noise of their own and
        an exit code that hides the error's.
        """
        if self.exit_code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_code & 0xFF)


def leave_error(summary: str, stack: str) -> None:
    """Leaves this rank's error for the launcher."""
    write_error_file(summary, stack, os.environ["TORCHELASTIC_ERROR_FILE"], time.time())


def write_error_file(summary: str, stack: str, path: str, time_seconds: float) -> None:
    """Writes an error file of torch's elastic agent, with the time to more than its whole second."""
    details = {"py_callstack": stack, "timestamp": str(int(time_seconds)), "time": time_seconds}
    # Renamed into place: the agent may read while this rank is being ended.
    with open(path + ".part", "w") as file:
        json.dump({"message": {"message": summary, "extraInfo": details}}, file)
    os.replace(path + ".part", path)


if __name__ == "__main__":
    main()
