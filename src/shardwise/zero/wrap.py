"""Which modules become units, and which parameters belong to which unit: found, not configured.

- Repeated blocks of one class (the children of a ``ModuleList`` or ``Sequential``) are units.
- Modules of the classes that the user names are units; leaf classes (mixtures of experts, whose parts may run on some
  ranks only) are units and nothing inside them is one.
- Large linear and embedding layers that are left over (an untied output layer) are units of their own.
- What then remains belongs to the root, which is whole from the start of forward to the end of backward.
- A parameter that several units would share belongs to their nearest common ancestor, since it must be whole whenever
  one of them runs; ``register_external_parameter`` tells of uses that cannot be seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from shardwise.errors import ConfigError
from shardwise.zero.external import external_parameters

LARGE_LEAF_FRACTION = 0.5
"""A layer that is left over becomes a unit if it has this share of the largest block's parameters."""

_LAYERS = (nn.Linear, nn.Embedding)
"""Layers that are called to be used. Their subclasses may be mere holders of a weight, as attention's output layer."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Never called, so nothing would say when they are to be whole; but for subclasses with a forward of their own."""

ROOT = "<root>"
"""Name of the unit of what is left over."""


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """A unit to be: its module and its own parameters, by their full names, each once."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]


def plan_units(
    model: nn.Module,
    unit_classes: Collection[str] = (),
    leaf_classes: Collection[str] = (),
    leaf_names: Collection[str] = (),
    leaf_name_suffixes: Collection[str] = (),
) -> list[UnitPlan]:
    """Cut ``model`` into units; every parameter belongs to exactly one, the root's comes first.

    Args:
        model: the whole model.
        unit_classes: names of classes whose instances are units; empty: found from repetition.
        leaf_classes: names of classes whose instances are units with all that they hold.
        leaf_names: full names of modules to treat likewise.
        leaf_name_suffixes: ends of such names.

    Raises:
        ConfigError: a class or a module of that name does not occur in the model.
    """
    leaves = _find_leaves(model, leaf_classes, leaf_names, leaf_name_suffixes)
    chosen = dict(leaves)
    if unit_classes:
        named = _named_classes(model, unit_classes, "unit_classes")
        chosen.update((n, m) for n, m in named.items() if not any(_inside(n, leaf) for leaf in leaves))
    else:
        chosen.update(_repeated_blocks(model, leaves))
    chosen.pop("", None)
    owners = _assign(model, chosen)
    if not unit_classes:
        large = _large_leaves(model, chosen, owners)
        if large:
            chosen.update(large)
            owners = _assign(model, chosen)
    plans: dict[str, UnitPlan] = {"": UnitPlan(ROOT, model, {})}
    for name, module in model.named_modules():
        if name in chosen:
            plans[name] = UnitPlan(name, module, {})
    for name, parameter in model.named_parameters():
        plans[owners[parameter]].parameters[name] = parameter
    return [plan for plan in plans.values() if plan.parameters or plan.name == ROOT]


def _inside(name: str, ancestor: str) -> bool:
    return ancestor == "" or name == ancestor or name.startswith(ancestor + ".")


def _named_classes(model: nn.Module, classes: Collection[str], setting: str) -> dict[str, nn.Module]:
    found = {name: module for name, module in model.named_modules() if type(module).__name__ in classes}
    present = {type(module).__name__ for module in model.modules()}
    missing = sorted(set(classes) - present)
    if missing:
        raise ConfigError(
            f"{setting} names {missing}, but the model has no module of such a class. "
            f"Its classes are {sorted(present)}."
        )
    _refuse_containers(found, setting)
    return found


def _refuse_containers(modules: Mapping[str, nn.Module], setting: str) -> None:
    for name, module in modules.items():
        if _is_mere_container(module):
            raise ConfigError(
                f"{setting} chooses {name!r}, a {type(module).__name__}: containers are never called, so a unit could "
                "not know when to be whole. Name the class of the modules inside, or of the module around."
            )


def _is_mere_container(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) and type(module).forward is nn.Module.forward


def _find_leaves(
    model: nn.Module, classes: Collection[str], names: Collection[str], suffixes: Collection[str]
) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    leaves = _named_classes(model, classes, "zero_leaf_modules") if classes else {}
    unknown = sorted(name for name in names if name not in modules)
    if unknown:
        raise ConfigError(f"leaf_module.names has {unknown}, but the model has no such modules.")
    by_name = {name: modules[name] for name in names}
    by_name.update({name: module for name, module in modules.items() if suffixes and name.endswith(tuple(suffixes))})
    _refuse_containers(by_name, "leaf_module")
    leaves.update(by_name)
    return {
        name: module
        for name, module in leaves.items()
        if not any(other != name and _inside(name, other) for other in leaves)
    }


def _repeated_blocks(model: nn.Module, leaves: Collection[str]) -> dict[str, nn.Module]:
    """Children of containers whose class occurs at least twice there; the outermost ones only.

    A container in a container is looked into first: only its blocks are called for sure (a ``ModuleList`` never is).
    """
    blocks: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        if prefix in leaves:
            return
        children = {f"{prefix}.{name}" if prefix else name: child for name, child in module.named_children()}
        repeated: Counter[type[nn.Module]] = Counter()
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            repeated.update(type(child) for child in children.values() if _has_parameters(child))
        for name, child in children.items():
            is_block = repeated[type(child)] >= 2 and name not in leaves
            if _is_mere_container(child) or isinstance(child, nn.Sequential):
                before = len(blocks)
                visit(child, name)
                is_block = is_block and isinstance(child, nn.Sequential) and len(blocks) == before
            elif not is_block:
                visit(child, name)
            if is_block and _has_parameters(child):
                blocks[name] = child

    visit(model, "")
    return blocks


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _large_leaves(model: nn.Module, chosen: Collection[str], owners: dict[nn.Parameter, str]) -> dict[str, nn.Module]:
    """Leftover layers that are large beside the blocks, with parameters that no other module uses."""
    sizes: Counter[str] = Counter()
    for parameter, owner in owners.items():
        sizes[owner] += parameter.numel()
    largest_block = max((sizes[name] for name in chosen), default=0)
    large = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if (
            name == ""
            or type(module) not in _LAYERS
            or largest_block == 0
            or any(owners[parameter] != "" for parameter in own)
        ):
            continue
        users = {id(user) for parameter in own for user in _users(model, parameter)}
        if users == {id(module)} and sum(p.numel() for p in own) >= LARGE_LEAF_FRACTION * largest_block:
            large[name] = module
    return large


def _users(model: nn.Module, parameter: nn.Parameter) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(own is parameter for own in (*module.parameters(recurse=False), *external_parameters(module))):
            yield module


def _assign(model: nn.Module, chosen: Collection[str]) -> dict[nn.Parameter, str]:
    """The unit of each parameter: the innermost one that holds all the modules that use it."""
    owners: dict[nn.Parameter, str] = {}
    own = set(model.parameters())
    uses = [(name.rpartition(".")[0], p) for name, p in model.named_parameters(remove_duplicate=False)]
    uses += [(name, p) for name, module in model.named_modules() for p in external_parameters(module) if p in own]
    for path, parameter in uses:
        nearest = max((unit for unit in chosen if _inside(path, unit)), key=len, default="")
        known = owners.get(parameter)
        owners[parameter] = nearest if known is None else _common_unit(known, nearest, chosen)
    return owners


def _common_unit(left: str, right: str, chosen: Collection[str]) -> str:
    common = [unit for unit in chosen if _inside(left, unit) and _inside(right, unit)]
    return max(common, key=len, default="")
