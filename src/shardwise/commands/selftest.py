"""`shardwise test`: a short job under a configuration, and a verdict on each thing that training needs."""

import typer
from typer.core import TyperGroup

from shardwise.errors import ConfigError, StateError

JOB = "shardwise.selftest"


def test(context: typer.Context) -> None:
    """Check that this machine can train under a configuration: group, collectives, a few steps, equal weights.

    Takes the options of `shardwise launch` (--config_file, --num_processes, --zero_stage, …) and no script. The job
    takes seconds. Exit code 0 where every check passed, else 1; 2 where the configuration is refused at once.
    """
    import tempfile
    from pathlib import Path

    from rich.console import Console

    from shardwise.selftest.book import CHECKS, read_books
    from shardwise.selftest.report import all_passed, judge, show

    with tempfile.TemporaryDirectory(prefix="shardwise-test-") as directory:
        status = _launch(context, directory)
        if status is None:
            return
        books = read_books(Path(directory))
        if not books:
            raise StateError("No rank came as far as the first check. What is printed above says why.")
        lines = judge(CHECKS, books)
        show(lines, len(books), Console())
    if all_passed(lines) and status != 0:
        Console(stderr=True).print(f"A rank ended badly after its checks (exit code {status}); see above.", style="red")
    raise typer.Exit(0 if all_passed(lines) and status == 0 else 1)


def _launch(context: typer.Context, directory: str) -> int | None:
    """Run the job by `launch`, with the options that were given; its exit status, or None after a dry run."""
    group = context.find_root().command
    assert isinstance(group, TyperGroup)
    _, launcher, _ = group.resolve_command(context.find_root(), ["launch"])
    assert launcher is not None
    words = [*context.args, "--module", JOB, directory]
    with launcher.make_context("launch", words, parent=context.parent) as inner:
        if inner.params["program"] != JOB:
            raise ConfigError(
                f"`shardwise test` runs a job of its own and takes no script, but found {inner.params['program']!r}. "
                "Give options of `shardwise launch` alone; a config goes after --config_file."
            )
        try:
            launcher.invoke(inner)
        except typer.Exit as leaving:
            return None if inner.params.get("dry_run") else leaving.exit_code
    return None
