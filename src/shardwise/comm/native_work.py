"""Collectives of a backend under way."""

from __future__ import annotations

from torch.distributed import Work

from shardwise.comm.base import CollectiveId
from shardwise.errors import CollectiveError


class NativeWork:
    """Works that are waited for together; on a GPU the current stream waits, not the host."""

    def __init__(self, identity: CollectiveId, *works: Work | None) -> None:
        self._identity = identity
        self._works = list(works)

    def wait(self) -> None:
        """Until all are over."""
        for work in self._works:
            if work is not None:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise CollectiveError(f"{self._identity} failed: {error}") from error
        self._works = []
