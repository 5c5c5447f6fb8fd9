"""Large models on one GPU with their states in host memory: ``python -m bench.gpu_offload --help``.

Each model trains in bf16 at stage 3, its activations recomputed, in a process of its own: once with the optimizer off
the GPU, once with the parameters off it, too. The bytes that cross the bus, and what of their time is hidden behind
kernels, are read from the profiler's trace of one step. One run after the other: host memory holds one at a time.

Without a GPU, ``--device cpu --sizes tiny`` goes the same way, and what only a GPU has is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import nn

from bench.device_trace import DeviceTrace, Transfer, traced
from bench.machine import machine_facts
from bench.memory import peak_resident_bytes
from bench.models import GPT, GPTShape
from bench.options import at_least, comma_separated, one_of
from bench.report import CONSOLE, print_facts, write_json
from bench.workload import Workload
from bench.world import run_in_world
from shardwise.layout import Layout, Slot, even_layout
from shardwise.optim.probe import probe_optimizer
from shardwise.store.base import round_up
from shardwise.zero.offload import Place, choose_offload
from shardwise.zero.offloading import Buffer, plan_window
from shardwise.zero.shard_states import cut_windows
from shardwise.zero.sharding import STAGES

SIZES = {
    "tiny": GPTShape(layers=3, width=64, heads=2, vocabulary=512, positions=2048),
    "1.3B": GPTShape(layers=24, width=2048, heads=16, vocabulary=50257, positions=2048),
    "6.7B": GPTShape(layers=32, width=4096, heads=32, vocabulary=50257, positions=2048),
}
LARGE = ("1.3B", "6.7B")
PLACES_OF_PARAMETERS = ("none", "cpu")
"""As ``offload_param.device`` has them; none is the GPU."""
BF16_BYTES, FP32_BYTES = 2, 4
LIBRARIES_BYTES = 5 << 30
"""Of host memory, for Python, torch and CUDA; the rest of what is free may be taken by states."""
ROOM_FILE = Path("/sys/fs/cgroup/memory.max")
USED_FILE = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class Run:
    """One model with its states in one place."""

    size: str
    parameters: str  # none or cpu
    optimizer: str  # cpu or nvme
    device: str
    path: str  # directory of files, for nvme
    batch: int  # sequences a step
    sequence: int  # tokens
    warmup: int  # steps, of which the first one makes the optimizer's state
    steps: int
    seed: int
    config: dict[str, Any]  # more of the engine's configuration

    @property
    def name(self) -> str:
        """For tables and files."""
        return f"{self.size}-{self.optimizer}" + ("" if self.parameters == "none" else f"-param-{self.parameters}")

    @property
    def engine_config(self) -> dict[str, Any]:
        """The JSON of this run."""
        own: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.batch,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": self.optimizer, "nvme_path": self.path},
                "offload_param": {"device": self.parameters},
            },
        }
        return _merged(own, self.config)


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes, before it is begun."""

    host: int
    files: int
    device: int


@dataclass(frozen=True)
class Phase:
    """One stretch of the traced step."""

    seconds: float  # under the profiler
    kernel_seconds: float
    down: Transfer
    up: Transfer


@dataclass(frozen=True)
class Measured:
    """What a run's process found."""

    parameters: int
    step_seconds: list[float]
    after_backward_seconds: list[float]
    """Of them, what was left when the GPU had done its backward: the host's step, as far as it is not hidden."""
    passes: Phase
    step: Phase
    peak_host_bytes: int
    peak_device_bytes: int | None
    last_loss: float


