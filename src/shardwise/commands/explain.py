"""`shardwise explain`: every setting in force, who said it, what it does and what it costs."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shardwise.explain.rows import Explanation


def explain(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG]... [FLAGS OF LAUNCH]...",
            help="A run's YAML, a DeepSpeed JSON, or both; none: the default config. Flags that set something, such "
            "as --zero_stage 3, count as they do for `launch`.",
            show_default=False,
        ),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option("--num_processes", "-n", help="Ranks of the run: adds the batch of a step.")
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option("--parameters", metavar="N", help="Size of the model (350M, 7B): adds model states a rank."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show untouched defaults as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show every setting that a run would have: value, where it was said, what it does to memory and traffic.

    Exit code 2 where the run would be refused.
    """
    import os

    from rich.console import Console

    from shardwise.explain import show
    from shardwise.explain.read import read, split
    from shardwise.explain.rows import explain as explain_settings
    from shardwise.explain.states import num_ranks_for, parse_count, states_per_rank

    flags, files = split(words or [])
    if num_processes is not None:
        flags["num_processes"] = num_processes
    asked, notes = read(files, flags, os.environ)
    explanation = explain_settings(asked)
    states = None
    if parameters is not None:
        num_parameters = parse_count(parameters)
        num_ranks = num_ranks_for(explanation.resolved["num_processes"])
        states = states_per_rank(explanation.config, num_parameters, num_ranks)
    verdicts = tuple(_verdicts(explanation))
    if as_json:
        print(show.as_json(explanation, states, verdicts, everything))
    else:
        for note in notes:
            Console(stderr=True).print(note, markup=False, highlight=False, soft_wrap=True)
        show.show(explanation, states, verdicts, Console(), everything)
    raise typer.Exit(2 if verdicts else 0)


def _verdicts(explanation: "Explanation") -> list[str]:
    """Why the run would be refused."""
    from shardwise.errors import ConfigError

    verdicts = []
    if explanation.refused:
        names = ", ".join(explanation.refused)
        verdicts.append(f"The run will be refused: {names} cannot work here; the rows above say why.")
    try:
        explanation.check_batch()
    except ConfigError as error:
        verdicts.append(f"The run will be refused: {error}")
    return verdicts
