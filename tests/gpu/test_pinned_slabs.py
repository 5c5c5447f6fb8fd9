"""Slabs that CUDA knows: copies to and from them run beside the host, and the memory is ordinary again afterwards."""

from __future__ import annotations

import torch

from shardwise.store.aligned import SlabPool


def test_slabs_are_pinned_until_the_pool_closes() -> None:
    pool = SlabPool(2, 1 << 20, pin=True)
    slab = pool.take()
    tensor = slab.tensor(torch.float32, 0, 1 << 18)
    assert slab.is_pinned and tensor.is_pinned()
    tensor.copy_(torch.arange(1 << 18))
    on_device = tensor.to("cuda", non_blocking=True)
    back = pool.take().tensor(torch.float32, 0, 1 << 18)
    back.copy_(on_device, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(back, tensor)
    pool.close()
    assert not tensor.is_pinned()
    assert torch.equal(back, tensor)
    again = SlabPool(2, 1 << 20, pin=True)  # registering the same addresses twice would fail
    again.close()