def main() -> None:
    """Run what the command line asks for and print it."""
    options = _parse_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.gpu_offload: torch finds no GPU on this machine. Try it out with --device cpu --sizes tiny.")
    runs = [
        Run(
            size, parameters, options.optimizer, options.device, str(options.path), options.batch, options.seq,
            options.warmup, options.steps, options.seed, options.config,
        )
        for size in options.sizes
        for parameters in options.parameters
    ]  # fmt: skip
    for run in runs:
        if missing := missing_room(predicted(run), room_here(run)):
            sys.exit(f"bench.gpu_offload: {run.name} {missing}; nothing was started.")
    facts = machine_facts() | _device_facts(options.device)
    print_facts("machine", facts)
    if options.trace is not None:
        options.trace.mkdir(parents=True, exist_ok=True)
    found: dict[str, Measured] = {}
    for run in runs:
        CONSOLE.print(f"[dim]{run.name}")
        with tempfile.TemporaryDirectory() as folder:
            traces = str(options.trace or folder)
            (found[run.name],) = run_in_world(1, options.threads, measure, run, traces)
        CONSOLE.print(f"[dim]{found[run.name].step_seconds}")
        if options.json is not None:  # after each: a run that is cut off keeps what it has
            settings = {"runs": runs, "threads": options.threads}
            needs = {run.name: predicted(run) for run in runs}
            write_json(options.json, {"machine": facts, **settings, "predicted": needs, "results": found})
    done = [(run, found[run.name]) for run in runs]
    CONSOLE.print(_speed_table(done))
    if options.device != "cpu":
        CONSOLE.print(_transfer_table(done))


def _device_facts(device: str) -> dict[str, str]:
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "CUDA": f"{torch.version.cuda}",
    }


