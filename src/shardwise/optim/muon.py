"""The DeepSpeed JSON's Muon: matrices by Muon, everything else by AdamW, in one optimizer.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix. That suits a linear map between
hidden layers; a bias or a norm's gain is no matrix, and the rows of an embedding are a table, not a map. So every
parameter has to be told apart. Who decides, from the strongest:

1. its group: ``"use_muon": true`` or ``false`` in a parameter group;
2. its own flag: the attribute ``use_muon`` that DeepSpeed scripts put on parameters (all matrices have it, or none);
3. else its place in the model: 2-D parameters are Muon's, but for the weights of ``nn.Embedding`` and those whose name
   contains "embed" or "lm_head". Where only parameters are known and no model, all 2-D parameters are Muon's.

Only 2-D parameters can be Muon's. The kernels of convolutions go by AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from shardwise.errors import ConfigError

_NOT_MAPS = ("embed", "lm_head")  # in a name: the tables at both ends of a language model
_MUON_RATE, _ADAM_RATE = 0.02, 3e-4
_MUON_SETTINGS = ("lr", "momentum", "weight_decay", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn")


class Muon(Optimizer):
    """torch's Muon and torch's AdamW over the groups of one optimizer.

    Every group carries the settings of both and the key ``use_muon``, which says whose it is; ``lr`` and
    ``weight_decay`` mean the same in both. A group that mixes both kinds becomes two, matrices first. State and groups
    are this object's own, so that schedulers, state dicts and sharding meet an ordinary optimizer.

    Args:
        params: tensors, or groups, as torch.optim takes them; see the module for what is a matrix.
        lr: rate of both parts, where the next two do not say otherwise. Default: 0.02 for matrices, 3e-4 for the rest.
        muon_lr: rate of the matrices.
        adam_lr: rate of the rest.
        momentum: of the matrices.
        weight_decay: decoupled, of both.
        betas: decay of AdamW's moments.
        eps: AdamW's.
        nesterov: look ahead along the momentum.
        ns_method: "standard" iterates on the matrix itself, which is the only one that torch has.
        ns_steps: number of Newton-Schulz iterations.
        ns_coefficients: of their polynomial; default: torch's.
        adjust_lr_fn: how a matrix's shape scales its rate: "original" (default) or "match_rms_adamw".
        fused: step the rest by torch's fused kernel.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        nesterov: bool = True,
        ns_method: str = "standard",
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] | None = None,
        adjust_lr_fn: str | None = None,
        fused: bool | None = None,
    ) -> None:
        _check_method(ns_method, ns_steps)
        muon_lr = _first(muon_lr, lr, _MUON_RATE)
        adam_lr = _first(adam_lr, lr, _ADAM_RATE)
        orthogonal: dict[str, Any] = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            **({} if ns_coefficients is None else {"ns_coefficients": tuple(ns_coefficients)}),
        }
        # torch's own constructors check the values and fill in what else their steps read from a group.
        of_muon = torch.optim.Muon([_stand_in()], lr=muon_lr, **orthogonal).defaults
        of_adam = torch.optim.AdamW(
            [_stand_in()], lr=adam_lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
        ).defaults
        settings = {**of_adam, **{name: of_muon[name] for name in _MUON_SETTINGS if name != "lr"}}
        super().__init__(split_groups(params), {**settings, "muon_lr": muon_lr, "adam_lr": adam_lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of one kind; which it is may be left to its parameters.

        Raises:
            ConfigError: its parameters are of both kinds, or are no matrices although it asks for Muon.
        """
        groups = split_groups([param_group])
        if len(groups) > 1:
            # One call has to add one group: callers count on it when they take a group back.
            raise ConfigError(
                f"the added group holds {len(groups[0]['params'])} matrices for Muon and {len(groups[1]['params'])} "
                "parameters for AdamW. Expected one kind: add them as two groups."
            )
        (group,) = groups or [{**param_group, "use_muon": False}]
        rate = "muon_lr" if group["use_muon"] else "adam_lr"
        group.setdefault("lr", group.get(rate, self.defaults[rate]))
        super().add_param_group(group)
        for name in ("muon_lr", "adam_lr"):  # they have done their work: a group's rate is its lr
            group.pop(name, None)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient; return the loss of `closure` if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = [group for group in self.param_groups if group["use_muon"]]
        # torch calls eps what keeps Muon's division by a norm from 0: a constant, unlike AdamW's eps of the same name.
        muon = torch.optim.Muon([_stand_in()])
        self._lend(muon, [{**group, "eps": muon.defaults["eps"]} for group in matrices])
        self._lend(torch.optim.AdamW([_stand_in()]), [group for group in self.param_groups if not group["use_muon"]])
        return loss

    def _lend(self, part: Optimizer, groups: list[dict[str, Any]]) -> None:
        """Let `part` step `groups` with the state that is kept here."""
        # A part lives for one call: kept, it would be a second place for groups and state that others exchange.
        if any(group["params"] for group in groups):
            part.param_groups, part.state = groups, self.state
            part.step()


def split_groups(params: Iterable[Any], model: nn.Module | None = None) -> list[dict[str, Any]]:
    """Sort parameters into groups of one kind, each with the key ``use_muon``; `model` tells embeddings from maps.

    Args:
        params: tensors, or groups, as torch.optim takes them.
        model: where the parameters are, if that is known.

    Raises:
        ConfigError: what is not 2-D is asked to go by Muon, or only some of the matrices have the flag.
    """
    entries = list(params)
    if not any(isinstance(entry, dict) for entry in entries):
        entries = [{"params": entries}] if entries else []
    groups = [{**entry, "params": _members(entry["params"])} for entry in entries]
    undecided = [parameter for group in groups if "use_muon" not in group for parameter in group["params"]]
    for_muon = _matrices(undecided, model)
    split: list[dict[str, Any]] = []
    for group in groups:
        if "use_muon" in group:
            _check_kind(group["use_muon"], group["params"])
            split.append(group)
            continue
        kinds = {True: [p for p in group["params"] if id(p) in for_muon]}
        kinds[False] = [p for p in group["params"] if id(p) not in for_muon]
        split += [{**group, "params": members, "use_muon": kind} for kind, members in kinds.items() if members]
    return split


def _members(params: Any) -> list[Tensor]:
    listed = [params] if isinstance(params, Tensor) else list(params)
    # Of named parameters only the tensors: names beside a group that is split would no longer fit.
    return [entry[1] if isinstance(entry, tuple) else entry for entry in listed]


def _matrices(parameters: Collection[Tensor], model: nn.Module | None) -> set[int]:
    """Ids of the parameters that go by Muon where no group decides: by their flags, else by their place."""
    candidates = [parameter for parameter in parameters if parameter.dim() == 2]
    flags = {id(p): p.use_muon for p in parameters if hasattr(p, "use_muon")}
    if not flags:
        outside = set() if model is None else _tables(model)
        return {id(parameter) for parameter in candidates} - outside
    missing = [p for p in candidates if p.requires_grad and id(p) not in flags]
    if missing:
        raise ConfigError(
            f"{len(flags)} parameters have the attribute use_muon, but {len(missing)} matrices have not, the first of "
            f"shape {tuple(missing[0].shape)}. Set it to True or False on every matrix, or on none."
        )
    flagged = [parameter for parameter in parameters if flags.get(id(parameter))]
    _check_kind(True, flagged)
    return {id(parameter) for parameter in flagged}


def _tables(model: nn.Module) -> set[int]:
    """Ids of the parameters that are tables of tokens: by the module that holds them, or by name."""
    found = {id(p) for name, p in model.named_parameters() if any(word in name.lower() for word in _NOT_MAPS)}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found.add(id(module.weight))
    return found


def _check_kind(use_muon: Any, parameters: Iterable[Tensor]) -> None:
    if not isinstance(use_muon, bool):
        raise ConfigError(f"use_muon of a parameter group is {use_muon!r}, expected true or false. Change it.")
    for parameter in parameters:
        if use_muon and parameter.dim() != 2:
            raise ConfigError(
                f"use_muon is true for a parameter of shape {tuple(parameter.shape)}, but Muon steps matrices only. "
                "Set it to false there: the parameter then goes by AdamW."
            )


def _check_method(ns_method: str, ns_steps: int) -> None:
    if ns_method == "gram":
        raise ConfigError(
            'Muon\'s ns_method is "gram", but torch iterates on the matrix itself, not on its Gram matrix. '
            'Remove it, or set it to "standard": the result is the same but for rounding.'
        )
    if ns_method != "standard":
        raise ConfigError(f'Muon\'s ns_method is {ns_method!r}, expected "standard". Change it.')
    if not isinstance(ns_steps, int) or not 1 <= ns_steps < 100:
        raise ConfigError(f"Muon's ns_steps is {ns_steps!r}, expected a whole number from 1 to 99. Change it.")


def _first(*values: float | Tensor | None) -> Any:
    return next(value for value in values if value is not None)


def _stand_in() -> Tensor:
    return torch.zeros(1, 1)
