"""Worlds of GPUs: one rank a device, NCCL for what lives there, gloo for host bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.worlds import World, WorldSettings

BACKEND = "cpu:gloo,cuda:nccl"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs CUDA: this machine has none"))


@pytest.fixture(scope="session")
def gpu_worlds() -> Iterator[Callable[[int], World]]:
    """`gpu_worlds(2)` is the world of two GPUs; a test that asks for more than there are is skipped."""
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        if size > torch.cuda.device_count():
            pytest.skip(f"needs {size} GPUs: this machine has {torch.cuda.device_count()}")
        return worlds.setdefault(size, World(size, WorldSettings(backend=BACKEND)))

    yield of_size
    for world in worlds.values():
        world.close()


@pytest.fixture
def gpu_world(request: pytest.FixtureRequest, gpu_worlds: Callable[[int], World]) -> World:
    """The world of the size that the test names."""
    return gpu_worlds(request.param)
