"""`shardwise env`: versions and facts of the machine, for a bug report."""

from importlib.metadata import PackageNotFoundError, version

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
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def env() -> None:
    """Show versions and facts of this machine: paste them into a bug report."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="shardwise env", show_header=False)
    for name, value in _facts():
        table.add_row(name, value)
    Console(soft_wrap=True).print(table)


def _facts() -> list[tuple[str, str]]:
    import os
    import platform

    import psutil
    import torch
    import torch.distributed

    from shardwise.launch.machine import this_machine

    machine = this_machine()
    facts = [
        ("shardwise", _version("shardwise")),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
        ("cores", f"{machine.num_cores} for this process, {os.cpu_count()} in all"),
        ("memory", f"{psutil.virtual_memory().total / 2**30:.1f} GiB"),
        *((name, _version(name)) for name in PACKAGES),
        ("gloo", "yes" if torch.distributed.is_gloo_available() else "not in this build of torch"),
    ]
    if torch.version.cuda is None:
        facts.append(("CUDA", "not in this build of torch"))
    else:
        facts.append(("CUDA", torch.version.cuda))
        nccl = torch.cuda.nccl.version()
        facts.append(("NCCL", ".".join(map(str, nccl))))
    for index in range(machine.num_gpus):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.1f} GiB"
        facts.append((f"GPU {index}", f"{gpu.name}, {memory}, capability {gpu.major}.{gpu.minor}"))
    if machine.num_gpus == 0:
        facts.append(("GPUs", "none that torch sees"))
    facts += [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
