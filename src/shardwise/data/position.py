"""Where a loader stands, exactly: what a checkpoint keeps, and how the same remaining batches come again.

A position is the number of the epoch, how many batches of it were *given out* (not how many were read ahead, by workers
or by the look at the end), and how the epoch began: the random states from which its order was drawn. Going on means to
begin the epoch again from these, to leave out what was given, and to put the global random states back to where they
are now. Of a map-style dataset only indices are drawn again, no sample is read. Of an iterable dataset the samples are
read again, unless it is stateful and read in this process: then its own state is kept, as of the batch given last.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from shardwise.errors import ConfigError


@dataclass(frozen=True)
class RandomStates:
    """The CPU's global random generators (torch, Python, numpy), and the generators that the loader itself uses."""

    torch_state: Tensor
    python_state: tuple[Any, ...]
    numpy_state: tuple[Any, ...]
    generators: tuple[Tensor, ...] = ()

    @classmethod
    def take(cls, generators: Sequence[Generator] = ()) -> RandomStates:
        """As they are now."""
        return cls(
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state(legacy=True),  # type: ignore[arg-type]
            tuple(generator.get_state() for generator in generators),
        )

    def set(self, generators: Sequence[Generator] = ()) -> None:
        """Put them all back to this.

        Raises:
            ConfigError: the loader has another number of generators than the one that was saved.
        """
        if len(generators) != len(self.generators):
            raise ConfigError(
                f"the loader was saved with {len(self.generators)} random generator(s) of its own and has "
                f"{len(generators)}. Build it with the same samplers and the same dataset as before."
            )
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)
        for generator, state in zip(generators, self.generators, strict=True):
            generator.set_state(state)

    @contextmanager
    def replayed(self, generators: Sequence[Generator]) -> Iterator[None]:
        """Inside, these states; afterwards the global ones are as before. The loader's own generators stay moved on."""
        now = RandomStates.take()
        try:
            self.set(generators)
            yield
        finally:
            now.set()

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers and texts only."""
        version, internal, gauss = self.python_state
        name, keys, *rest = self.numpy_state
        return {
            "torch": self.torch_state,
            "python": [version, torch.tensor(internal), gauss],
            "numpy": [name, torch.tensor(keys.astype(np.int64)), *rest],
            "generators": list(self.generators),
        }

    @classmethod
    def from_dict(cls, states: dict[str, Any]) -> RandomStates:
        """What `to_dict` gave."""
        version, internal, gauss = states["python"]
        name, keys, *rest = states["numpy"]
        return cls(
            states["torch"].cpu(),
            (version, tuple(internal.tolist()), gauss),
            (name, keys.numpy().astype(np.uint32), *rest),
            tuple(state.cpu() for state in states["generators"]),
        )


@dataclass
class Position:
    """Where a loader stands; the loaders that `skip_first_batches` makes of it stand in the same place."""

    epoch: int = 0
    batches: int = 0
    """Batches of this epoch that were given out or skipped."""
    start: RandomStates | None = None
    """How this epoch began; None between two epochs."""
    dataset_start: Any = None
    """State of a stateful dataset as this epoch began."""
    dataset: Any = None
    """State of a stateful dataset after the batch given last; None where it is not kept."""
    finished: bool = False
    """The batch given last was the last one of the epoch."""
    resumes: bool = field(default=False, repr=False)
    """The next iteration goes on from here, instead of beginning an epoch."""

    def begin(self, start: RandomStates, dataset_start: Any, skipped: int) -> None:
        """An epoch begins."""
        self.start, self.dataset_start, self.batches = start, dataset_start, skipped
        self.dataset, self.finished = None, False

    def give(self, dataset: Any, is_last: bool) -> None:
        """A batch is given out; ``dataset`` is the state behind it: behind the whole epoch, if it is the last one."""
        self.batches += 1
        self.dataset, self.finished = dataset, is_last

    def end(self) -> None:
        """The epoch is over."""
        self.epoch, self.batches = self.epoch + 1, 0
        self.start = self.dataset_start = self.dataset = None
        self.finished = False

    def to_dict(self, now: RandomStates, num_processes: int, total_batch_size: int | None) -> dict[str, Any]:
        """Tensors, numbers and texts, and whatever a stateful dataset says of itself."""
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "num_processes": num_processes,
            "total_batch_size": total_batch_size,
            "random": (self.start or now).to_dict(),
            "mid_epoch": self.start is not None,
            "finished": self.finished,
            "dataset_start": self.dataset_start,
            "dataset": self.dataset,
        }

    def load(self, state: dict[str, Any], num_processes: int, total_batch_size: int | None) -> RandomStates:
        """Stand where ``state`` says; returns the random states it knows.

        The same samples remain in a world of another size, if its batches cut the epoch in the same place.

        Raises:
            ConfigError: they don't.
        """
        batches = state["batches"]
        if (num_processes, total_batch_size) != (state["num_processes"], state["total_batch_size"]):
            batches = _recount(state, num_processes, total_batch_size)
        random_states = RandomStates.from_dict(state["random"])
        self.epoch, self.batches, self.resumes = state["epoch"], batches, state["mid_epoch"]
        self.start = random_states if self.resumes else None
        self.dataset_start, self.dataset = state["dataset_start"], state["dataset"]
        self.finished = state["finished"]
        return random_states


def _recount(state: dict[str, Any], num_processes: int, total_batch_size: int | None) -> int:
    before: int | None = state["total_batch_size"]
    batches: int = state["batches"]
    if not batches:
        return 0
    if before and total_batch_size and (state["finished"] or batches * before % total_batch_size == 0):
        return -(-batches * before // total_batch_size)
    raise ConfigError(
        f"the loader was saved after {batches} batches of {before or 'unknown numbers of'} samples from "
        f"{state['num_processes']} processes; batches of {total_batch_size or 'unknown numbers of'} samples from "
        f"{num_processes} processes do not reach the same place. Choose a batch size whose total divides what was "
        "read, or go on from the beginning of an epoch."
    )
