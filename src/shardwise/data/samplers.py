"""torch's samplers and datasets, cut into one share a rank; shuffles that every rank and every run repeats."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler

from shardwise.data.share import Share, deal_batches, deal_samples, num_dealt, part_size, split_batches
from shardwise.errors import ConfigError


@runtime_checkable
class Stateful(Protocol):
    """A dataset that knows where it stands: after ``load_state_dict`` its next iteration goes on from there."""

    def state_dict(self) -> Any:
        """Where it stands."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from there at the next iteration."""


@runtime_checkable
class HasEpoch(Protocol):
    """A sampler or dataset whose order depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that starts next."""


class SeedableRandomSampler(RandomSampler):
    """A RandomSampler whose order depends on nothing but a seed and the number of the epoch.

    So all ranks shuffle alike without a word between them, and an epoch can be repeated.

    Args:
        data_source, replacement, num_samples, generator: as torch's RandomSampler takes them. The generator is seeded
            anew for each epoch.
        data_seed: the seed; None takes torch's.
    """

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.generator is None:
            self.generator = torch.Generator()
        self.initial_seed = torch.initial_seed() if data_seed is None else data_seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.initial_seed + self.epoch)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that starts next."""
        self.epoch = epoch


class BatchSamplerShard(BatchSampler):
    """The batches of a batch sampler that one rank takes.

    Args:
        batch_sampler: gives the batches of all ranks, in the same order on all of them. Its ``batch_size`` and
            ``drop_last`` count; without a ``batch_size`` its batches may have any length, and each counts as full.
        num_processes: ranks that share the batches.
        process_index: this rank.
        split_batches: cut each batch into one part a rank, instead of giving a whole one to each in turn.
        even_batches: fill the last round up with samples from the beginning, so that all ranks get equally many.
    """

    def __init__(
        self,
        batch_sampler: Iterable[Any],
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.batch_size: int = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = bool(getattr(batch_sampler, "drop_last", False))
        if split_batches:
            part_size(_required_batch_size(batch_sampler), num_processes)

    @property
    def _share(self) -> Share:
        # even_batches may be set between epochs, as a context for uneven inputs does
        return Share(self.process_index, self.num_processes, self.drop_last, self.even_batches)

    @property
    def total_length(self) -> int:
        """Number of batches of all ranks together."""
        return len(cast(Sized, self.batch_sampler))

    def __len__(self) -> int:
        if not self.split_batches:
            return num_dealt(self.total_length, self._share)
        return self.total_length - self._gets_none_of_the_last()

    def _gets_none_of_the_last(self) -> bool:
        """Whether a batch that is too short to be split evenly leaves nothing for this rank."""
        samples = num_samples(self.batch_sampler, None)
        if samples is None or self.drop_last or self.even_batches:
            return False
        return 0 < samples % self.batch_size <= self.batch_size // self.num_processes * self.process_index

    def __iter__(self) -> Iterator[list[int]]:
        shards: Iterator[Sequence[int]]
        if self.split_batches:
            shards = split_batches(self.batch_sampler, self.batch_size, self._share)
        else:
            shards = deal_batches(self.batch_sampler, self.batch_size, self._share)
        return cast(Iterator[list[int]], shards)


def _required_batch_size(batch_sampler: Any) -> int:
    size = getattr(batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        raise ConfigError(
            f"split_batches needs to know the batch size, but {type(batch_sampler).__name__} has no batch_size. "
            "Give it that attribute, or leave split_batches out."
        )
    return size


class SkipBatchSampler(BatchSampler):
    """A batch sampler without its first ``skip_batches`` batches: their samples are never read."""

    def __init__(self, batch_sampler: Iterable[Any], skip_batches: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches
        self.batch_size: int = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = bool(getattr(batch_sampler, "drop_last", False))

    @property
    def total_length(self) -> int:
        """Number of batches with those that are skipped."""
        return len(cast(Sized, self.batch_sampler))

    def __len__(self) -> int:
        return max(0, self.total_length - self.skip_batches)

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self.batch_sampler, self.skip_batches, None)


class IterableDatasetShard(IterableDataset[Any]):
    """The samples of an iterable dataset that one rank takes. Every rank reads all of them.

    The last round is filled up with samples from the beginning, unless ``drop_last``: so all ranks get equally many.

    Args:
        dataset: gives the same samples in the same order on all ranks.
        batch_size: samples of one batch; None where each sample is a batch by itself.
        drop_last: leave the last, incomplete round out.
        num_processes: ranks that share the samples.
        process_index: this rank.
        split_batches: ``batch_size`` is that of all ranks together, instead of one rank's.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        batch_size: int | None = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.epoch = 0
        self.remainder: int | None = None
        """True samples of the last round that was read; None before one was."""
        self._share = Share(process_index, num_processes, drop_last)
        self._part_size = part_size(batch_size or 1, num_processes) if split_batches else batch_size or 1
        self._way_back: tuple[Any, Any] | None = None

    @property
    def round_size(self) -> int:
        """Samples that all ranks take together in one step."""
        return self._part_size * self.num_processes

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that starts next; the dataset hears of it too."""
        self.epoch = epoch
        if isinstance(self.dataset, HasEpoch):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        rounds, rest = divmod(len(cast(Sized, self.dataset)), self.round_size)
        return (rounds if self.drop_last or not rest else rounds + 1) * self._part_size

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if isinstance(generator, torch.Generator) and not isinstance(self.dataset, HasEpoch):
            generator.manual_seed(self.epoch)
        first = self._first_round_before_going_back()
        for part, true_samples in deal_samples(self.dataset, self.round_size, self._share, first):
            self.remainder = true_samples
            yield from part

    # -- where it stands

    def go_back(self, start: Any, here: Any) -> None:
        """Have the next iteration go on where the stateful dataset said ``here``, in an epoch that began at ``start``.

        That is behind a whole round: between rounds nothing is read.
        """
        self._way_back = (start, here)

    def _first_round_before_going_back(self) -> list[Any] | None:
        if self._way_back is None:
            return None
        (start, here), self._way_back = self._way_back, None
        dataset, first = cast(Stateful, self.dataset), None
        if not self.drop_last:  # the last round may have to be filled up with the first one
            dataset.load_state_dict(start)
            first = list(itertools.islice(self.dataset, self.round_size))
        dataset.load_state_dict(here)
        return first


def forgets_samples(dataset: object) -> bool:
    """Whether the state of a streamed dataset of Hugging Face's library leaves out the samples of a shuffle buffer.

    Going on from there would lose them: such a dataset has to be read again from the beginning of the epoch.
    """
    stages = [getattr(dataset, "_ex_iterable", None)]
    for stage in stages:
        if hasattr(stage, "buffer_size"):
            return True
        stages += [getattr(stage, "ex_iterable", None)] if hasattr(stage, "ex_iterable") else []
        stages += getattr(stage, "ex_iterables", [])  # several datasets in one
    return False


def samplers_within(sampler: object) -> Iterator[Any]:
    """A sampler and those that it wraps, from the outside in."""
    while sampler is not None:
        yield sampler
        inner = getattr(sampler, "batch_sampler", None)
        sampler = getattr(sampler, "sampler", None) if inner is None else inner


def num_samples(sampler: object, dataset: object) -> int | None:
    """Samples that all ranks take in one epoch; None where it cannot be told.

    torch's own BatchSampler takes what its sampler gives, which may leave samples out, or draw more than there are. Any
    other batch sampler is believed to take the whole dataset if it has as many batches as that needs.
    """
    ours = (BatchSamplerShard, SkipBatchSampler)
    users = next((each for each in samplers_within(sampler) if not isinstance(each, ours)), None)
    try:
        if type(users) is BatchSampler:
            return len(cast(Sized, users.sampler))
        samples, batch_size = len(cast(Sized, dataset)), users.batch_size  # type: ignore[union-attr]
        return samples if len(users) == -(-samples // batch_size) else None  # type: ignore[arg-type]
    except (AttributeError, TypeError, NotImplementedError):
        return None
