"""The entry point of the `shardwise` command.

Only typer and rich are loaded here; a sub-command loads what it needs when it runs, so that `--help` answers at once.
"""

import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from shardwise.commands.bench_storage import bench_storage
from shardwise.commands.config import config_app
from shardwise.commands.consolidate import consolidate
from shardwise.commands.convert import convert
from shardwise.commands.env import env
from shardwise.commands.explain import explain
from shardwise.commands.group import Commands
from shardwise.commands.launch import launch
from shardwise.commands.selftest import test
from shardwise.errors import ShardwiseError

app = typer.Typer(
    name="shardwise",
    cls=Commands,
    help="Train models larger than one device's memory: ZeRO on torch.distributed.",
    epilog="Example: shardwise launch train.py --epochs 3",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("launch", help=launch.__doc__)(lambda: None)  # its place in the list; see group.py
app.command(epilog="Example: shardwise env")(env)
app.add_typer(config_app, name="config")
app.command(
    context_settings={"ignore_unknown_options": True, "token_normalize_func": lambda name: name.replace("-", "_")},
    epilog="Example: shardwise explain ds_config.json --num_processes 8 --parameters 7B",
)(explain)
app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Example: shardwise test --num_processes 2 --zero_stage 3",
)(test)
app.command(
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    epilog="Example: shardwise consolidate checkpoints weights --dtype bf16 --max-shard-size 2GB",
)(consolidate)
app.command(epilog="Example: shardwise bench-storage /mnt/nvme --size 4GB")(bench_storage)
app.command(epilog="Example: shardwise convert deepspeed_checkpoints checkpoints --tag global_step1000")(convert)


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
