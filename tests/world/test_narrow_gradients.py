"""One rank alone in bf16 or fp16: gradients leave the device in two bytes an element, and change no bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from shardwise.zero.access import safe_get_full_grad, safe_set_full_grad
from shardwise.zero.offloaded_gradients import _Landed
from shardwise.zero.shard_states import GRADIENT, ShardStates
from tests import models
from tests.checkpoints import begin, optimizer_parts, train_steps
from tests.references import GPT, Recipe, assert_same
from tests.world.engine_runs import Config, config_of, train_with_engine
from tests.world.offload_runs import host_memory_apart, zero_block
from tests.worlds import World

STEPS = 4
TIED = dataclasses.replace(GPT, steps=STEPS)


@contextmanager
def bytes_that_leave() -> Iterator[list[int]]:
    """Of each gradient element that is written to a store."""
    found: list[int] = []
    plain = ShardStates.write

    def write(states: ShardStates, kind: str, span: Any, values: torch.Tensor, *narrow: Any) -> None:
        if kind == GRADIENT:
            found.append(values.dtype.itemsize)
        plain(states, kind, span, values, *narrow)

    with mock.patch.object(ShardStates, "write", write):
        yield found


def offloaded_alike(recipe: Recipe, plain: Config, offloaded: Config, widths: list[int]) -> None:
    expected = train_with_engine(recipe, plain)
    with host_memory_apart(), bytes_that_leave() as found:
        record = train_with_engine(recipe, offloaded)
    assert_same(record, expected, "offloaded against not offloaded")
    assert record.norms == expected.norms
    num_buffers = len(found) // (len(widths) * recipe.steps)
    assert num_buffers > 0, "no gradient left the device"
    assert found == [width for width in widths for _ in range(num_buffers)] * recipe.steps


@pytest.mark.parametrize("place", ["cpu", "nvme"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("ranks", "accumulation", "widths"), [(1, 1, [2]), (1, 3, [2, 4, 4]), (2, 1, [4])], ids=["one", "adds up", "two"]
)
@pytest.mark.parametrize("window", [pytest.param(1 << 20, marks=pytest.mark.slow), 1009])
def test_the_first_of_a_step_leaves_in_two_bytes(
    request: pytest.FixtureRequest, place: str, precision: str, ranks: int, accumulation: int, widths: list[int],
    window: int, tmp_path: Path,
) -> None:  # fmt: skip
    """What others are added to, and what ranks have averaged, has more bits than two bytes hold."""
    world: World = request.getfixturevalue("world2" if ranks == 2 else "world1")
    settings = {"accumulation": accumulation, "gradient_clipping": 0.5, precision: {"enabled": True}}
    recipe = dataclasses.replace(TIED, accumulation=accumulation)
    zero = {**zero_block("none", place, tmp_path), "sub_group_size": window}
    world.run(offloaded_alike, recipe, config_of(2, **settings), config_of(2, zero=zero, **settings), widths)


def test_what_does_not_travel_is_not_rounded_for_it(world1: World, tmp_path: Path) -> None:
    settings: Config = {"accumulation": 2, "communication_data_type": "bf16"}
    recipe = dataclasses.replace(TIED, accumulation=2)
    for stage in (1, 2, 3):
        zero = zero_block("none", "nvme", tmp_path) if stage > 1 else {}
        world1.run(rounds_nothing, recipe, config_of(stage, zero=zero, **settings), config_of(2, accumulation=2))


def rounds_nothing(recipe: Recipe, config: Config, plain: Config) -> None:
    with host_memory_apart():
        assert_same(train_with_engine(recipe, config), train_with_engine(recipe, plain), "one rank")


def lands_alike(recipe: Recipe, plain: Config, offloaded: Config) -> None:
    """On the CPU a reduction sums into the landing itself: here a transfer is needed, as on a GPU."""
    expected = train_with_engine(recipe, plain)
    landed: list[int] = []
    put = _Landed.put

    def noted(shelf: _Landed, owned: torch.Tensor) -> None:
        landed.append(owned.dtype.itemsize)
        put(shelf, owned)

    with (
        host_memory_apart(),
        mock.patch.object(_Landed, "memory", lambda _: None),
        mock.patch.object(_Landed, "put", noted),
    ):
        assert_same(train_with_engine(recipe, offloaded), expected, "landed against not offloaded")
    assert set(landed) == {2}


@pytest.mark.parametrize("stage", [2, 3])
def test_it_lands_so_where_units_are_stepped_in_backward(world1: World, stage: int, tmp_path: Path) -> None:
    settings: Config = {"bf16": {"enabled": True}}
    offloaded = config_of(
        stage, zero=zero_block("none", "nvme", tmp_path), shardwise={"step_in_backward": True}, **settings
    )
    world1.run(lands_alike, TIED, config_of(stage, **settings), offloaded)


# -- between backward and step


def halfway(engine: Any, edit: bool) -> tuple[list[torch.Tensor], Any]:
    """A step in whose middle somebody looks at the gradient, edits it, or limits it."""
    train_steps(engine, 0, 1)
    engine.backward(models.regression(engine, models.vectors(1, 0)))
    weight = engine.module.stem.weight
    gradient = safe_get_full_grad(weight)
    if edit:
        safe_set_full_grad(weight, gradient * 2.0)
        engine.clip_grad_value_(1e-3)
    engine.step()
    train_steps(engine, 2, 3)
    return [gradient, *engine.state_dict().values()], optimizer_parts(engine)


@pytest.mark.parametrize("edit", [False, True])
def test_who_looks_sees_the_wide_gradient(edit: bool, tmp_path: Path) -> None:
    settings: Config = {"bf16": {"enabled": True}}
    with begin(config_of(2, **settings), device="cpu") as engine:
        expected, states = halfway(engine, edit)
    config = config_of(2, zero=zero_block("none", "cpu", tmp_path), **settings)
    with host_memory_apart(), bytes_that_leave() as found, begin(config, device="cpu") as engine:
        values, offloaded_states = halfway(engine, edit)
    assert 2 in found and 4 in found
    assert expected[0].dtype == values[0].dtype == torch.float32
    assert all(map(torch.equal, values, expected))
    assert all(torch.equal(one[3], other[3]) for one, other in zip(offloaded_states, states, strict=True))


def test_a_checkpoint_in_the_middle_of_a_step(tmp_path: Path) -> None:
    settings: Config = {"bf16": {"enabled": True}, "accumulation": 2}
    config = config_of(2, zero=zero_block("none", "cpu", tmp_path), **settings)
    with host_memory_apart(), begin(config, device="cpu") as engine:
        train_steps(engine, 0, 1)
        engine.save_checkpoint(tmp_path / "saved")
        losses, weights = train_steps(engine, 1, 6), engine.state_dict()
    with begin(config_of(2, **settings), device="cpu") as engine:
        engine.load_checkpoint(tmp_path / "saved")
        assert all(map(torch.equal, train_steps(engine, 1, 6), losses))
        assert all(torch.equal(value, weights[name]) for name, value in engine.state_dict().items())
