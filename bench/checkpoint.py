"""Saving and loading a training's state against the disk itself: ``python -m bench.checkpoint --help``.

One launch of ``--world`` processes holds all contenders, each with the same model after one step of Adam. In each round
everyone saves in a shuffled order, then everyone loads what it had saved. What is reported is the median over rounds of
the ratio to the disk in the same round: ``disk`` writes and reads as many bytes in as many files, from memory that is
there already, in the faster of two ways: through the page cache, or around it.

A save is over when the disk has it (files are synced where a contender leaves that to chance; what it had taken until
it returned is printed too). A load begins with files that are not in the page cache.

Who saves beside training trains a step meanwhile. Its stall is what the call takes, and what the step then waits for
copies that the call has left to be done. ``copy`` copies as many bytes to memory that was touched before, and does
nothing else: the least that a call takes which copies all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
import torch.distributed as dist
from rich.table import Table
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.hooks import RemovableHandle

from bench.contenders import CONTENDERS
from bench.contenders.engines import EngineTrainer, PatchedLinearTrainer
from bench.interleave import ratios, shuffled_orders, slowest_rank
from bench.machine import machine_facts
from bench.models import SHAPES
from bench.options import at_least, one_of
from bench.report import CONSOLE, print_facts, ratio_text, write_json
from bench.workload import Workload
from bench.world import run_in_world

BYTES_PER_PARAMETER = 12
"""fp32 weight and Adam's two moments. DeepSpeed writes 16: the weights twice."""
PIECE_BYTES = 1 << 22
DISK = "disk"
COPY = "copy"
AT_ONCE = {COPY: "shardwise", "shardwise async": "shardwise", "dcp async": "dcp", "deepspeed": "deepspeed"}
"""Whose save a stall is compared with."""
WAYS = ("cached", "direct")
Seconds = dict[str, float]
"""What one turn took, by the name of what was measured."""


class Saver(Protocol):
    """A training's state that can be saved and loaded. Collective."""

    def save(self, directory: Path) -> Seconds:
        """Write it into an empty directory."""

    def load(self, directory: Path) -> Seconds:
        """Read it back into the training."""

    def close(self) -> None:
        """Let it go."""


