"""Under ``zero.Init`` a model gets the bits that it would have had, whatever its constructor does, and trains alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from shardwise.errors import ConfigError, StateError
from shardwise.zero.guard import is_guard
from shardwise.zero.pieces import parked
from tests import pieces as built
from tests.references import assert_same
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, train_with_engine, world_size
from tests.worlds import World

WORLDS = pytest.mark.parametrize("world", [1, 2, 3], indirect=True)


# --- bits -------------------------------------------------------------------------------------------------------------


def awkward(spread: int, **settings: Any) -> None:
    torch.manual_seed(0)
    wanted = built.build_awkward().state_dict()
    generator_after = torch.get_rng_state()
    model = built.in_pieces(built.build_awkward, spread, **settings)
    if not spread:
        assert torch.equal(torch.get_rng_state(), generator_after)
    if world_size() > 1:
        large = [p for p in model.parameters() if p.nbytes >= settings.get("small_bytes", 64)]
        assert built.number_in_pieces(model) == len(large), "a parameter is whole"
        assert all(is_guard(p.detach()) or not p.is_floating_point() for p in large)
    state = built.whole_state(model)
    if rank() == 0 or not spread:
        built.assert_same_state(state, wanted)
    assert model.head.weight is model.wte.weight


@WORLDS
@pytest.mark.parametrize("spread", [0, 5])
def test_whatever_a_constructor_does(world: World, spread: int) -> None:
    world.run(awkward, spread)


@pytest.mark.parametrize("max_whole_bytes", [0, 1 << 30])
def test_the_room_for_whole_parameters_changes_no_bit(world2: World, max_whole_bytes: int) -> None:
    world2.run(awkward, 0, max_whole_bytes=max_whole_bytes)


def trained(narrow: bool) -> None:
    extra = {"bf16": {"enabled": True}} if narrow else {}
    wanted = train_with_engine(built.ROWS, config_of(0, **extra))
    for stage in STAGES:
        got = train_with_engine(built.ROWS_IN_PIECES, config_of(stage, **extra))
        assert_same(got, train_with_engine(built.ROWS, config_of(stage, **extra)), f"stage {stage} built in pieces")
        assert_same(got, wanted, f"stage {stage} against stage 0")


@WORLDS
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_it_trains_alike(world: World, narrow: bool) -> None:
    world.run(trained, narrow)


def with_other_dtype() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        wanted = built.build_rows().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    got = built.in_pieces(built.build_rows, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    built.assert_same_state(built.whole_state(got), wanted)


def test_dtype_is_the_default_dtype_inside(world2: World) -> None:
    world2.run(with_other_dtype)


def already_built() -> None:
    model = built.build_rows()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    shardwise.zero.Init(module=model, small_bytes=64)
    assert built.number_in_pieces(model) == sum(p.nbytes >= 64 for p in model.parameters())
    built.assert_same_state(built.whole_state(model), wanted)


def test_a_model_that_is_built_already(world2: World) -> None:
    world2.run(already_built)


def in_two_contexts() -> None:
    """The second context goes on with what the first one left."""
    torch.manual_seed(0)
    wanted = built.build_rows()
    with torch.no_grad():
        wanted.head.weight.mul_(3)  # type: ignore[union-attr,operator]
        nn.init.normal_(wanted.blocks[0].up.weight)  # type: ignore[union-attr,index,arg-type]
    model: Any = built.in_pieces(built.build_rows)
    with shardwise.zero.Init(**built.TINY), shardwise.zero.Init(), torch.no_grad():
        model.head.weight.mul_(3)
        nn.init.normal_(model.blocks[0].up.weight)
        assert not is_guard(model.blocks[1].up.weight.detach())
        model(torch.zeros(1, 3, dtype=torch.int64))
    built.assert_same_state(built.whole_state(model), wanted.state_dict())


def test_contexts_one_after_the_other_and_one_in_another(world2: World) -> None:
    world2.run(in_two_contexts)


# --- models of transformers -------------------------------------------------------------------------------------------


def real_models(names: tuple[str, ...]) -> None:
    from tests import real_models as real

    for name in names:
        build = getattr(real, f"build_{name}")
        wanted = build()
        with shardwise.zero.Init(max_whole_bytes=1 << 15, small_bytes=256):
            model = build()
        assert built.number_in_pieces(model) > 5, name
        built.assert_same_state(built.whole_state(model), wanted.state_dict())


def test_real_models(world2: World) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (the extra 'demo')")
    world2.run(real_models, ("gpt2", "llama", "t5", "vit", "mixtral", "resnet"))


# --- right or loud ----------------------------------------------------------------------------------------------------


def misused() -> None:
    model: Any = built.in_pieces(built.build_rows)
    for use in (lambda: model(torch.zeros(1, 2, dtype=torch.int64)), model.state_dict, lambda: copy.deepcopy(model)):
        with pytest.raises(StateError, match=r"rests? in pieces"):
            use()
    bare = copy.deepcopy(model.blocks[0].up.weight)
    assert bare.isnan().all()
    assert all(parked(p) is not None for p in model.parameters() if p.nbytes >= 64)
    with shardwise.zero.GatheredParameters(model.parameters()):
        twin = copy.deepcopy(model)
        twin(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="of the script"), shardwise.zero.Init():
        raise ConfigError("of the script")
    with pytest.raises(StateError, match=r"initialize\(\) was called inside zero\.Init"), shardwise.zero.Init():
        shardwise.initialize(model=model, config=config_of(3))
    for argument in ({"mpu": 1}, {"remote_device": "nvme"}, {"zero_quantized_weights": True}, {"dtype": torch.int8}):
        with pytest.raises(ConfigError, match=r"zero\.Init\("):
            shardwise.zero.Init(**argument)
    with open_engine(model, None, config_of(3)) as engine:
        engine(torch.zeros(1, 2, dtype=torch.int64))
        assert engine.state_dict()
    with pytest.raises(ConfigError, match="shows NaN, because its values rest elsewhere"):
        shardwise.initialize(model=model, config=config_of(3))


def test_what_rests_in_pieces_is_not_taken_for_weights(world2: World) -> None:
    world2.run(misused)


def on_meta() -> None:
    with torch.device("meta"):
        model = built.build_rows()
    with pytest.raises(ConfigError, match=r"'wte.weight' is on the meta device.*load_pretrained"):
        shardwise.initialize(model=model, config=config_of(3))


def test_a_model_without_values_is_refused(world2: World) -> None:
    world2.run(on_meta)


def shared_memory_outside() -> None:
    kept: list[torch.Tensor] = []

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(33, 47), nn.Linear(33, 47))
        kept.extend((model[0].weight.detach(), model[1].weight[3]))
        kept.append(torch.from_numpy(model[0].bias.detach().numpy()))
        return model

    torch.manual_seed(0)
    build()
    wanted = list(map(torch.clone, kept))
    kept.clear()
    model = built.in_pieces(build, small_bytes=1)
    for got, value in zip(kept, wanted, strict=True):
        assert torch.equal(got, value)
    assert built.number_in_pieces(model) == 4


def test_memory_that_others_share_stays(world2: World) -> None:
    world2.run(shared_memory_outside)


def parting() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(*(nn.Linear(61, 61) for _ in range(5)))
        if rank() == 0:
            model[0].weight.sum()
        return nn.Sequential(model, nn.Linear(61, 67))

    built.in_pieces(build, max_whole_bytes=2 * 4 * 61**2)


def test_ranks_that_part_ways_are_named(own_world: Callable[..., World]) -> None:
    failures = own_world(2).run_expecting_errors(parting)
    words = [str(failure) for failure in failures if failure is not None]
    assert words and any("Linear.weight (the" in word and "zero.Init" in word for word in words), words


def failing_in_the_middle() -> None:
    def build() -> nn.Module:
        model = built.Rows()
        raise KeyError(model.wte.weight)

    with pytest.raises(KeyError) as caught:
        built.in_pieces(build)
    assert caught.value.args[0].shape == (built.VOCAB, built.WIDTH)
    built.assert_same_state(  # and the next one is not disturbed
        built.whole_state(built.in_pieces(built.build_rows)), built.build_rows().state_dict()
    )


def test_a_constructor_that_raises(world2: World) -> None:
    world2.run(failing_in_the_middle)


def nothing_left() -> None:
    hooks = torch.nn.modules.module._global_parameter_registration_hooks
    model: Any = built.in_pieces(built.build_rows)
    assert not hooks
    attributes = set(vars(nn.Linear(1, 1)))
    assert all(set(vars(module)) == attributes for module in model.modules() if type(module) is nn.Linear)
    assert not any(vars(parameter) for parameter in model.parameters())
    with open_engine(model, None, config_of(2)):
        assert built.number_in_pieces(model) == 0
    assert not any(module._forward_pre_hooks or module._state_dict_pre_hooks for module in model.modules())


def test_nothing_is_left_behind(world2: World) -> None:
    world2.run(nothing_left)
