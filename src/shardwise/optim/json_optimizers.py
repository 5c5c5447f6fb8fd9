"""From the config's optimizer block to a torch optimizer.

The names and their meaning are those of the DeepSpeed JSON; the implementations are torch's, fused where it can be.
Lamb and Lion, which torch does not have, are ours; Muon is torch's Muon for matrices beside torch's AdamW for the rest.
"""

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardwise.config.messages import shown
from shardwise.errors import ConfigError
from shardwise.optim.arguments import check_names, construct, find_by_name, switch
from shardwise.optim.lamb import Lamb
from shardwise.optim.lion import Lion
from shardwise.optim.muon import Muon, split_groups

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]

# Names of the DeepSpeed JSON that stand for optimizers which are not here, with the reason.
_ABSENT = {
    "onebitadam": "its compressed communication does not work together with sharded states",
    "onebitlamb": "its compressed communication does not work together with sharded states",
    "zerooneadam": "its compressed communication does not work together with sharded states",
    "muadam": "it belongs to the package mup",
    "muadamw": "it belongs to the package mup",
    "musgd": "it belongs to the package mup",
}

# Switches of the DeepSpeed JSON: where the optimizer has none of that name, only the value that asks for nothing new
# can be met.
_ONLY_TRUE = {
    "bias_correction": "torch's Adam always corrects the bias of its first steps",
    "fp32_optimizer_states": "optimizer states are always fp32",
    "set_grad_none": "gradients are always freed after a step",
}
_ADAM_MODES = ("adam_w_mode", "torch_adam")

_FUSED_DEVICES = {"cpu", "cuda"}
_FUSED_DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
_WITH_FUSED_STEP = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, Muon)


def build_optimizer(
    type: str, params: Mapping[str, Any], parameters: Parameters, model: nn.Module | None = None
) -> Optimizer:
    """Build the optimizer that a config names, over `parameters` (tensors, or groups as torch.optim takes them).

    `type` is found in any case: Adam, AdamW, Lamb, Lion, Muon, or any class of torch.optim. Adam means AdamW unless
    ``adam_w_mode`` is false; both start from weight_decay 0, not torch's 0.01, unless ``torch_adam`` is true. Muon
    leaves to AdamW what is no matrix; `model`, if it is known, tells it which matrices are embeddings.
    The step is fused where torch has a fused one for the parameters' device and dtype, unless `params` say otherwise.
    Raises ConfigError for an unknown type, an unknown parameter or a value that the optimizer refuses.
    """
    if type.lower() in _ABSENT:
        raise ConfigError(
            f"optimizer.type is {shown(type)}, which is not available: {_ABSENT[type.lower()]}. "
            "Use AdamW, Lamb, Lion, Muon or a name of torch.optim; or pass an optimizer object to initialize()."
        )
    chosen = find_by_name("optimizer", type, _known())
    arguments = dict(params)
    if "max_grad_norm" in arguments:
        raise ConfigError(
            f"optimizer.params.max_grad_norm is {shown(arguments['max_grad_norm'])}, but clipping is not the "
            'optimizer\'s work. Remove it, and set "gradient_clipping" at the top level of the config.'
        )
    understood = tuple(_ONLY_TRUE)
    if chosen in (torch.optim.Adam, torch.optim.AdamW):
        chosen = _take_adam_modes(arguments)
        understood += _ADAM_MODES
    owner = f"The optimizer {chosen.__name__}"
    check_names(owner, chosen, arguments, supplied=("params",), extra=understood)
    _take_switches(chosen, arguments)
    if isinstance(arguments.get("betas"), list):
        arguments["betas"] = tuple(arguments["betas"])

    listed = [_with_list(entry) for entry in parameters]
    if chosen is Muon:
        listed = construct(owner, partial(split_groups, model=model), listed)
    if _fused_step_fits(chosen, arguments, listed):
        arguments["fused"] = True
    return construct(owner, chosen, listed, **arguments)


def _known() -> dict[str, type[Optimizer]]:
    known: dict[str, type[Optimizer]] = {
        name: entry
        for name, entry in vars(torch.optim).items()
        if isinstance(entry, type) and issubclass(entry, Optimizer) and entry is not Optimizer
    }
    return known | {"Lamb": Lamb, "Lion": Lion, "Muon": Muon}


def _take_switches(chosen: type[Optimizer], arguments: dict[str, Any]) -> None:
    """Remove switches that ask for nothing new; ConfigError for those that ask for what is not here."""
    own = inspect.signature(chosen).parameters
    for name, reason in _ONLY_TRUE.items():
        wanted = switch(f"optimizer.params.{name}", arguments.get(name, True))
        if name in own:
            continue
        arguments.pop(name, None)
        if not wanted:
            raise ConfigError(f"optimizer.params.{name} is false, but {reason}. Remove it, or set it to true.")


def _take_adam_modes(arguments: dict[str, Any]) -> type[Optimizer]:
    """Return the class that Adam's modes mean, and leave only torch's own arguments."""
    decoupled = switch("optimizer.params.adam_w_mode", arguments.pop("adam_w_mode", True))
    as_torch = switch("optimizer.params.torch_adam", arguments.pop("torch_adam", False))
    if not as_torch:
        if arguments.get("amsgrad"):
            raise ConfigError(
                "optimizer.params.amsgrad is true, but the JSON's Adam has no AMSGrad variant. "
                'Set "torch_adam": true beside it to get torch\'s own, or remove it.'
            )
        arguments.setdefault("weight_decay", 0.0)
    return torch.optim.AdamW if decoupled else torch.optim.Adam


def _fused_step_fits(chosen: type[Optimizer], arguments: Mapping[str, Any], listed: list[Any]) -> bool:
    """Whether to ask for torch's fused step: it exists, nothing in `arguments` speaks against, tensors suit."""
    if chosen not in _WITH_FUSED_STEP or any(arguments.get(name) for name in ("foreach", "differentiable")):
        return False
    if "fused" in arguments:
        return False  # the user's word stands, whatever it is
    return all(tensor.device.type in _FUSED_DEVICES and tensor.dtype in _FUSED_DTYPES for tensor in _tensors(listed))


def _with_list(entry: Any) -> Any:
    """Return a group whose parameters can be walked twice, where it came with a generator; else the entry itself."""
    if isinstance(entry, dict) and "params" in entry and not isinstance(entry["params"], Tensor):
        return {**entry, "params": list(entry["params"])}
    return entry


def _tensors(listed: list[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for entry in listed:
        held = entry.get("params", ()) if isinstance(entry, dict) else entry
        found.extend([held] if isinstance(held, Tensor) else [tensor for tensor in held if isinstance(tensor, Tensor)])
    return found
