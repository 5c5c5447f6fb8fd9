"""The fear: memory that CUDA believes pinned after it was given back, or a pin that failed and went unnoticed."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from shardwise.errors import StorageError
from shardwise.store.aligned import Slab, SlabPool
from shardwise.store.base import PAGE_BYTES
from shardwise.store.host_memory import HostMemory


class FakeRuntime:
    """Keeps what is registered, as CUDA's runtime does."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.code = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.code == 0:
            self.pinned[address] = size
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]  # KeyError: it was forgotten twice
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRuntime]:
    fake = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    yield fake
    gc.collect()
    assert not fake.pinned


def test_pool_is_one_registration_that_ends_with_it(runtime: FakeRuntime) -> None:
    pool = SlabPool(3, 5000, pin=True)
    slabs = [pool.take() for _ in range(3)]
    begin = slabs[0].tensor(torch.uint8, 0, 1).data_ptr()
    assert all(slab.is_pinned for slab in slabs)
    ((address, size),) = runtime.pinned.items()
    assert size == 3 * 2 * PAGE_BYTES and address <= begin < address + size
    for slab in slabs:
        pool.give_back(slab)
    pool.close()
    pool.close()
    assert not runtime.pinned and not slabs[0].is_pinned


def test_host_memory_is_forgotten_by_cuda_when_it_closes(runtime: FakeRuntime) -> None:
    store = HostMemory(pin=True)
    store.reserve(10_000)
    store.allocate()
    assert len(runtime.pinned) == 1
    store.close()
    assert not runtime.pinned


def test_slab_that_nobody_closed_is_forgotten_with_its_last_part(runtime: FakeRuntime) -> None:
    part = Slab.allocate(10_000, pin=True).part(PAGE_BYTES, 10)
    assert part.is_pinned and len(runtime.pinned) == 1
    del part
    assert not runtime.pinned


def test_refusal_by_cuda_is_an_error(runtime: FakeRuntime) -> None:
    runtime.code = 2
    with pytest.raises(StorageError, match=r"error 2.*pin_memory"):
        SlabPool(3, 5000, pin=True)


def test_nothing_is_pinned_unasked(runtime: FakeRuntime) -> None:
    assert not SlabPool(3, 5000).take().is_pinned
    assert not runtime.pinned
