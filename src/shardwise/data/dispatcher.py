"""A loader of which rank 0 alone reads: the others get their part of each round from it.

Whether the data end is known to rank 0 alone, so it travels with the batch: no rank ever waits for a batch that is not
there, however unevenly the data end. A round that does not divide is filled up with the samples that came first; only
then does a rank get samples twice, and ``remainder`` says how many of the round are true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from shardwise.data.channel import READER, Channel, LocalChannel
from shardwise.data.loader import UNKNOWN, DataLoaderShard, Given
from shardwise.data.nested import concatenate, num_rows, take_rows
from shardwise.data.reading import DrawAhead
from shardwise.data.samplers import Stateful
from shardwise.data.share import mark_last

SliceFunction = Callable[..., Any]
"""``(batch, slice, process_index=…, num_processes=…)``: the samples of ``slice``."""


class DataLoaderDispatcher(DataLoaderShard):
    """Rank 0 reads a round of batches, every rank gets its part. `prepare_data_loader` makes it of a plain loader.

    Args:
        dataset: the whole dataset; only rank 0's is read.
        split_batches: cut each batch into one part a rank, instead of giving a whole one to each.
        channel: how batches travel; None in a world of one rank.
        process_index: this rank.
        slice_fn: cuts a batch, for batches that `take_rows` does not understand.
        kwargs: as `DataLoaderShard` takes them.
    """

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        channel: Channel | None = None,
        process_index: int = 0,
        slice_fn: SliceFunction | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.split_batches = split_batches
        self.channel = channel if channel is not None else LocalChannel()
        self.process_index = process_index
        self.slice_fn = slice_fn
        self._first: list[Any] = []

    @property
    def _batches_per_round(self) -> int:
        return 1 if self.split_batches else self.num_processes

    @property
    def total_batch_size(self) -> int | None:
        """Samples of one batch of all ranks together; None where batches have no fixed size."""
        size = getattr(self._own_sampler(), "batch_size", self.batch_size)
        return None if size is None else int(size) * self._batches_per_round

    def __len__(self) -> int:
        rounds, rest = divmod(super().__len__() + self.skip_batches, self._batches_per_round)
        return max(0, (rounds if self._drops_last or not rest else rounds + 1) - self.skip_batches)

    @property
    def _reads_files_of_its_own(self) -> bool:
        return False

    @property
    def _fills_up(self) -> bool:
        """Whether the last round may need samples of the first one."""
        return self.num_processes > 1 and not self._drops_last

    # -- one epoch

    def _rounds(self) -> Iterator[Given]:
        return self._hand_out() if self.process_index == READER else self._receive()

    def _hand_out(self) -> Iterator[Given]:
        rounds = self._read_and_cut()
        while True:
            try:
                following = next(rounds, None)
            except Exception:
                self.channel.fail()
                raise
            if following is None:
                break
            parts, given = following
            batch = self.channel.scatter([(part, given.is_last, given.remainder) for part in parts])[0]
            yield given._replace(batch=batch)
            if given.is_last:
                return
        self.channel.scatter([None] * self.num_processes)  # there was nothing to read

    def _receive(self) -> Iterator[Given]:
        for _ in self._read():  # begins the epoch; there is nothing to read here
            pass
        is_last = False
        while not is_last and (part := self.channel.scatter(None)) is not None:
            batch, is_last, remainder = part
            yield Given(batch, None, is_last, remainder)

    def _read_and_cut(self) -> Iterator[tuple[list[Any], Given]]:
        for (batches, dataset), is_last in mark_last(self._read()):
            if not self._first and self._fills_up:
                self._first = self._first_rows(batches)
            parts, remainder = self._cut(batches)
            if is_last:
                yield parts, Given(None, self._dataset_state(), True, remainder)
            else:
                yield parts, Given(None, dataset, False, UNKNOWN)

    def _open(self, skip: int, keep: int = 0) -> Iterator[Any]:
        self._first = []
        if self.process_index != READER:
            self._draw_as_the_reader()
            return iter(())
        keep = 1 if skip and self._fills_up else 0
        per_round = self._batches_per_round
        rounds = self._group(super()._open(skip * per_round, keep * per_round))
        for batches in islice(rounds, keep):
            self._first = self._first_rows(batches)
        return rounds

    def _go_back(self, stateful: Stateful) -> Iterator[Any]:
        first = []
        if self._fills_up and self.process_index == READER:
            stateful.load_state_dict(self.position.dataset_start)
            first = self._first_rows(next(self._open(0)))
        rounds = super()._go_back(stateful)
        self._first = first
        return rounds

    def _draw_as_the_reader(self) -> None:
        """Take from the random generators what the reader's loader takes, so that they stay alike on all ranks."""
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        if self._index_reader is not None:
            DrawAhead(self._index_reader).draw_ahead()

    def _group(self, batches: Iterator[Any]) -> Iterator[list[Any]]:
        per_round = self._batches_per_round
        while round_ := list(islice(batches, per_round)):
            if len(round_) == per_round or not self._drops_last:
                yield round_

    # -- one round

    def _first_rows(self, batches: list[Any]) -> list[Any]:
        """The first samples of a round, in pieces as they came: one a rank, if there are as many."""
        found, missing = [], self.num_processes
        for batch in batches:
            rows = min(missing, num_rows(batch))
            if rows:
                found.append(self._slice(batch, slice(0, rows), READER))
            missing -= rows
        return found

    def _cut(self, batches: list[Any]) -> tuple[list[Any], int]:
        """One part a rank, and the number of true samples if some were filled up, else 0."""
        world = self.num_processes
        if world == 1 or (len(batches) == world and self.slice_fn is None and len(set(map(num_rows, batches))) == 1):
            return batches, 0
        whole = concatenate(batches)
        rows = num_rows(whole)
        per_rank, rest = divmod(rows, world)
        if rest and not self._drops_last:
            per_rank += 1
            times = -(-(world - rest) // sum(num_rows(piece) for piece in self._first))
            whole = concatenate([whole, *self._first * times])
        parts = [self._slice(whole, slice(per_rank * rank, per_rank * (rank + 1)), rank) for rank in range(world)]
        return parts, rows if rest and not self._drops_last else 0

    def _slice(self, batch: Any, rows: slice, rank: int) -> Any:
        if self.slice_fn is None:
            return take_rows(batch, rows)
        return self.slice_fn(batch, rows, process_index=rank, num_processes=self.num_processes)
