"""From a user's loader to one that gives this rank its part."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Generator
from torch.distributed import ProcessGroup
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from shardwise.data.active import ActiveLoaders
from shardwise.data.channel import GroupChannel
from shardwise.data.dispatcher import DataLoaderDispatcher, SliceFunction
from shardwise.data.loader import DataLoaderShard, SkipDataLoader, SynchronizeRandom
from shardwise.data.samplers import BatchSamplerShard, IterableDatasetShard, SeedableRandomSampler, samplers_within
from shardwise.data.share import part_size
from shardwise.data.uneven import HeadCount, UnevenDataLoader
from shardwise.errors import ConfigError
from shardwise.random import synchronize_rng_states

KEPT_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
"""What torch's DataLoader is told beside the dataset and the order of its samples."""


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: torch.device | str | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: Sequence[str] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: SliceFunction | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    *,
    synchronize_random: SynchronizeRandom = synchronize_rng_states,
    active: ActiveLoaders | None = None,
    process_group: ProcessGroup | None = None,
) -> DataLoaderShard:
    """A loader of this rank's part of the batches. ``dataloader`` itself stays as it is.

    A loader that was prepared already is returned as it is.

    Args:
        dataloader: the loader of a single process, built in the same way on every rank.
        device: where batches go, if ``put_on_device``.
        num_processes: ranks that share the data; by default those of the process group, 1 without one.
        process_index: this rank; by default that of the process group.
        split_batches: ``batch_size`` is that of all ranks together, each batch is cut into one part a rank. Otherwise
            it is one rank's.
        put_on_device: move batches to ``device``.
        rng_types: random generators to make alike at the beginning of each epoch: "torch", "cuda", "generator" (that of
            the sampler).
        dispatch_batches: rank 0 reads and hands out. By default for iterable datasets that go to a device.
        even_batches: fill up the end with samples from the beginning, so that all ranks get equally many batches of
            equal length. What is dispatched, and what comes from a stream that all ranks read, is always even. Of a
            stream in files (Hugging Face's, at least one a rank) every rank reads its own: then a rank that runs out
            early gives its first batch again until all have.
        slice_fn_for_dispatch: cuts batches that are handed out, where `take_rows` does not understand them.
        use_seedable_sampler: shuffle by nothing but a seed and the number of the epoch.
        data_seed: that seed; by default rank 0's seed of torch.
        non_blocking: copy to the device without waiting.
        use_stateful_dataloader: accepted for the sake of scripts that ask for it: every loader knows where it stands.
        synchronize_random: makes the generators of ``rng_types`` alike; see `SynchronizeRandom`.
        active: where the loader says that it is being iterated.
        process_group: the ranks that share the data; the default group if None.

    Raises:
        ConfigError: a batch cannot be split, or there is nobody to hand batches to.
    """
    if isinstance(dataloader, DataLoaderShard):
        return dataloader
    joined = dist.is_initialized()
    world = num_processes or (dist.get_world_size(process_group) if joined else 1)
    rank = process_index if process_index is not None else (dist.get_rank(process_group) if joined else 0)
    is_iterable = isinstance(dataloader.dataset, IterableDataset)
    dispatches = put_on_device and is_iterable if dispatch_batches is None else dispatch_batches
    if split_batches:
        part_size(_batch_size(dataloader), world)
    if dispatches and world > 1 and not joined:
        raise ConfigError(
            f"dispatch_batches hands batches from rank 0 to {world} processes, but there is no process group. "
            "Start the script with `shardwise launch`, or pass dispatch_batches=False."
        )

    source = _Source(dataloader)
    if use_seedable_sampler and type(source.sampler) is RandomSampler:
        seed = _agreed_seed(world, process_group) if data_seed is None and joined else data_seed
        source.replace_sampler(_seedable(source.sampler, seed))
    elif world > 1 and not dispatches and hasattr(source.sampler, "generator"):
        source.replace_sampler(_with_generator(source.sampler))

    generator = getattr(dataloader.dataset if is_iterable else source.sampler, "generator", None)
    shuffles_by_seed = isinstance(source.sampler, SeedableRandomSampler)
    synchronized = generator if world > 1 and not dispatches and not shuffles_by_seed else None
    common: dict[str, Any] = {
        "device": device if put_on_device else None,
        "rng_types": [str(name) for name in rng_types or () if name != "generator" or synchronized is not None],
        "synchronized_generator": synchronized,
        "non_blocking": non_blocking,
        "synchronize_random": synchronize_random,
        "active": active,
        "num_processes": world,
        **{name: getattr(dataloader, name) for name in KEPT_OPTIONS},
    }
    if dispatches:
        return DataLoaderDispatcher(
            dataloader.dataset,
            split_batches=split_batches,
            channel=GroupChannel(process_group) if world > 1 else None,
            process_index=rank,
            slice_fn=slice_fn_for_dispatch,
            **source.order(),
            **common,
        )
    if is_iterable and _num_files(dataloader.dataset) >= world > 1 and not split_batches:
        together = even_batches and joined and dist.get_world_size(process_group) == world
        return _shard_of_files(dataloader, rank, world, HeadCount(process_group) if together else None, common)
    if is_iterable:
        return _shard_of_iterable(dataloader, rank, world, split_batches, common)
    if world > 1:
        source.index_sampler = BatchSamplerShard(source.index_sampler, world, rank, split_batches, even_batches)
    return DataLoaderShard(dataloader.dataset, **source.order(), **common)


