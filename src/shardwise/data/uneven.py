"""A loader for ranks that read files of their own: they may run out at different times, but end together.

Before a batch is given out, the ranks count who has another one. While any has, those who have none give their first
batch of the epoch again (or all end at once, where incomplete rounds are dropped): so each rank takes equally many
steps, and no collective of the training waits for a rank that is through.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from shardwise import roll_call
from shardwise.data.channel import carrying_device
from shardwise.data.loader import UNKNOWN, DataLoaderShard, Given
from shardwise.data.samplers import Stateful
from shardwise.errors import ConfigError


class HeadCount:
    """Counts the ranks of a process group that say yes; every rank asks the same number of times."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group

    def of(self, *answers: bool) -> list[int]:
        """How many ranks say yes, for each question."""
        if self._group is None:
            roll_call.answer("the next batch of a loader of which every rank reads its own files")
        counts = torch.tensor(answers, dtype=torch.int64, device=carrying_device(self._group))
        dist.all_reduce(counts, group=self._group)
        return [int(count) for count in counts.tolist()]


class UnevenDataLoader(DataLoaderShard):
    """Ends when the last rank has run out, or, where incomplete rounds are dropped, the first one.

    Args:
        dataset: this rank's own part of the data.
        head_count: asks the ranks that share the data.
        kwargs: as `DataLoaderShard` takes them.
    """

    def __init__(self, dataset: Any, head_count: HeadCount, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.head_count = head_count
        self._first: list[Any] = []

    def _rounds(self) -> Iterator[Given]:
        own = self._read()
        following = next(own, None)
        state = None
        goes_on = self._anybody_goes_on(following is not None)
        while goes_on:
            batch = self._first[0] if following is None else following[0]
            self._first = self._first or [batch]
            if following is not None:
                state = following[1]
                following = next(own, None)
            goes_on = self._anybody_goes_on(following is not None)
            yield Given(batch, state if goes_on else self._dataset_state(), not goes_on, UNKNOWN)

    def _anybody_goes_on(self, has_batch: bool) -> bool:
        num_left, num_able = self.head_count.of(has_batch, has_batch or bool(self._first))
        if self._drops_last:
            return num_left == self.num_processes
        if num_left and num_able < self.num_processes:
            raise ConfigError(
                f"{self.num_processes - num_able} of {self.num_processes} processes found no sample at all in their "
                "files, so they have nothing to take steps with. Use fewer processes or more files, or leave "
                "dispatch_batches to its default: then rank 0 reads for all."
            )
        return num_left > 0

    # -- the first batch, for a rank that goes on in the middle

    def _open(self, skip: int, keep: int = 0) -> Iterator[Any]:
        self._first = []
        keep = 1 if skip and not self._drops_last else 0
        batches = super()._open(skip, keep)
        self._first = list(islice(batches, keep))
        return batches

    def _go_back(self, stateful: Stateful) -> Iterator[Any]:
        first: list[Any] = []
        if not self._drops_last:
            stateful.load_state_dict(self.position.dataset_start)
            first = list(islice(self._open(0), 1))
        batches = super()._go_back(stateful)
        self._first = first
        return batches
