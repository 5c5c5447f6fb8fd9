"""How a disk is asked: the block ``aio`` of the JSON, in DeepSpeed's words."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.config.tools import AioConfig
from shardwise.store.base import round_up

MOST_IN_FLIGHT = 64
"""Blocks under way in one direction at most, whatever the settings: each takes a thread."""


@dataclass(frozen=True, slots=True)
class IOSettings:
    """Sizes and numbers of system calls."""

    block_size: int = 1 << 20
    """Bytes that one system call moves; rounded up to whole pages."""
    queue_depth: int = 8
    num_threads: int = 1
    """``intra_op_parallelism``; times ``queue_depth``: blocks under way in each direction."""
    single_submit: bool = False
    """One block of a transfer at a time: gentle to a disk that others use too."""
    overlap_events: bool = True
    """False: a transfer's next blocks start when all of its earlier ones have ended."""

    @classmethod
    def of(cls, aio: AioConfig) -> IOSettings:
        """What the JSON says."""
        threads = max(aio.intra_op_parallelism, aio.thread_count)
        return cls(aio.block_size, aio.queue_depth, threads, aio.single_submit, aio.overlap_events)

    @property
    def block_bytes(self) -> int:
        """Whole pages that one system call moves."""
        return round_up(self.block_size)

    @property
    def num_in_flight(self) -> int:
        """Blocks under way in each direction at most."""
        return min(self.queue_depth * self.num_threads, MOST_IN_FLIGHT)

    @property
    def num_at_once(self) -> int:
        """Blocks of one transfer that are handed over together; the next ones follow when all of these have ended.

        0 is all of them.
        """
        if self.single_submit:
            return 1
        return 0 if self.overlap_events else self.num_in_flight
