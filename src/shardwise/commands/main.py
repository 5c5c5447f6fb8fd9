"""The entry point of the `shardwise` command.

Only typer and rich are loaded here; a sub-command loads what it needs when it runs, so that `--help` answers at once.
"""

import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from shardwise.commands.env import env
from shardwise.commands.launch import launch
from shardwise.errors import ShardwiseError

app = typer.Typer(
    name="shardwise",
    help="Train models larger than one device's memory: ZeRO on torch.distributed.",
    epilog="Example: shardwise launch train.py --epochs 3",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(
    context_settings={
        # After the script's name every argument is the script's, whatever it looks like.
        "allow_interspersed_args": False,
        # --num-processes and --num_processes are one option.
        "token_normalize_func": lambda name: name.replace("-", "_"),
    },
    epilog="Example: shardwise launch --num_processes 2 train.py --epochs 3",
)(launch)
app.command(epilog="Example: shardwise env")(env)


@app.callback()
def _shardwise() -> None:
    """Keeps sub-commands named even while there is only one."""


def main() -> NoReturn:
    """Runs the command line: a mistake of the user's is a short message and exit code 2, without a traceback."""
    console = Console(stderr=True)
    try:
        app()
    except ShardwiseError as error:
        message = Text.assemble(("error: ", "bold red"), str(error))
        console.print(message, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT
    sys.exit(0)


if __name__ == "__main__":
    main()
