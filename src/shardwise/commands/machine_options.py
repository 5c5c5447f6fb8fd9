"""The options of `shardwise launch` that are no settings of a run: how its machines are reached."""

import inspect
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from shardwise.errors import ConfigError
from shardwise.launch.cluster_files import ManifestKind

PANEL = "Several machines"


@dataclass(frozen=True)
class MachineOptions:
    """What these options say."""

    nnodes: str | None = None
    launcher_args: str | None = None
    forward_env: str | None = None
    slurm_script: Path | None = None
    k8s_manifest: Path | None = None
    k8s_kind: str = ManifestKind.PYTORCH_JOB
    k8s_image: str | None = None

    @property
    def of_a_launcher(self) -> str | None:
        """One of these options that only a launcher of other machines can follow, if it was given."""
        given = {"--launcher_args": self.launcher_args, "--forward_env": self.forward_env}
        return next((name for name, value in given.items() if value is not None), None)

    @property
    def as_flags(self) -> dict[str, Any]:
        """What must be said again where a scheduler runs the command; None for what was not said."""
        return {"nnodes": self.nnodes, "launcher_args": self.launcher_args, "forward_env": self.forward_env}

    @property
    def machines(self) -> tuple[int, int] | None:
        """The fewest and the most that --nnodes allows; None where it was not given."""
        if self.nnodes is None:
            return None
        least, colon, most = self.nnodes.partition(":")
        numbers = [least, most] if colon else [least, least]
        if not all(number.isascii() and number.isdecimal() and int(number) > 0 for number in numbers):
            raise ConfigError(f"--nnodes is {self.nnodes!r}, expected a number of machines, or the fewest:the most.")
        fewest, count = map(int, numbers)
        if fewest > count:
            raise ConfigError(f"--nnodes is {self.nnodes}, expected the smaller number first: {count}:{fewest}.")
        return fewest, count

    @property
    def more_arguments(self) -> tuple[str, ...]:
        """The launcher's own, split as a shell would; nothing in them is executed or replaced."""
        try:
            return tuple(shlex.split(self.launcher_args or ""))
        except ValueError as error:
            raise ConfigError(f"--launcher_args is {self.launcher_args!r}: {error}. Close its quotes.") from None

    @property
    def more_variables(self) -> tuple[str, ...]:
        """The names of --forward_env."""
        return tuple(name.strip() for name in (self.forward_env or "").split(",") if name.strip())

    @property
    def manifest_kind(self) -> ManifestKind:
        """The kind of --k8s_kind, in whatever case it was written."""
        by_name = {kind.lower(): kind for kind in ManifestKind}
        if self.k8s_kind.lower() not in by_name:
            raise ConfigError(f"--k8s_kind is {self.k8s_kind!r}, expected {' or '.join(ManifestKind)}.")
        return by_name[self.k8s_kind.lower()]


_HELP = {
    "nnodes": ("TEXT", "Machines, as torchrun has it: 2, or 1:2 for a run that goes on with 1 after a fault."),
    "launcher_args": ("TEXT", "More arguments for pdsh, ssh, mpirun or srun, such as '-l user'."),
    "forward_env": ("NAMES", "Environment variables to take along, beside the usual ones; comma-separated."),
    "slurm_script": ("FILE", "Write a script for sbatch; start nothing. - is the screen."),
    "k8s_manifest": ("FILE", "Write a manifest for Kubernetes; start nothing. - is the screen."),
    "k8s_kind": ("WORD", "What it is of: PyTorchJob or JobSet."),
    "k8s_image": ("IMAGE", "The container image of its pods, which has shardwise and the script."),
}


def parameters() -> Iterator[inspect.Parameter]:
    """These options as a command declares them."""
    kinds = get_type_hints(MachineOptions)
    for field in fields(MachineOptions):
        metavar, words = _HELP[field.name]
        option = typer.Option(
            f"--{field.name}",
            metavar=metavar,
            help=words,
            rich_help_panel=PANEL,
            show_default=str(field.default) if field.default is not None else False,
        )
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[kinds[field.name], option],
        )


def taken_from(options: dict[str, Any]) -> MachineOptions:
    """These options, which leave `options`."""
    return MachineOptions(**{field.name: options.pop(field.name) for field in fields(MachineOptions)})