class _Source:
    """The order of a user's loader, to be changed without changing the loader."""

    def __init__(self, dataloader: DataLoader[Any]) -> None:
        self._dataloader = dataloader
        self._collates = dataloader.batch_sampler is not None
        self.index_sampler: Any = dataloader.batch_sampler if self._collates else dataloader.sampler
        if isinstance(dataloader.dataset, IterableDataset):
            self.index_sampler = None
        chain = list(samplers_within(self.index_sampler))
        self.sampler: Any = chain[-1] if chain and not isinstance(chain[-1], BatchSampler) else None

    def replace_sampler(self, sampler: Any) -> None:
        """Draw samples from ``sampler`` instead."""
        self.index_sampler = _replaced(self.index_sampler, self.sampler, sampler)
        self.sampler = sampler

    def order(self) -> dict[str, Any]:
        """The arguments of DataLoader that say in which order samples come."""
        if self.index_sampler is None:
            return {"batch_size": self._dataloader.batch_size, "drop_last": self._dataloader.drop_last}
        if self._collates:
            return {"batch_sampler": self.index_sampler}
        return {"sampler": self.index_sampler, "batch_size": None}


def _replaced(outer: Any, old: Any, new: Any) -> Any:
    """A copy of ``outer`` that draws from ``new`` wherever it drew from ``old``."""
    if outer is old:
        return new
    outer = copy.copy(outer)
    name = "batch_sampler" if getattr(outer, "batch_sampler", None) is not None else "sampler"
    setattr(outer, name, _replaced(getattr(outer, name), old, new))
    return outer


def _batch_size(dataloader: DataLoader[Any]) -> int:
    size = dataloader.batch_size
    if size is None:
        order = dataloader.sampler if dataloader.batch_sampler is None else dataloader.batch_sampler
        size = getattr(order, "batch_size", None)
    if not isinstance(size, int):
        raise ConfigError(
            "split_batches needs to know the batch size, but neither the loader nor its batch sampler has a "
            "batch_size. Give the batch sampler that attribute, or leave split_batches out."
        )
    return size


def _seedable(sampler: RandomSampler, seed: int | None) -> SeedableRandomSampler:
    return SeedableRandomSampler(
        sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler._num_samples,
        generator=sampler.generator,
        data_seed=seed,
    )


def _agreed_seed(world: int, group: ProcessGroup | None) -> int:
    """Rank 0's seed of torch: ranks that were seeded differently must shuffle alike all the same."""
    seed = [torch.initial_seed()]
    if world > 1 and dist.get_world_size(group) == world:
        dist.broadcast_object_list(seed, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return seed[0]


def _with_generator(sampler: Any) -> Any:
    """The sampler, or a copy, with a generator of its own: one that can be made alike on all ranks."""
    if sampler.generator is not None:
        return sampler
    sampler = copy.copy(sampler)
    sampler.generator = Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    return sampler


def _shard_of_iterable(
    dataloader: DataLoader[Any], rank: int, world: int, split_batches: bool, common: dict[str, Any]
) -> DataLoaderShard:
    dataset, size = dataloader.dataset, dataloader.batch_size
    if world > 1:
        dataset = IterableDatasetShard(dataset, size, dataloader.drop_last, world, rank, split_batches)  # type: ignore[arg-type]
        size = part_size(size, world) if split_batches and size else size
    return DataLoaderShard(dataset, batch_size=size, drop_last=dataloader.drop_last, **common)


def _shard_of_files(
    dataloader: DataLoader[Any], rank: int, world: int, head_count: HeadCount | None, common: dict[str, Any]
) -> DataLoaderShard:
    dataset = cast(Any, dataloader.dataset).shard(num_shards=world, index=rank)
    options = {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last, **common}
    if head_count is None:
        return DataLoaderShard(dataset, **options)
    return UnevenDataLoader(dataset, head_count, **options)


def _num_files(dataset: object) -> int:
    """Files of a streamed dataset of Hugging Face's library, of which each rank can take its own; 0 of any other."""
    if not any(base.__module__.startswith("datasets.") for base in type(dataset).__mro__):
        return 0
    return int(getattr(dataset, "num_shards", 0) or 0)


def skip_first_batches(dataloader: DataLoader[Any], num_batches: int = 0) -> DataLoader[Any]:
    """A loader like ``dataloader`` that leaves out the first ``num_batches`` batches of every epoch.

    Of a map-style dataset the samples are not even read. What is left out counts from the beginning of the epoch, also
    for a loader that stands in the middle of it. The new loader and the old one stand in the same place: an epoch of
    the new one is an epoch of the old one, and what the old one saves is where the new one stands.
    """
    if num_batches < 0:
        raise ConfigError(f"num_batches is {num_batches}, expected how many batches to leave out: 0 or more.")
    if isinstance(dataloader, DataLoaderShard):
        skipping = copy.copy(dataloader)
        skipping.skip_batches = num_batches
        skipping._iterator = None  # workers belong to one loader
        return skipping
    options = {name: getattr(dataloader, name) for name in KEPT_OPTIONS}
    return SkipDataLoader(dataloader.dataset, num_batches, **_Source(dataloader).order(), **options)