@contextmanager
def _timed(seconds: Seconds, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def files_in(directory: Path) -> list[Path]:
    """All files below."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def sync_all(directory: Path) -> None:
    """Return when the disk has every file below."""
    for path in [*files_in(directory), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop_from_cache(directory: Path) -> None:
    """Let the page cache forget the files below; the disk has them."""
    for path in files_in(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# --- contenders -------------------------------------------------------------------------------------------------------


class Disk:
    """As many bytes, one file a rank, from memory and to memory that was touched before; two threads."""

    def __init__(self, nbytes: int, way: str) -> None:
        self._nbytes = -(-nbytes // PIECE_BYTES) * PIECE_BYTES
        self._flags = os.O_DIRECT if way == "direct" else 0
        self._pieces = [mmap(-1, PIECE_BYTES, flags=MAP_PRIVATE | MAP_ANONYMOUS) for _ in range(2)]
        for piece in self._pieces:
            piece[:] = os.urandom(PIECE_BYTES)

    def _path(self, directory: Path) -> Path:
        return directory / f"rank{dist.get_rank()}"

    def _on_threads(self, work: Callable[[mmap, int], Any]) -> None:
        def some(number: int) -> None:
            for at in range(number * PIECE_BYTES, self._nbytes, len(self._pieces) * PIECE_BYTES):
                work(self._pieces[number], at)

        threads = [Thread(target=some, args=(number,)) for number in range(len(self._pieces))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def save(self, directory: Path) -> Seconds:
        """Write, and sync file and directory."""
        seconds: Seconds = {}
        with _timed(seconds, "save"):
            descriptor = os.open(self._path(directory), os.O_WRONLY | os.O_CREAT | self._flags)
            self._on_threads(lambda piece, at: os.pwrite(descriptor, piece, at))
            os.fsync(descriptor)
            os.close(descriptor)
            dist.barrier()
            sync_all(directory) if dist.get_rank() == 0 else None
        return seconds

    def load(self, directory: Path) -> Seconds:
        """Read."""
        seconds: Seconds = {}
        with _timed(seconds, "load"):
            descriptor = os.open(self._path(directory), os.O_RDONLY | self._flags)
            self._on_threads(lambda piece, at: os.preadv(descriptor, [piece], at))
            os.close(descriptor)
        return seconds

    def close(self) -> None:
        """Unmap."""
        for piece in self._pieces:
            piece.close()


class Copy:
    """As many bytes from memory to memory that were touched before, a share by each of torch's threads."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._memories = [mmap(-1, nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS) for _ in range(2)]
        for memory in self._memories:
            with suppress(OSError):
                memory.madvise(MADV_HUGEPAGE)
            memory[:] = bytes(nbytes)

    def save(self, directory: Path) -> Seconds:
        """Nothing is written."""
        source, target = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self._memories)
        share = -(-self._nbytes // torch.get_num_threads())
        begins = range(0, self._nbytes, share)
        seconds: Seconds = {}
        with _timed(seconds, "stall"), ThreadPoolExecutor(len(begins)) as pool:
            for begin in begins:
                pool.submit(ctypes.memmove, target + begin, source + begin, min(share, self._nbytes - begin))
        return seconds

    def load(self, directory: Path) -> Seconds:
        """Nothing was written."""
        return {}

    def close(self) -> None:
        """Let the memory go."""
        self._memories.clear()


def _trained(name: str, workload: Workload) -> Any:
    """A contender of the training benchmark after one step, so that there is an optimizer's state."""
    CONTENDERS[name].prepare()
    trainer = CONTENDERS[name].build(workload)
    trainer.step(workload.tokens(0, dist.get_rank()))
    return trainer


class _StepHooks:
    """Times what others do before an optimizer's steps: those who have hooked themselves in since this was made."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seconds = 0.0
        self._optimizer = optimizer
        self._begin = 0.0
        self._last: RemovableHandle | None = None
        optimizer.register_step_pre_hook(self._begins)

    def come_last(self) -> None:
        """Everybody has hooked himself in; count from 0."""
        if self._last is not None:
            self._last.remove()
        self._last = self._optimizer.register_step_pre_hook(self._ends)
        self.seconds = 0.0

    def _begins(self, *_: Any) -> None:
        self._begin = time.perf_counter()

    def _ends(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begin


class OwnEngine:
    """``save_checkpoint`` of this package's engine."""

    def __init__(self, workload: Workload, stage: int) -> None:
        trainer: EngineTrainer = _trained(f"shardwise{stage}", workload)
        self._trainer = trainer

    def save(self, directory: Path) -> Seconds:
        """Until the disk has it."""
        seconds: Seconds = {}
        with _timed(seconds, "save"):
            self._trainer.engine.save_checkpoint(directory, "tag")
        return seconds

    def load(self, directory: Path) -> Seconds:
        """All of it."""
        seconds: Seconds = {}
        with _timed(seconds, "load"):
            self._trainer.engine.load_checkpoint(directory)
        return seconds

    def close(self) -> None:
        """End the engine."""
        self._trainer.close()


class OwnEngineBesideTraining(OwnEngine):
    """``save_checkpoint(async_save=True)`` of this package's engine, and a step of training meanwhile."""

    def __init__(self, workload: Workload, stage: int) -> None:
        super().__init__(workload, stage)
        self._tokens = workload.tokens(0, dist.get_rank())
        self._hooks = _StepHooks(self._trainer.engine.trained().optimizer)

    def save(self, directory: Path) -> Seconds:
        """Until the disk has it; ``stall`` is what training waits for: the call, and what the step is held up."""
        seconds: Seconds = {}
        with _timed(seconds, "save"):
            with _timed(seconds, "call"):
                self._trainer.engine.save_checkpoint(directory, "tag", async_save=True)
            self._hooks.come_last()
            self._trainer.step(self._tokens)
            self._trainer.engine.wait_for_checkpoint()
        seconds["stall"] = seconds["call"] + self._hooks.seconds
        return seconds


class DeepSpeedEngine:
    """``save_checkpoint`` of DeepSpeed's engine. It does not sync: that is done for it, and timed apart."""

    def __init__(self, workload: Workload, stage: int) -> None:
        trainer: EngineTrainer | PatchedLinearTrainer = _trained(f"deepspeed{stage}", workload)
        self._trainer = trainer

    def save(self, directory: Path) -> Seconds:
        """Until the disk has it; ``stall`` is until it returned."""
        seconds: Seconds = {}
        with _timed(seconds, "save"):
            with _timed(seconds, "stall"):
                self._trainer.engine.save_checkpoint(directory, "tag")
            _sync_together(directory)
        return seconds

    def load(self, directory: Path) -> Seconds:
        """All of it."""
        seconds: Seconds = {}
        with _timed(seconds, "load"):
            self._trainer.engine.load_checkpoint(directory)
        return seconds

    def close(self) -> None:
        """End the engine."""
        self._trainer.close()


class TorchCheckpoint:
    """``torch.distributed.checkpoint`` over ``fully_shard``; its writer syncs its files."""

    def __init__(self, workload: Workload, async_save: bool) -> None:
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        self._model = workload.build_model()
        for block in self._model.blocks:
            torch.distributed.fsdp.fully_shard(block)
        torch.distributed.fsdp.fully_shard(self._model)
        self._optimizer = workload.build_optimizer(self._model.parameters())
        self._tokens = workload.tokens(0, dist.get_rank())
        self._async_save = async_save
        self._step()

    def _step(self) -> None:
        self._model(self._tokens).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, directory: Path) -> Seconds:
        """Until the disk has it; ``stall`` is what training waits for."""
        seconds: Seconds = {}
        with _timed(seconds, "save"):
            with _timed(seconds, "stall"):
                if self._async_save:
                    pending: Any = dcp.async_save(self._state(), checkpoint_id=directory)
                else:
                    dcp.save(self._state(), checkpoint_id=directory)
            if self._async_save:
                self._step()
                pending.result()
        return seconds

    def load(self, directory: Path) -> Seconds:
        """All of it."""
        seconds: Seconds = {}
        with _timed(seconds, "load"):
            state = self._state()
            dcp.load(state, checkpoint_id=directory)
            set_state_dict(
                self._model,
                self._optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        return seconds

    def close(self) -> None:
        """Let the model go."""
        del self._model, self._optimizer


def _sync_together(directory: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        sync_all(directory)
    dist.barrier()


def _builders(workload: Workload, stage: int, world: int) -> dict[str, Callable[[], Saver]]:
    nbytes = BYTES_PER_PARAMETER * workload.count_parameters() // world
    return {
        **{f"{DISK} ({way})": lambda way=way: Disk(nbytes, way) for way in WAYS},  # type: ignore[misc]
        COPY: lambda: Copy(nbytes),
        "shardwise": lambda: OwnEngine(workload, stage),
        "shardwise async": lambda: OwnEngineBesideTraining(workload, stage),
        "dcp": lambda: TorchCheckpoint(workload, False),
        "dcp async": lambda: TorchCheckpoint(workload, True),
        "deepspeed": lambda: DeepSpeedEngine(workload, stage),
    }


# --- rounds -----------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Seconds of a contender's turns on this rank, round by round, by what was measured."""

    rounds: list[Seconds] = field(default_factory=list)
    first: Seconds = field(default_factory=dict)
    """Of the round before them."""
    nbytes: int = 0
    """Of its files, of all ranks."""


def _measure(
    names: list[str], workload: Workload, stage: int, world: int, rounds: int, folder: str
) -> dict[str, Measured]:
    """Save and load in turns; this rank's seconds. Runs on every rank."""
    builders = _builders(workload, stage, world)
    savers = {name: builders[name]() for name in names}
    measured = {name: Measured() for name in names}
    gc.collect()
    gc.freeze()
    # The first round touches memory and code for the first time, and its files are what is loaded.
    for index, order in enumerate(shuffled_orders(names, rounds + 1, workload.seed)):
        for name in order:
            directory = _fresh(Path(folder) / f"{name} {index}")
            dist.barrier()
            seconds = savers[name].save(directory)
            dist.barrier()
            if index:
                measured[name].rounds.append(seconds)
            else:
                measured[name].first = seconds
            if dist.get_rank() == 0:
                sync_all(directory)
                measured[name].nbytes = sum(path.stat().st_size for path in files_in(directory))
                if index:
                    shutil.rmtree(directory)
                os.sync()
        for name in order:
            if "async" in name:
                continue
            if dist.get_rank() == 0:
                drop_from_cache(Path(folder) / f"{name} 0")
            dist.barrier()
            seconds = savers[name].load(Path(folder) / f"{name} 0")
            if index:
                measured[name].rounds[-1] |= seconds
    gc.unfreeze()
    for saver in savers.values():
        saver.close()
    return measured


def _fresh(directory: Path) -> Path:
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    return directory


# --- report -----------------------------------------------------------------------------------------------------------


def _seconds(ranks: list[dict[str, Measured]], name: str, what: str) -> list[float]:
    """[rounds] of the slowest rank; empty where the contender has no such thing."""
    if what not in ranks[0][name].rounds[0]:
        return []
    return slowest_rank([[turn[what] for turn in rank[name].rounds] for rank in ranks])


def _fastest_way(ranks: list[dict[str, Measured]], what: str) -> str:
    return min((f"{DISK} ({way})" for way in WAYS), key=lambda name: statistics.median(_seconds(ranks, name, what)))


def _table(ranks: list[dict[str, Measured]], what: str, parameters: int) -> Table:
    baseline = _fastest_way(ranks, what)
    state_bytes = BYTES_PER_PARAMETER * parameters
    table = Table(
        title=f"{what}: {parameters / 1e6:.1f} M parameters, {state_bytes / 1e6:.0f} MB of state",
        title_justify="left",
        caption=f"speed is the state's bytes by the median; the disk is {baseline}",
    )
    for column in ("contender", "MB/s", f"time, ratio to the {DISK}", "quartiles", "seconds", "files, MB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name in ranks[0]:
        if seconds := _seconds(ranks, name, what):
            against = ratios(seconds, _seconds(ranks, baseline, what))
            speed = state_bytes / against.median_seconds / 1e6
            table.add_row(name, f"{speed:.0f}", *ratio_text(against), f"{against.median_seconds:.3f}",
                          f"{ranks[0][name].nbytes / 1e6:.0f}")  # fmt: skip
    return table


def _stall_table(ranks: list[dict[str, Measured]]) -> Table:
    table = Table(title="stall: what training waits for, against the same save at once", title_justify="left")
    for column in ("contender", "ratio, median", "quartiles", "seconds", "first save, seconds"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name in ranks[0]:
        if (stall := _seconds(ranks, name, "stall")) and AT_ONCE.get(name) in ranks[0]:
            against = ratios(stall, _seconds(ranks, AT_ONCE[name], "save"))
            first = max(rank[name].first["stall"] for rank in ranks)
            table.add_row(name, *ratio_text(against), f"{against.median_seconds:.3f}", f"{first:.3f}")
    return table


def main() -> None:
    """Run what the command line asks for and print it."""
    options = _parse_options()
    workload = Workload(SHAPES[options.size], 1, options.seq, "adamw", options.seed)
    every = list(_builders(workload, options.stage, options.world))
    unknown = set(options.contenders or ()).difference(every)
    if unknown:
        raise SystemExit(
            f"--contenders: there is no {', '.join(sorted(unknown))}. Expected some of {', '.join(every)}."
        )
    names = [name for name in every if not options.contenders or name in options.contenders or DISK in name]
    facts = machine_facts()
    print_facts("machine", facts)
    print_facts("run", {name: f"{value}" for name, value in vars(options).items() if value is not None})
    skipped = {}
    if "deepspeed" in names and (reason := CONTENDERS[f"deepspeed{options.stage}"].reason_to_skip()):
        skipped["deepspeed"] = reason
        names.remove("deepspeed")
        CONSOLE.print(f"[yellow]skipped[/] deepspeed: {reason}")
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-checkpoint-") as folder:
        ranks = run_in_world(options.world, options.threads, _measure, names, workload, options.stage, options.world,
                             options.rounds, folder)  # fmt: skip
    for what in ("save", "load"):
        CONSOLE.print(_table(ranks, what, workload.count_parameters()))
    CONSOLE.print(_stall_table(ranks))
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"machine": facts, "options": settings, "skipped": skipped, "ranks": ranks})


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=one_of(SHAPES), default="30M", help=f"of {', '.join(SHAPES)}; default: %(default)s")
    add("--stage", type=int, choices=(1, 2, 3), default=1, help="ZeRO stage of both engines; default: %(default)s")
    add("--rounds", type=at_least(1), default=7, help="measured rounds; one more comes before them")
    add("--world", type=at_least(1), default=2, help="processes")
    add("--contenders", nargs="+", metavar="NAME", help=f"only these, and {DISK}; default: all")
    add("--threads", type=at_least(1), default=1, help="threads per process")
    add("--seq", type=at_least(1), default=16, help="tokens of a step beside a save; default: %(default)s")
    add("--directory", type=Path, default=Path.cwd(), help="on the disk that is measured; default: the current one")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
