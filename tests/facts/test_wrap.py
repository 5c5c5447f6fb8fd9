"""Units are found: which modules become units, and that each parameter is in exactly one that all its users lie in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from shardwise.errors import ConfigError
from shardwise.zero.wrap import LARGE_LEAF_FRACTION, ROOT, UnitPlan, plan_units

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""No clock decides: the machine may be busy with other things."""


class Parts(nn.Module):
    """Children by name, in order; what forward would do does not matter here."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Block(Parts):
    def __init__(self, width: int = 3) -> None:
        super().__init__(up=nn.Linear(width, width), down=nn.Linear(width, width))


class Other(Block):
    """Another class of the same parts."""


class Experts(Parts):
    def __init__(self) -> None:
        super().__init__(gate=nn.Linear(3, 2), experts=nn.ModuleList([Block(), Block()]))


def names(model: nn.Module, **settings: Any) -> list[str]:
    """The units that own parameters, in order."""
    return [plan.name for plan in plan_units(model, **settings) if plan.parameters]


def owner(model: nn.Module, parameter: str, **settings: Any) -> str:
    found = [plan.name for plan in plan_units(model, **settings) if parameter in plan.parameters]
    assert len(found) == 1, found
    return found[0]


# -- repetition


@pytest.mark.parametrize(
    "container", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)], ids=["list", "sequential"]
)
def test_repeated_blocks_are_units_and_the_rest_is_the_roots(container: Callable[..., nn.Module]) -> None:
    model = Parts(norm=nn.LayerNorm(3), blocks=container([Block(), Block(), Block()]), end=nn.LayerNorm(3))
    plans = plan_units(model)
    assert [plan.name for plan in plans] == [ROOT, "blocks.0", "blocks.1", "blocks.2"]
    assert plans[0].module is model
    assert list(plans[0].parameters) == ["norm.weight", "norm.bias", "end.weight", "end.bias"]
    assert plans[2].module is model.get_submodule("blocks.1")
    assert plans[2].parameters == {f"blocks.1.{name}": p for name, p in plans[2].module.named_parameters()}


def test_the_root_is_there_even_with_nothing_left_for_it() -> None:
    assert [plan.name for plan in plan_units(Parts(blocks=nn.ModuleList([Block(), Block()])))] == [
        ROOT,
        "blocks.0",
        "blocks.1",
    ]


def test_the_model_itself_may_be_the_container() -> None:
    assert names(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))) == ["0", "2"]


def test_one_block_alone_is_no_repetition() -> None:
    assert names(Parts(blocks=nn.ModuleList([Block(), Other()]))) == [ROOT]


def test_modules_without_parameters_are_no_units() -> None:
    assert names(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(3, 3))) == [ROOT]


def test_a_model_without_parameters_has_an_empty_root() -> None:
    (plan,) = plan_units(nn.ReLU())
    assert (plan.name, plan.parameters) == (ROOT, {})


def test_only_the_outermost_repetition_counts() -> None:
    class Deep(Parts):
        def __init__(self) -> None:
            super().__init__(layers=nn.ModuleList([Block(), Block()]))

    assert names(Parts(blocks=nn.ModuleList([Deep(), Deep()]))) == ["blocks.0", "blocks.1"]


def test_stages_of_blocks_are_looked_into() -> None:
    inner = ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    for stage in (lambda: nn.ModuleList([Block(), Block()]), lambda: nn.Sequential(Block(), Block())):
        assert names(Parts(stages=nn.ModuleList([stage(), stage()]))) == inner
    assert names(Parts(encoder=Parts(layers=nn.ModuleList([Block(), Block()])))) == [
        "encoder.layers.0",
        "encoder.layers.1",
    ]


def test_a_sequential_of_different_modules_is_a_block_itself() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(2)))
    assert names(model) == ["0", "1"]


# -- containers that are never called


@pytest.mark.parametrize(
    "container",
    [
        lambda: nn.ModuleList([Block(), nn.LayerNorm(3)]),
        lambda: nn.ModuleDict({"a": Block(), "b": nn.LayerNorm(3)}),
        lambda: nn.ParameterList([nn.Parameter(torch.zeros(3))]),
        lambda: nn.ParameterDict({"a": nn.Parameter(torch.zeros(3))}),
    ],
    ids=["ModuleList", "ModuleDict", "ParameterList", "ParameterDict"],
)
def test_a_container_that_is_never_called_is_no_block(container: Callable[[], nn.Module]) -> None:
    """Nothing would make its parameters whole."""
    assert names(Parts(stages=nn.ModuleList([container(), container()]))) == [ROOT]


@pytest.mark.parametrize(
    "container", [lambda p: nn.ParameterList([p]), lambda p: nn.ParameterDict({"a": p})], ids=["list", "dict"]
)
def test_a_large_container_of_parameters_stays_with_its_user(container: Callable[..., nn.Module]) -> None:
    model = Parts(blocks=nn.ModuleList([Block(), Block()]), prompts=container(nn.Parameter(torch.zeros(100))))
    (parameter,) = (name for name, _ in model.named_parameters() if name.startswith("prompts"))
    assert owner(model, parameter) == ROOT


@pytest.mark.parametrize(
    "settings",
    [{"unit_classes": ["ModuleList"]}, {"leaf_classes": ["ModuleList"]}, {"leaf_names": ["blocks"]}],
    ids=str,
)
def test_naming_a_container_that_is_never_called_is_a_mistake(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="ModuleList"):
        plan_units(Parts(blocks=nn.ModuleList([Block(), Block()])), **settings)


class CalledList(nn.ModuleList):
    """A container with a forward of its own, as mixtures of experts have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = block.up(x)
        return x


