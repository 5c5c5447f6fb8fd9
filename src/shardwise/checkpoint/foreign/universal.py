"""DeepSpeed's universal checkpoints: a directory for each parameter, and a file in it for each kind.

::

    TAG/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt    whole tensors, alone or as "param"; the step count
    TAG/zero/optimizer_state.pt                                  groups' settings, loss scaler
    TAG/*_model_states.pt                                        names, buffers, frozen weights, the run, as they were
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.foreign.deepspeed_files import MODEL, SHARDED_MODEL, find
from shardwise.checkpoint.foreign.model_states import ModelStates, dict_of, names_of, read_model_states, stored_of
from shardwise.checkpoint.foreign.source import Draft, Piece, Source, Training
from shardwise.checkpoint.foreign.torch_file import Stored, TorchFile
from shardwise.errors import CheckpointError

PARAMETERS_A_FILE = 128
"""Parameters that one file of a conversion takes: so few of their files are mapped at a time."""


def is_universal(own: Path) -> bool:
    """Whether the directory looks like one."""
    return (own / "zero").is_dir()


def read_universal(own: Path) -> Source:
    """What the directory holds.

    Args:
        own: the checkpoint's own directory.

    Raises:
        CheckpointError: files are missing or damaged, or are of a layout that this does not know.
    """
    models = find(own, SHARDED_MODEL) or find(own, MODEL)
    if not models:
        raise CheckpointError(f"{own} holds parameters and no *_model_states.pt, which says what they are.")
    states = read_model_states(models[0])
    others = [read_model_states(path).fragments for path in models[1:] if states.fragments]
    path = own / "zero" / "optimizer_state.pt"
    said = dict_of(TorchFile(path).value, "", path)
    groups = tuple(dict_of(group, "of settings", path) for group in said.get("param_groups") or ())
    owners = _owners(states, groups)
    draft = Draft(own, 1 + len(owners) // PARAMETERS_A_FILE, 1)
    steps = _steps(said)
    for number, (name, (flat, group, shape)) in enumerate(owners.items()):
        file = number // PARAMETERS_A_FILE
        _add(draft, own / "zero" / name, states, shape, group, file, steps.get(flat))
    _add_frozen(draft, states, [states.fragments, *others])
    for name in states.buffers:
        draft.add_buffer(name, [states.module[name]])
    training = Training(
        groups=groups,
        scheduler=states.values.get("lr_scheduler"),
        scaler=said.get("loss_scaler"),
        counters=states.counters,
        client_state=states.client_state,
        stage=said["zero_stage"] if type(said.get("zero_stage")) is int else 1,
    )
    return draft.finish(names_of(states, draft.parameters), training)


def _owners(states: ModelStates, groups: tuple[Mapping[str, Any], ...]) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Names of trainable parameters: the flat tensor that each was in, its group and its shape."""
    of_flat = {flat: number for number, group in enumerate(groups) for flat in group.get("params") or ()}
    return {
        name: (flat, of_flat.get(flat, flat), shape)
        for flat, shapes in enumerate(states.groups)
        for name, shape in shapes.items()
    }


def _number(value: Any) -> torch.Tensor:
    """A step count as torch's optimizers keep it."""
    return torch.tensor(float(value.tensor() if isinstance(value, Stored) else value))


def _steps(said: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """Step counts of flat tensors, which at stage 3 stand beside the parameters alone."""
    base = said.get("optimizer_state_dict")
    states = base.get("state") if isinstance(base, dict) else None
    if not isinstance(states, dict):
        return {}
    return {flat: _number(state["step"]) for flat, state in states.items() if "step" in state}


def _add(
    draft: Draft, folder: Path, states: ModelStates, shape: tuple[int, ...], group: int, file: int, steps: Any
) -> None:
    if not (folder / "fp32.pt").is_file():
        raise CheckpointError(f"{folder} holds no fp32.pt: the universal checkpoint is not whole.")
    tensors: dict[str, Stored] = {}
    step: dict[str, Any] = {} if steps is None else {"step": steps}
    for path in sorted(folder.glob("*.pt")):
        value = TorchFile(path).value
        if path.stem == "step":
            step["step"] = _number(value)
            continue
        # What was made of stage 3 is the tensor itself.
        stored = (
            value if isinstance(value, Stored) else stored_of(dict_of(value, "with 'param'", path).get("param"), path)
        )
        if stored.numel != torch.Size(shape).numel():
            raise CheckpointError(f"{path} holds {stored.numel} elements of a parameter of shape {shape}.")
        tensors[path.stem] = stored
    weight = tensors.pop("fp32")
    name = folder.name
    compute = states.module[name].dtype if name in states.module else weight.dtype
    whole = Piece(file, 0, weight.numel, weight, 0, tensors)
    draft.add_parameter(name, shape, [whole], compute, group, step if tensors else {})


def _add_frozen(draft: Draft, states: ModelStates, fragments: list[Mapping[str, Stored]]) -> None:
    """What was never trained stays where it was: whole in the state dict, or in parts of equal length."""
    for name, shape in states.frozen.items():
        parts = [of_rank[name] for of_rank in fragments]
        numel, part = torch.Size(shape).numel(), parts[0].numel
        pieces = [
            Piece(0, min(n * part, numel), min((n + 1) * part, numel), stored, 0, {}) for n, stored in enumerate(parts)
        ]
        draft.add_parameter(name, shape, pieces, parts[0].dtype, None, {})
    for name, stored in states.module.items():
        known = name in states.buffers or name in states.ties or name in draft.parameters
        if not known and stored.numel:
            draft.add_parameter(name, stored.shape, [Piece(0, 0, stored.numel, stored, 0, {})], stored.dtype, None, {})
