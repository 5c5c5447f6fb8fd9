"""`shardwise env`: versions and facts of the machine, for a bug report."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "deepspeed",
)
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "TORCH_DISTRIBUTED_DEBUG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HOME",
    "XDG_CONFIG_HOME",
    "TMPDIR",
)
# Settings whose values are the user's own words, in which a password or a token may stand.
_KEPT_BACK = ("tpu_env", "commands", "command_file", "fsdp_config", "megatron_lm_config", "mpirun_config")

Facts = list[tuple[str, str]]


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False) -> None:
    """Show versions, devices and the default config of this machine: paste them into a bug report.

    No environment variable is shown but those that decide how ranks run, and nothing that may be a secret.
    """
    import json

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    facts = [*_software(), *_machine(), *_variables(), *_default_config()]
    if as_json:
        print(json.dumps(dict(facts), indent=2, ensure_ascii=False))
        return
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        for name, value in facts:
            print(f"- {name}: {value}")
        return
    table = Table(title="shardwise env", show_header=False)
    for name, value in facts:
        table.add_row(name, Text(value))
    console.print(table)


def _software() -> Facts:
    import platform

    import torch
    import torch.distributed

    facts = [
        ("shardwise", _version("shardwise")),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
        *((name, _version(name)) for name in PACKAGES),
        ("torch build", _torch_build()),
        ("gloo", "yes" if torch.distributed.is_gloo_available() else "not in this build of torch"),
    ]
    if torch.version.cuda is None:
        facts.append(("CUDA", "not in this build of torch"))
    else:
        facts.append(("CUDA", torch.version.cuda))
    has_nccl = torch.version.cuda is not None and torch.distributed.is_nccl_available()
    facts.append(("NCCL", ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"))
    return facts


def _torch_build() -> str:
    import torch

    kind = torch.version.cuda or torch.version.hip
    commit = torch.version.git_version or "unknown"
    return f"{torch.__version__}, {f'for {kind}' if kind else 'CPU only'}, commit {commit[:12]}"


def _machine() -> Facts:
    import os
    import shutil
    import tempfile

    import psutil
    import torch

    from shardwise.launch.machine import this_machine

    machine = this_machine()
    memory = psutil.virtual_memory()
    facts = [
        ("cores", f"{machine.num_cores} for this process, {os.cpu_count()} in all"),
        ("memory", f"{_gib(memory.total)}, {_gib(memory.available)} available"),
    ]
    places = {"working directory": str(Path.cwd()), "temporary files": tempfile.gettempdir(), "/dev/shm": "/dev/shm"}
    for name, place in places.items():
        if Path(place).is_dir():
            disk = shutil.disk_usage(place)
            facts.append((f"disk, {name}", f"{_gib(disk.free)} free of {_gib(disk.total)}"))
    for index in range(machine.num_gpus):
        gpu = torch.cuda.get_device_properties(index)
        facts.append((f"GPU {index}", f"{gpu.name}, {_gib(gpu.total_memory)}, capability {gpu.major}.{gpu.minor}"))
    if machine.num_gpus == 0:
        facts.append(("GPUs", "none that torch sees"))
    return facts


def _variables() -> Facts:
    import os

    return [(name, os.environ[name]) for name in VARIABLES if name in os.environ]


def _default_config() -> Facts:
    """The config that `launch` takes where it is given none, setting by setting."""
    import os

    from shardwise.config.run.places import accelerate_default, own_default

    own = own_default(os.environ)
    path = own if own.is_file() else accelerate_default(os.environ)
    if path is None:
        return [("default config", f"none ({own} does not exist)")]
    return [("default config", str(path)), *_settings_in(path)]


def _settings_in(path: Path) -> Iterator[tuple[str, str]]:
    from shardwise.config.messages import shown
    from shardwise.config.run.file import file_mentions, read_run_file
    from shardwise.errors import ConfigError

    try:
        mentions = file_mentions(read_run_file(path))
    except ConfigError:  # its message quotes what it found, which may be a secret
        yield "default config, faults", "it cannot be used; `shardwise explain` says why"
        return
    for name, said in mentions.items():
        kept_back = name in _KEPT_BACK and said.value
        value = said.value if isinstance(said.value, str) else shown(said.value)
        yield f"default config, {name}", "(set, not shown)" if kept_back else value


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