@pytest.mark.parametrize("settings", [{"unit_classes": ["CalledList"]}, {"leaf_classes": ["CalledList"]}])
def test_a_container_that_is_called_may_be_named(settings: dict[str, Any]) -> None:
    model = Parts(first=CalledList([Block(), Block()]), second=CalledList([Block()]))
    assert names(model, **settings) == ["first", "second"]


def test_containers_that_are_called_are_blocks_like_others() -> None:
    model = Parts(stages=nn.ModuleList([CalledList([Block(), Other()]), CalledList([Block(), Other()])]))
    assert names(model) == ["stages.0", "stages.1"]


def test_the_output_layer_of_attention_stays_with_the_attention() -> None:
    """torch's attention reads the weights of ``out_proj`` and never calls it."""
    model = Parts(blocks=nn.ModuleList([Block(), Block()]), pool=nn.MultiheadAttention(16, 2))
    assert owner(model, "pool.out_proj.weight") == owner(model, "pool.in_proj_weight")


# -- what the user names


def test_named_classes_replace_the_search() -> None:
    model = Parts(blocks=nn.ModuleList([Block(), Block(), Other()]), head=nn.Linear(3, 100))
    assert names(model, unit_classes=["Other"]) == [ROOT, "blocks.2"]
    assert names(model, unit_classes=["Other", "Block"]) == [ROOT, "blocks.0", "blocks.1", "blocks.2"]


def test_named_classes_may_lie_in_each_other() -> None:
    model = Parts(encoder=Experts(), end=nn.LayerNorm(3))
    plans = {plan.name: list(plan.parameters) for plan in plan_units(model, unit_classes=["Experts", "Block"])}
    assert list(plans) == [ROOT, "encoder", "encoder.experts.0", "encoder.experts.1"]
    assert plans["encoder"] == ["encoder.gate.weight", "encoder.gate.bias"]


def test_naming_the_models_own_class_changes_nothing() -> None:
    assert names(Experts(), unit_classes=["Experts"]) == [ROOT]


def test_a_leaf_class_is_a_unit_with_all_that_it_holds() -> None:
    model = Parts(moe=Experts(), blocks=nn.ModuleList([Block(), Block()]))
    assert names(model, leaf_classes=["Experts"]) == ["moe", "blocks.0", "blocks.1"]


