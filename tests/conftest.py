"""Fixtures that hand out worlds of ranks; a world starts when a test first uses it and lives until the session ends."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.worlds import World, WorldPool, WorldSettings

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what stands in tests/world as `world` and what stands in tests/gpu as `gpu`."""
    for item in items:
        if HERE / "world" in item.path.parents:
            item.add_marker(pytest.mark.world)
        if HERE / "gpu" in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_collection_finish() -> None:
    """Thousands of tests and what they import stay until the end; no later collection need look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def worlds() -> Iterator[WorldPool]:
    """The pool: `worlds[3]` is the world of three ranks."""
    pool = WorldPool()
    yield pool
    pool.close()


@pytest.fixture
def world(request: pytest.FixtureRequest, worlds: WorldPool) -> World:
    """The world of the size that the test names: `@pytest.mark.parametrize("world", [2, 4], indirect=True)`."""
    return worlds[request.param]


@pytest.fixture
def world1(worlds: WorldPool) -> World:
    """One rank."""
    return worlds[1]


@pytest.fixture
def world2(worlds: WorldPool) -> World:
    """Two ranks."""
    return worlds[2]


@pytest.fixture
def world3(worlds: WorldPool) -> World:
    """Three ranks."""
    return worlds[3]


@pytest.fixture
def world4(worlds: WorldPool) -> World:
    """Four ranks."""
    return worlds[4]


@pytest.fixture
def own_world() -> Iterator[Callable[..., World]]:
    """Build a world for this test alone: `own_world(2, timeout_seconds=5.0)` takes the fields of WorldSettings.

    Its ranks are forks. Those of the other worlds are interpreters of their own, so that what depends on the order of a
    set differs from rank to rank there.
    """
    made: list[World] = []

    def make(size: int, **settings: object) -> World:
        made.append(World(size, WorldSettings(forked=True, **settings)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for world in made:
        world.close()
