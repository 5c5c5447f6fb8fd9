"""The list of commands, of which `launch` gets its many options only when it is called."""

from typing import Any

import typer
from typer.core import TyperGroup

from shardwise.commands.launch import launch


class Commands(TyperGroup):
    """The schema from which the options of `launch` are made is loaded for `launch` alone, not for a list."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Finds the command that `args` begin with."""
        if args and args[0] == "launch":
            self.commands["launch"] = _launch_command()
        return super().resolve_command(ctx, args)


def _launch_command() -> Any:
    from shardwise.commands.launch_options import with_settings

    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(
        "launch",
        context_settings={
            # After the script's name every argument is the script's, whatever it looks like.
            "allow_interspersed_args": False,
            # --num-processes and --num_processes are one option.
            "token_normalize_func": lambda name: name.replace("-", "_"),
        },
        epilog="Example: shardwise launch --num_processes 2 --zero_stage 3 train.py --epochs 3",
    )(with_settings(launch))
    return typer.main.get_command(alone)