def test_leaf_classes_hold_with_named_classes_too() -> None:
    model = Parts(moe=Experts(), blocks=nn.ModuleList([Block(), Block()]))
    assert names(model, leaf_classes=["Experts"], unit_classes=["Block"]) == ["moe", "blocks.0", "blocks.1"]


def test_a_leaf_in_a_leaf_belongs_to_the_outer_one() -> None:
    model = Parts(outer=Parts(moe=Experts()), end=nn.LayerNorm(3))
    assert names(model, leaf_classes=["Experts"], leaf_names=["outer"]) == [ROOT, "outer"]


def test_leaves_by_name_and_by_end_of_name() -> None:
    model = Parts(a=Parts(moe=Experts()), b=Parts(moe=Experts()), c=Parts(mixture=Experts()))
    found = ["c.mixture.experts.0", "c.mixture.experts.1"]
    assert names(model, leaf_names=["a.moe", "b.moe"]) == [ROOT, "a.moe", "b.moe", *found]
    assert names(model, leaf_name_suffixes=[".moe"]) == [ROOT, "a.moe", "b.moe", *found]


def test_the_whole_model_as_a_leaf_is_the_root_alone() -> None:
    model = Experts()
    assert names(model, leaf_classes=["Experts"]) == [ROOT]
    assert names(model, leaf_names=[""]) == [ROOT]


def test_a_leaf_may_stand_between_repeated_blocks() -> None:
    model = nn.Sequential(Experts(), Experts(), Experts())
    assert names(model, leaf_names=["1"]) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"unit_classes": ["Block", "Blok"]}, ["unit_classes", "'Blok'", "'Block'", "'LayerNorm'"]),
        ({"leaf_classes": ["MoE"]}, ["zero_leaf_modules", "'MoE'", "'Block'"]),
        ({"leaf_names": ["blocks.0", "blocks.7"]}, ["leaf_module.names", "'blocks.7'"]),
    ],
    ids=["unit_classes", "leaf_classes", "leaf_names"],
)
def test_a_name_that_does_not_occur_is_told(settings: dict[str, Any], told: list[str]) -> None:
    model = Parts(blocks=nn.ModuleList([Block(), Block()]), end=nn.LayerNorm(3))
    with pytest.raises(ConfigError) as error:
        plan_units(model, **settings)
    assert all(text in str(error.value) for text in told), str(error.value)


# -- parameters with several users


def test_a_parameter_tied_across_blocks_belongs_to_the_common_ancestor() -> None:
    stages = nn.ModuleList([nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())])
    model = Parts(stages=stages)
    stages[0][0].up.weight = stages[0][1].up.weight
    assert owner(model, "stages.0.0.up.weight") == ROOT
    assert owner(model, "stages.0.0.down.weight") == "stages.0.0"


def test_the_common_ancestor_may_be_a_unit_itself() -> None:
    model = Parts(moe=Experts(), end=nn.LayerNorm(3))
    first, second = model.moe.experts
    first.up.weight = second.up.weight
    assert owner(model, "moe.experts.0.up.weight", unit_classes=["Experts", "Block"]) == "moe"


def test_a_parameter_tied_within_a_block_stays_there() -> None:
    model = Parts(blocks=nn.ModuleList([Block(), Block()]))
    model.blocks[1].up.weight = model.blocks[1].down.weight
    assert owner(model, "blocks.1.up.weight") == "blocks.1"


def test_a_block_under_two_names_belongs_to_what_holds_both() -> None:
    shared = Block()
    model = Parts(blocks=nn.ModuleList([shared, Block(), Block()]), again=shared)
    assert owner(model, "blocks.0.up.weight") == ROOT


# -- large modules that are left over


