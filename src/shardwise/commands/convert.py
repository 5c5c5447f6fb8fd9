"""`shardwise convert`: checkpoints of others into ours, and ours into those of others."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """What can be written."""

    SHARDWISE = "shardwise"
    DCP = "dcp"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Directory of checkpoints, or a checkpoint: DeepSpeed's, universal, or ours.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str, typer.Argument(metavar="DST", help="Directory that the result goes to.", show_default=False)
    ],
    tag: Annotated[
        str | None, typer.Option("--tag", "-t", help="Which checkpoint; default: the one that `latest` names.")
    ] = None,
    to: Annotated[
        Format, typer.Option("--to", help="shardwise: any engine of ours loads it; dcp: torch.distributed.checkpoint.")
    ] = Format.SHARDWISE,
    model: Annotated[int, typer.Option("--model", help="Which one, where several were saved together.")] = 0,
) -> None:
    """Turn DeepSpeed's checkpoints into ours, or ours into torch's: no GPU, no model, no process group."""
    from shardwise.checkpoint.convert import convert_checkpoint, find_source

    own = find_source(Path(source), tag)
    if to is Format.DCP:
        _to_dcp(own, Path(output), model)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not Console(stderr=True).is_terminal) as progress:
        task = progress.add_task("converting", total=None)

        def wrote(nbytes: int, left: int) -> None:
            progress.update(task, advance=1, total=progress.tasks[task].completed + 1 + left)

        written = convert_checkpoint(own, Path(output), wrote)
    print(f"{own} is now {written}: load_checkpoint({output!r}) reads it on any number of ranks, at any stage.")


def _to_dcp(own: Path, output: Path, model: int) -> None:
    from shardwise.checkpoint.dcp import write_dcp
    from shardwise.checkpoint.load import Checkpoint

    with Checkpoint(own) as checkpoint:
        write_dcp(checkpoint, output, model)
    print(f"{own} is now {output}: torch.distributed.checkpoint.load reads it.")
