"""A loader that gives one rank its batches, knows its last batch, and goes on where it stood.

One epoch::

    begin     synchronise the random generators, tell samplers and dataset the epoch, note how the epoch begins
    read      one batch ahead, so that the last one is known when it is given out
    give      move the batch to the device, note the position, say which loader is active
    end       the next epoch's number

An epoch that is resumed begins as it did at first (see `position`) and leaves out what was given out already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from shardwise.data.active import ActiveLoaders
from shardwise.data.position import Position, RandomStates
from shardwise.data.reading import DrawAhead, IndexReader, leave_out
from shardwise.data.samplers import (
    HasEpoch,
    IterableDatasetShard,
    Stateful,
    forgets_samples,
    num_samples,
    samplers_within,
)
from shardwise.data.share import mark_last
from shardwise.operations import send_to_device
from shardwise.random import synchronize_rng_states

UNKNOWN = -1
"""The remainder where nobody knows how many samples the last round truly has."""

SynchronizeRandom = Callable[[Sequence[str], Generator | None], None]
"""Makes the named random generators ("torch", "cuda", "generator") those of rank 0, on every rank."""


class Given(NamedTuple):
    """A batch on its way to the user."""

    batch: Any
    dataset: Any
    """State of a stateful dataset behind it."""
    is_last: bool
    remainder: int


class DataLoaderShard(DataLoader[Any]):
    """The batches of one rank. `prepare_data_loader` makes it of a plain loader.

    ``end_of_dataloader`` is true while the last batch of an epoch is out; ``remainder`` is then the number of true
    samples in the round that all ranks took together: 0 if it is full, -1 if nobody knows (or nothing was filled up).

    Args:
        dataset: this rank's dataset; one that is iterable is an `IterableDatasetShard` where there are several ranks.
        device: where batches go; None leaves them where they are.
        rng_types: random generators that ``synchronize_random`` makes alike at the beginning of an epoch.
        synchronized_generator: the one that is meant by "generator" there.
        skip_batches: leave that many batches out, in every epoch.
        non_blocking: copy to the device without waiting, which needs ``pin_memory``.
        synchronize_random: see `SynchronizeRandom`.
        active: where the loader says that it is being iterated; one of its own if None.
        num_processes: ranks that share the data, where the batch sampler does not say it.
        kwargs: as torch's DataLoader takes them, in this rank's measure.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | str | None = None,
        rng_types: Sequence[str] | None = None,
        synchronized_generator: Generator | None = None,
        skip_batches: int = 0,
        non_blocking: bool = False,
        synchronize_random: SynchronizeRandom = synchronize_rng_states,
        active: ActiveLoaders | None = None,
        num_processes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.device = torch.device(device) if device is not None else None
        self.rng_types = list(rng_types) if rng_types else None
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.non_blocking = non_blocking
        self.synchronize_random = synchronize_random
        self.gradient_state = active if active is not None else ActiveLoaders()
        self.position = Position()
        self.num_processes: int = num_processes if num_processes else getattr(self._own_sampler(), "num_processes", 1)
        self.end_of_dataloader = False
        self.remainder = UNKNOWN
        self._index_reader = IndexReader(super()._index_sampler) if self._is_map_style else None

    # -- what scripts read

    @property
    def _is_map_style(self) -> bool:
        return not isinstance(self.dataset, IterableDataset)

    @property
    def _whole_dataset(self) -> Any:
        """The user's dataset."""
        return self.dataset.dataset if isinstance(self.dataset, IterableDatasetShard) else self.dataset

    @property
    def iteration(self) -> int:
        """The number of the epoch that runs, or else of the one that starts next."""
        return self.position.epoch

    @iteration.setter
    def iteration(self, epoch: int) -> None:
        self.position.epoch = epoch

    @property
    def total_batch_size(self) -> int | None:
        """Samples of one batch of all ranks together; None where batches have no fixed size."""
        sampler = self._own_sampler()
        if isinstance(self.dataset, IterableDatasetShard):
            return self.dataset.round_size if self.dataset.batch_size else None
        size = getattr(sampler, "batch_size", self.batch_size)
        if size is None:
            return None
        return int(size) if getattr(sampler, "split_batches", False) else int(size) * self.num_processes

    @property
    def total_dataset_length(self) -> int:
        """Samples of the dataset, of all ranks together."""
        dataset = self._whole_dataset
        return int(getattr(dataset, "total_length", None) or len(dataset))

    def get_sampler(self) -> Any:
        """The sampler of samples (not of batches), None where there is none."""
        return next((each for each in samplers_within(self._own_sampler()) if not isinstance(each, BatchSampler)), None)

    def set_sampler(self, sampler: Sampler[int]) -> None:
        """Draw samples from ``sampler`` from now on."""
        batch_samplers = [each for each in samplers_within(self._own_sampler()) if hasattr(each, "sampler")]
        if batch_samplers:
            batch_samplers[-1].sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that starts next, for the samplers and for the dataset.

        A loader that stands in the middle of an epoch goes on there as long as the number is the same.
        """
        if epoch != self.position.epoch:
            self.position.epoch, self.position.resumes = epoch, False
        for each in [*samplers_within(self._own_sampler()), self.dataset]:
            if isinstance(each, HasEpoch):
                each.set_epoch(epoch)

    def _own_sampler(self) -> Any:
        """What gives this rank's batches of indices; for an iterable dataset, None."""
        if not self._is_map_style:
            return None
        return self.sampler if self.batch_sampler is None else self.batch_sampler

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)

    # -- one epoch

    @property
    def _index_sampler(self) -> Any:
        # torch's iterators draw from here; before our own constructor has ended there is only torch's
        reader = getattr(self, "_index_reader", None)
        return super()._index_sampler if reader is None else reader

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises an iterator class of its own
        self.end_of_dataloader, self.remainder = False, UNKNOWN
        for given in self._rounds():
            batch = given.batch
            if self.device is not None:
                batch = send_to_device(batch, self.device, self.non_blocking)
            self.end_of_dataloader, self.remainder = given.is_last, given.remainder
            self.position.give(given.dataset, given.is_last)
            self.gradient_state.enter(self)
            yield batch
        self.position.end()
        self.gradient_state.leave(self)

    def _rounds(self) -> Iterator[Given]:
        for (batch, dataset), is_last in mark_last(self._read()):
            if is_last:
                yield Given(batch, self._dataset_state(), True, self._count_remainder())
            else:
                yield Given(batch, dataset, False, UNKNOWN)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        """The batches of an epoch or of what remains of it, each with the state of the dataset behind it."""
        self.set_epoch(self.position.epoch)
        batches = self._resume() if self.position.resumes else self._begin()
        for batch in batches:
            yield batch, self._dataset_state()

    def _dataset_state(self) -> Any:
        """Where a stateful dataset stands; None if it does not know: of one read by workers only their copies do."""
        stateful = self._stateful() if self.num_workers == 0 else None
        return None if stateful is None or forgets_samples(stateful) else stateful.state_dict()

    def _begin(self) -> Iterator[Any]:
        """Begin an epoch."""
        if self.rng_types:
            self.synchronize_random(self.rng_types, self.synchronized_generator)
        stateful = self._stateful()
        dataset_start = None if stateful is None else stateful.state_dict()
        self.position.begin(RandomStates.take(self._generators()), dataset_start, self.skip_batches)
        return self._open(self.skip_batches)

    def _resume(self) -> Iterator[Any]:
        """Begin the epoch as it began at first, and go on behind what was given out."""
        position, stateful = self.position, self._stateful()
        start, skip = position.start, self.skip_batches or position.batches
        assert start is not None  # a position that resumes has one
        stands_there = skip == position.batches
        knows_the_way = position.dataset is not None and stands_there and self.num_workers == 0
        position.batches, position.resumes = skip, False
        with start.replayed(self._generators()):
            if stateful is not None:
                stateful.load_state_dict(position.dataset if knows_the_way else position.dataset_start)
                if position.finished and stands_there:
                    return iter(())
                if knows_the_way:
                    return self._go_back(stateful)
            batches = DrawAhead(self._open(skip))
            if self._index_reader is None:
                batches.draw_ahead()  # reads what is left out
            else:
                self._index_reader.draw_ahead()
            return batches

    def _go_back(self, stateful: Stateful) -> Iterator[Any]:
        """Have a dataset that knows the way go to where it stood."""
        if isinstance(self.dataset, IterableDatasetShard):
            self.dataset.go_back(self.position.dataset_start, self.position.dataset)
        else:
            stateful.load_state_dict(self.position.dataset)
        return self._open(0)

    def _open(self, skip: int, keep: int = 0) -> Iterator[Any]:
        """torch's own iterator, without the batches ``keep`` to ``skip``."""
        if self._index_reader is not None:
            with self._index_reader.leaving_out(keep, skip):
                return super().__iter__()
        return leave_out(super().__iter__(), keep, skip)

    def _stateful(self) -> Stateful | None:
        """The user's iterable dataset, if it can be put back to where it stood."""
        dataset = self._whole_dataset
        return None if self._is_map_style or not isinstance(dataset, Stateful) else dataset

    def _generators(self) -> list[Generator]:
        """The generators that decide about the order."""
        owners = [*samplers_within(self._own_sampler()), self, self._whole_dataset]
        found = [self.synchronized_generator, *(getattr(owner, "generator", None) for owner in owners)]
        return list(dict.fromkeys(each for each in found if isinstance(each, Generator)))

    @property
    def _drops_last(self) -> bool:
        return bool(self.drop_last or getattr(self._own_sampler(), "drop_last", False))

    def _count_remainder(self) -> int:
        """Right once the last batch was read."""
        if self._drops_last:
            return UNKNOWN  # nothing was filled up
        if isinstance(self.dataset, IterableDatasetShard):
            if self.num_workers or self.dataset.remainder is None:
                return UNKNOWN
            return self.dataset.remainder % self.dataset.round_size
        if not self._is_map_style:
            return UNKNOWN
        samples, size = num_samples(self._own_sampler(), self.dataset), self.total_batch_size
        return UNKNOWN if samples is None or not size else samples % size

    # -- where it stands

    @property
    def _countable_batch_size(self) -> int | None:
        """Samples of a batch of all ranks, if the same samples come in the same order in a world of another size."""
        return None if self._reads_files_of_its_own else self.total_batch_size

    @property
    def _reads_files_of_its_own(self) -> bool:
        return self.num_processes > 1 and not self._is_map_style and self.dataset is self._whole_dataset

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: behind the batch that was given out last.

        An epoch that was left by ``break`` is one to go on with; between two epochs, the next one is to come.
        Consists of numbers, texts and tensors, and of what a stateful dataset says of itself.
        """
        now = RandomStates.take(self._generators())
        return self.position.to_dict(now, self.num_processes, self._countable_batch_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there: the next iteration gives the batches that were left, and none if all were given.

        Raises:
            ConfigError: another number of ranks or another batch size does not reach the same place.
        """
        states = self.position.load(state_dict, self.num_processes, self._countable_batch_size)
        generators = self._generators()
        if not self.position.resumes and len(generators) == len(states.generators):
            for generator, state in zip(generators, states.generators, strict=True):
                generator.set_state(state)
        self._iterator = None  # persistent workers hold datasets that stand elsewhere


class SkipDataLoader(DataLoaderShard):
    """A loader that leaves out the first ``skip_batches`` batches of every epoch and moves nothing to a device."""

    def __init__(self, dataset: Any, skip_batches: int = 0, **kwargs: Any) -> None:
        super().__init__(dataset, skip_batches=skip_batches, **kwargs)