def test_a_large_leftover_module_is_a_unit() -> None:
    block_numel = sum(p.numel() for p in Block().parameters())
    at_the_bound = nn.Linear(int(LARGE_LEAF_FRACTION * block_numel), 1, bias=False)
    below_it = nn.Linear(int(LARGE_LEAF_FRACTION * block_numel) - 1, 1, bias=False)
    model = Parts(blocks=nn.ModuleList([Block(), Block()]), large=at_the_bound, small=below_it)
    assert names(model) == [ROOT, "blocks.0", "blocks.1", "large"]
    assert owner(model, "small.weight") == ROOT


def test_a_large_module_with_a_tied_weight_is_the_roots() -> None:
    embedding, head = nn.Embedding(50, 3), nn.Linear(3, 50, bias=False)
    head.weight = embedding.weight
    model = Parts(embedding=embedding, blocks=nn.ModuleList([Block(), Block()]), head=head)
    assert owner(model, "embedding.weight") == ROOT


def test_without_blocks_nothing_is_large() -> None:
    assert names(Parts(embedding=nn.Embedding(50, 3), head=nn.Linear(3, 50))) == [ROOT]


# -- any model


LEAVES = st.sampled_from([lambda: nn.Linear(3, 3), lambda: nn.LayerNorm(3), lambda: nn.Embedding(40, 3), nn.ReLU])


def _nest(children: st.SearchStrategy[Callable[[], nn.Module]]) -> st.SearchStrategy[Callable[[], nn.Module]]:
    def make(kind: str, makers: list[Callable[[], nn.Module]], repeats: int) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            built = [maker() for maker in makers for _ in range(repeats)]
            if kind == "list":
                return nn.ModuleList(built)
            if kind == "sequential":
                return nn.Sequential(*built)
            named = {f"m{index}": module for index, module in enumerate(built)}
            return nn.ModuleDict(named) if kind == "dict" else Parts(**named)

        return build

    kinds = st.sampled_from(["list", "sequential", "dict", "parts"])
    return st.builds(make, kinds, st.lists(children, min_size=1, max_size=3), st.integers(1, 2))


TREES = st.recursive(LEAVES, _nest, max_leaves=10)


def _tie(model: nn.Module, data: st.DataObject) -> None:
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    if len(linears) > 1 and data.draw(st.booleans(), label="tie two weights"):
        one, other = data.draw(st.permutations(linears), label="tied")[:2]
        one.weight = other.weight


def _is_never_called(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _users(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """All names of all modules that hold ``parameter``."""
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if parameter in set(module._parameters.values())
    ]


def _holds(plan: UnitPlan, users: list[str]) -> bool:
    return plan.name == ROOT or all(user == plan.name or user.startswith(plan.name + ".") for user in users)


@untimed
@given(TREES, st.data())
def test_every_parameter_is_in_the_innermost_unit_that_holds_all_its_users(
    build: Callable[[], nn.Module], data: st.DataObject
) -> None:
    model = Parts(tree=build())
    _tie(model, data)
    settings: dict[str, Any] = {}
    callable_modules = [name for name, module in model.named_modules() if name and not _is_never_called(module)]
    if callable_modules and data.draw(st.booleans(), label="with a leaf"):
        settings["leaf_names"] = [data.draw(st.sampled_from(callable_modules), label="leaf")]
    plans = plan_units(model, **settings)

    assert plans[0].name == ROOT and plans[0].module is model
    assert all(plan.module is model.get_submodule(plan.name) for plan in plans[1:])
    assert all(plan.parameters for plan in plans[1:])
    owned = [(name, parameter) for plan in plans for name, parameter in plan.parameters.items()]
    assert sorted(name for name, _ in owned) == sorted(name for name, _ in model.named_parameters())
    assert all(model.get_parameter(name) is parameter for name, parameter in owned)
    for plan in plans:
        assert not _is_never_called(plan.module)
        for parameter in plan.parameters.values():
            users = _users(model, parameter)
            innermost = max((p for p in plans if _holds(p, users)), key=lambda p: len(p.name) * (p.name != ROOT))
            assert innermost is plan
    for leaf in settings.get("leaf_names", ()):
        assert not any(plan.name.startswith(leaf + ".") for plan in plans), "a unit inside a leaf"