def _merged(own: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` with the keys of ``more``, block by block."""
    both = dict(own)
    for key, value in more.items():
        block = both.get(key)
        both[key] = _merged(block, value) if isinstance(block, dict) and isinstance(value, dict) else value
    return both


# --- what a run needs ------------------------------------------------------------------------------------------------


def build_model(shape: GPTShape, dtype: torch.dtype, device: torch.device) -> GPT:
    """The model, built where it trains and in the dtype that it computes in: never wider, and not in host memory."""
    import shardwise

    with shardwise.zero.Init(dtype=dtype), device:
        return GPT(shape, recomputes=True)


def predicted(run: Run) -> Needs:
    """By the engine's own plan of a window where there is one; activations and the units at work by their shapes."""
    shape = SIZES[run.size]
    with torch.device("meta"):
        model = GPT(shape)
    layout = _layout(model)
    # What is small next to the states: the root and two blocks are whole, with gradients that travel and that are
    # averaged; inputs of all blocks, the inside of one, logits three times over.
    block = _numel(model.blocks[0])
    root = _numel(model) - shape.layers * block
    tokens = run.batch * run.sequence
    inside = BF16_BYTES * tokens * (shape.width * (shape.layers + 34) + 3 * shape.vocabulary)
    at_work = (2 * BF16_BYTES + FP32_BYTES) * (root + 2 * block) + inside
    if run.device == "cpu":  # nothing moves: all rests in host memory
        return Needs(4 * FP32_BYTES * layout.numel + at_work, 0, 0)
    offload = choose_offload(run.parameters, run.optimizer, run.device)
    traits = probe_optimizer(torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True))
    plan = plan_window(offload, Buffer(layout, torch.bfloat16, True, STAGES[3]), traits, run.device)
    in_host = offload.optimizer is Place.HOST
    size = plan.memory_bytes if in_host else plan.kept_bytes
    states = sum(round_up(size(span.numel)) for span in cut_windows(layout, layout.whole, cut_anywhere=True))
    parameters = BF16_BYTES * layout.numel
    parameters_in_host = offload.parameter is Place.HOST
    return Needs(
        host=LIBRARIES_BYTES + (states if in_host else 0) + (parameters if parameters_in_host else 0),
        files=0 if in_host else states,
        # The model is built on the device, so its parameters are there at the start in any case.
        device=parameters + at_work,
    )


def _layout(model: nn.Module) -> Layout:
    return even_layout([Slot(name, tuple(each.shape), 0) for name, each in model.named_parameters()], 1)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def minimum_up_bytes(shape: GPTShape, parameters: str) -> int:
    """Bytes that must go to the GPU in a step: new values once; or, where parameters rest in host memory, what each
    pass uses, but the root and the last block stay whole from forward to backward.
    """
    with torch.device("meta"):
        model = GPT(shape)
    whole = _numel(model)
    again = (shape.layers - 1) * _numel(model.blocks[0]) if parameters == "cpu" else 0
    return BF16_BYTES * (whole + again)


def room_here(run: Run) -> Needs:
    """Bytes that are free."""
    free = psutil.virtual_memory().available
    if ROOM_FILE.exists() and (limit := ROOM_FILE.read_text().strip()).isdecimal():
        free = min(free, int(limit) - int(USED_FILE.read_text()))
    place = os.statvfs(run.path)
    device = 0 if run.device == "cpu" else torch.cuda.mem_get_info()[0]
    return Needs(free, place.f_bavail * place.f_frsize, device)


def missing_room(needs: Needs, room: Needs) -> str:
    """What does not fit, in words; empty where everything does."""
    in_files = ", or --optimizer nvme" if needs.device else ""  # without a GPU nothing leaves host memory
    places = (
        ("host memory", needs.host, room.host, "choose a smaller size" + in_files),
        ("files", needs.files, room.files, "choose another --path, a smaller size, or --optimizer cpu"),
        ("GPU memory", needs.device, room.device, "choose a smaller size, --batch or --seq"),
    )
    for name, need, free, remedy in places:
        if need > free:
            return f"needs about {need / 2**30:.0f} GiB of {name}, and {free / 2**30:.0f} are free: {remedy}"
    return ""


# --- one run, in a process of its own --------------------------------------------------------------------------------


def measure(run: Run, traces: str) -> Measured:
    """Train and time, then trace one more step: its passes, and what is left for ``step()``, apart."""
    import shardwise

    device = torch.device(run.device)
    on_gpu = device.type == "cuda"
    workload = Workload(SIZES[run.size], run.batch, run.sequence, "adamw-fused", run.seed)
    torch.manual_seed(run.seed)
    model = build_model(workload.shape, torch.bfloat16, device)
    number = _numel(model)
    optimizer = workload.build_optimizer(model.parameters())
    engine, *_ = shardwise.initialize(model=model, optimizer=optimizer, config=run.engine_config, device=device)
    whole, left, losses = list[float](), list[float](), list[float]()

    def settle() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def passes(index: int) -> None:
        loss = engine(workload.tokens(index, 0).to(device))
        engine.backward(loss)
        settle()
        losses.append(loss.item())

    def step() -> None:
        engine.step()
        settle()

    for index in range(run.warmup + run.steps):
        if on_gpu and index == run.warmup:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        passes(index)
        computed = time.perf_counter()
        step()
        end = time.perf_counter()
        whole.append(end - begin)
        left.append(end - computed)
    peak_device = torch.cuda.max_memory_allocated() if on_gpu else None
    names = [Path(traces) / f"{run.name}-{part}.json" for part in ("passes", "step")]
    clock = [time.perf_counter()]

    def timed(work: Any) -> None:
        clock[0] = time.perf_counter()
        work()
        clock[0] = time.perf_counter() - clock[0]

    both = []
    for name, work in zip(names, (lambda: passes(run.warmup + run.steps), step), strict=True):
        trace = traced(lambda work=work: timed(work), device, name)
        both.append(_phase(clock[0], trace))
    engine.close()
    return Measured(
        number, whole[run.warmup :], left[run.warmup :], *both, peak_resident_bytes(), peak_device, losses[-1]
    )


def _phase(seconds: float, trace: DeviceTrace) -> Phase:
    return Phase(seconds, trace.kernel_seconds, trace.transfer(trace.down), trace.transfer(trace.up))


# --- the tables ------------------------------------------------------------------------------------------------------


def _speed_table(done: Sequence[tuple[Run, Measured]]) -> Table:
    table = Table(title="whole steps in bf16, states off the GPU", title_justify="left")
    table.add_column("model, where states rest")
    for column in ("tokens/s", "s a step", "of it after backward", "peak host GiB", "peak GPU GiB", "last loss"):
        table.add_column(column, justify="right")
    for run, found in done:
        seconds = statistics.median(found.step_seconds)
        device = "" if found.peak_device_bytes is None else f"{found.peak_device_bytes / 2**30:.1f}"
        table.add_row(
            run.name, f"{run.batch * run.sequence / seconds:,.0f}", f"{seconds:.2f}",
            f"{statistics.median(found.after_backward_seconds):.2f}", f"{found.peak_host_bytes / 2**30:.1f}", device,
            f"{found.last_loss:.4f}",
        )  # fmt: skip
    return table


def _transfer_table(done: Sequence[tuple[Run, Measured]]) -> Table:
    table = Table(
        title="the bus in one traced step",
        title_justify="left",
        caption="In step() the GPU computes next to nothing: copies there run beside the host's arithmetic.",
    )
    table.add_column("model, where states rest")
    table.add_column("direction")
    for column in ("B/parameter", "at least", "in passes, ms", "hidden behind kernels", "in step(), ms"):
        table.add_column(column, justify="right")
    for run, found in done:
        least = {
            "down": float(BF16_BYTES),
            "up": minimum_up_bytes(SIZES[run.size], run.parameters) / found.parameters,
        }
        for direction in ("down", "up"):
            passes: Transfer = getattr(found.passes, direction)
            step: Transfer = getattr(found.step, direction)
            hidden = "" if passes.hidden_share is None else f"{100 * passes.hidden_share:.1f} %"
            table.add_row(
                run.name, direction, f"{(passes.num_bytes + step.num_bytes) / found.parameters:.2f}",
                f"{least[direction]:.2f}", f"{1e3 * passes.seconds:.0f}", hidden, f"{1e3 * step.seconds:.0f}",
            )  # fmt: skip
        table.add_row(
            run.name, "kernels", "", "", f"{1e3 * found.passes.kernel_seconds:.0f} of {1e3 * found.passes.seconds:.0f}",
            "", f"{1e3 * found.step.kernel_seconds:.0f} of {1e3 * found.step.seconds:.0f}",
        )  # fmt: skip
    return table


def _block_of_json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"found {text}, which is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"found {text}; expected a block in braces")
    return found


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_offload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=comma_separated(one_of(SIZES)), default=list(LARGE), help=f"of {', '.join(SIZES)}")
    add(
        "--parameters",
        type=comma_separated(one_of(PLACES_OF_PARAMETERS)),
        default=list(PLACES_OF_PARAMETERS),
        help="where parameters rest: none is the GPU, cpu is host memory; default: both, one after the other",
    )
    add("--optimizer", choices=("cpu", "nvme"), default="cpu", help="where moments, masters and gradients rest")
    add("--path", type=Path, default=Path(tempfile.gettempdir()), help="directory for --optimizer nvme")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for trying this program out")
    add("--batch", type=at_least(1), default=8, help="sequences a step")
    add("--seq", type=at_least(1), default=1024, help="tokens per sequence")
    add("--warmup", type=at_least(1), default=2, help="steps that are not timed")
    add("--steps", type=at_least(1), default=4, help="steps that are; one more is traced")
    cores = len(psutil.Process().cpu_affinity() or [1])
    add("--threads", type=at_least(1), default=cores, help="of the host's step; default: all cores")
    add("--config", type=_block_of_json, default={}, help="JSON, more of the engine's configuration")
    add("--seed", type=int, default=0)
    add("--trace", type=Path, help="directory: keep the Chrome traces here, two a run: the passes, and step()")
    add("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
