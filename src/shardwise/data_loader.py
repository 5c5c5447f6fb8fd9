"""The loaders and samplers under the name that scripts import them from; they live in `shardwise.data`."""

from shardwise.data.active import ActiveLoaders
from shardwise.data.dispatcher import DataLoaderDispatcher
from shardwise.data.loader import DataLoaderShard, SkipDataLoader
from shardwise.data.prepare import prepare_data_loader, skip_first_batches
from shardwise.data.samplers import (
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
)

__all__ = [
    "ActiveLoaders",
    "BatchSamplerShard",
    "DataLoaderDispatcher",
    "DataLoaderShard",
    "IterableDatasetShard",
    "SeedableRandomSampler",
    "SkipBatchSampler",
    "SkipDataLoader",
    "prepare_data_loader",
    "skip_first_batches",
]
