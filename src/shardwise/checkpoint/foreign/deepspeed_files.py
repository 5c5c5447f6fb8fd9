"""Where things lie in a directory that DeepSpeed's engine has saved: ZeRO stages 0 to 3, of any number of ranks.

::

    TAG/mp_rank_00_model_states.pt                           stages 0 to 2: names, buffers, frozen weights, the run
    TAG/zero_pp_rank_R_mp_rank_00_model_states.pt            stage 3: the same of rank R, with parts of frozen weights
    TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt     rank R's part of masters and moments

At stages 1 and 2 the parameters of an optimizer group are laid end to end and the whole is cut into one part a rank. At
stage 3 each parameter is cut into equal parts, the last one padded, and a rank's parts are laid end to end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwise.checkpoint.foreign.model_states import (
    ModelStates,
    Shapes,
    dict_of,
    names_of,
    read_model_states,
    stored_of,
)
from shardwise.checkpoint.foreign.source import Draft, Piece, Source, Training
from shardwise.checkpoint.foreign.torch_file import Stored, TorchFile
from shardwise.checkpoint.foreign.unpickler import Record
from shardwise.errors import CheckpointError

MODEL = re.compile(r"mp_rank_(?P<other>\d+)_model_states\.pt")
SHARDED_MODEL = re.compile(r"zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<other>\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<other>\d+)_?optim_states\.pt")
_ELSEWHERE = {
    re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_.*|expp_rank_\d+_mp_rank_\d+_.*"): "a mixture of experts",
    re.compile(r"layer_\d+-model_.*"): "a pipeline",
    re.compile(r"offloaded_tensors"): "states that were offloaded to files",
}


def read_deepspeed(own: Path) -> Source:
    """What the directory holds.

    Args:
        own: the checkpoint's own directory.

    Raises:
        CheckpointError: files are missing or damaged, or are of a layout that this does not know; names it.
    """
    optimizer_files = find(own, OPTIMIZER)
    sharded = find(own, SHARDED_MODEL)
    models = [read_model_states(path) for path in sharded or find(own, MODEL)]
    if not models or (sharded and len(sharded) != len(optimizer_files)):
        raise CheckpointError(
            f"{own} holds {len(models)} files of model states and {len(optimizer_files)} of optimizer states. Expected "
            "one of each for each rank at stage 3, and one of model states at stages 0 to 2: bring the missing ones "
            "back from a copy."
        )
    shards = [Shard.read(path) for path in optimizer_files]
    world = max(1, len(shards))
    for shard in shards:
        if shard.num_ranks not in (None, world):
            raise CheckpointError(f"{own} is of {shard.num_ranks} ranks and holds the optimizer states of {world}.")
    draft = Draft(own, world, world)
    if sharded:
        _add_sharded(draft, models, shards)
    else:
        _add_flat(draft, models[0], shards)
    for name in models[0].buffers:
        draft.add_buffer(name, [states.module[name] for states in models if name in states.module])
    return draft.finish(names_of(models[0], draft.parameters), _training(models[0], shards))


def find(own: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Files of each rank, in rank order.

    Raises:
        CheckpointError: some are missing, or they are of a run that was cut in other ways.
    """
    found: dict[int, Path] = {}
    for path in own.iterdir():
        for elsewhere, what in _ELSEWHERE.items():
            if elsewhere.fullmatch(path.name):
                raise CheckpointError(f"{own} holds {path.name}: {what}. Expected plain ZeRO.")
        match = pattern.fullmatch(path.name)
        if match is not None:
            if int(match["other"]):
                raise CheckpointError(f"{own} holds {path.name}: tensor parallelism. Expected plain ZeRO.")
            found[int(match.groupdict().get("rank") or 0)] = path
    missing = sorted(set(range(len(found))) - found.keys())
    if missing:
        raise CheckpointError(f"{own} holds no file of rank {missing[0]} beside {found[max(found)].name}.")
    return [found[rank] for rank in range(len(found))]


def _training(states: ModelStates, shards: Sequence[Shard]) -> Training:
    return Training(
        groups=shards[0].groups if shards else None,
        scheduler=states.values.get("lr_scheduler"),
        scaler=shards[0].scaler if shards else states.values.get("loss_scaler"),
        counters=states.counters,
        client_state=states.client_state,
        stage=shards[0].stage if shards else 0,
    )


# --- one rank's optimizer states --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flat:
    """Tensors that a rank's parts of parameters lie in, end to end."""

    weights: Stored
    states: Mapping[str, Stored]
    others: Mapping[str, Any]
    group: int
    paddings: Sequence[int]
    """Elements after each parameter that belong to none; () for none."""


@dataclass(frozen=True)
class Shard:
    """One rank's optimizer states."""

    path: Path
    stage: int
    num_ranks: int | None
    flats: tuple[Flat, ...]
    groups: tuple[Mapping[str, Any], ...]
    scaler: Any
    addresses: Sequence[Any]
    """What DeepSpeed itself noted of where parameters lie; () where it did not."""

    @classmethod
    def read(cls, path: Path) -> Shard:
        """One file.

        Raises:
            CheckpointError: it cannot be read, or is of a layout that this does not know.
        """
        said = dict_of(dict_of(TorchFile(path).value, "", path).get("optimizer_state_dict"), "of states", path)
        if said.get("ds_zero_partition_groups"):
            raise CheckpointError(f"{path} is of a mixture of experts. Expected plain ZeRO.")
        stage = said.get("zero_stage", 1)
        sharded = "fp32_flat_groups" in said
        weights = said.get("fp32_flat_groups" if sharded else "single_partition_of_fp32_groups")
        base = said.get("optimizer_state_dict" if sharded else "base_optimizer_state")
        if not isinstance(weights, list) or base is None or type(stage) is not int:
            raise CheckpointError(
                f"{path} holds no fp32 groups of ZeRO: it has {', '.join(map(str, list(said)[:12]))}. Expected the "
                "file of an optimizer at stage 1, 2 or 3."
            )
        states, groups = _states(base, len(weights), said, path)
        paddings = said.get("param_alignment_paddings") or [()] * len(weights)
        counts = said.get("partition_count")
        counts = counts if isinstance(counts, list) else [counts]
        return cls(
            path=path,
            stage=stage,
            num_ranks=next((int(each) for each in counts if each is not None), None),
            flats=tuple(
                _flat(stored_of(each, path), state, group, padding, path)
                for each, (state, group), padding in zip(weights, states, paddings, strict=True)
            ),
            groups=groups,
            scaler=said.get("loss_scaler"),
            addresses=said.get("param_slice_mappings") or (),
        )


def _states(
    base: Any, num_flats: int, said: Mapping[str, Any], path: Path
) -> tuple[list[tuple[Mapping[str, Any], int]], tuple[Mapping[str, Any], ...]]:
    """Each flat tensor's state and group, and the groups' settings."""
    if isinstance(base, list):  # an elastic checkpoint: states alone
        step = {"step": said["base_optimizer_state_step"]} if "base_optimizer_state_step" in said else {}
        return [({**step, **state}, number) for number, state in enumerate(base)], ({},) * len(base)
    base = dict_of(base, "of optimizer states", path)
    groups = tuple(base["param_groups"])
    owners = {flat: number for number, group in enumerate(groups) for flat in group["params"]}
    found: list[tuple[Mapping[str, Any], int]] = []
    for flat in range(num_flats):
        group = owners.get(flat, flat)
        step = {"step": groups[group]["step"]} if group < len(groups) and "step" in groups[group] else {}
        found.append(({**step, **base["state"].get(flat, {})}, group))
    return found, groups


def _flat(weights: Stored, state: Mapping[str, Any], group: int, paddings: Sequence[int], path: Path) -> Flat:
    elementwise = {
        key: value
        for key, value in state.items()
        if isinstance(value, Stored) and key != "step" and len(value.shape) == 1 and value.numel >= weights.numel
    }
    others = {
        key: _number(value.tensor().clone() if isinstance(value, Stored) else value, key)
        for key, value in state.items()
        if key not in elementwise and value is not None
    }
    if not all(isinstance(value, (int, float, torch.Tensor)) for value in others.values()):
        raise CheckpointError(f"{path} holds a state that is neither a tensor nor a number: {sorted(others)}.")
    if not elementwise:
        others = {}  # a step count before the first step
    return Flat(weights, elementwise, others, group, paddings)


def _number(value: Any, key: str) -> Any:
    """Step counts as torch's optimizers keep them."""
    return torch.tensor(float(value)) if key == "step" and not isinstance(value, torch.Tensor) else value


# --- stages 0 to 2 ----------------------------------------------------------------------------------------------------


def _add_flat(draft: Draft, states: ModelStates, shards: Sequence[Shard]) -> None:
    """Whole groups end to end, cut into ranks' parts."""
    groups = states.groups if shards else ()
    config = states.values.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    # Where parameters are dealt in turns, DeepSpeed notes where they would lie if they were not.
    noted = () if isinstance(zero, dict) and zero.get("round_robin_gradients") else shards
    if shards and any(len(shard.flats) != len(groups) for shard in shards):
        raise CheckpointError(
            f"{states.path} names {len(groups)} groups of parameters, and {shards[0].path.name} holds others."
        )
    for number, shapes in enumerate(groups):
        flats = [shard.flats[number] for shard in shards]
        for name, (offset, shape) in _offsets(shapes, flats[0].paddings).items():
            pieces = list(_cut(offset, torch.Size(shape).numel(), flats))
            _compare_addresses(name, number, pieces, noted)
            compute = states.module[name].dtype if name in states.module else flats[0].weights.dtype
            draft.add_parameter(name, shape, pieces, compute, flats[0].group, flats[0].others)
    for name, stored in states.module.items():
        if name not in states.buffers and name not in states.ties and name not in draft.parameters:
            whole = Piece(0, 0, stored.numel, stored, 0, {})
            # Without optimizer states nobody knows what was frozen.
            draft.add_parameter(name, stored.shape, [whole], stored.dtype, None if shards else 0, {})


def _offsets(shapes: Shapes, paddings: Sequence[int]) -> dict[str, tuple[int, tuple[int, ...]]]:
    found, at = {}, 0
    for name, shape, padding in zip(shapes, shapes.values(), paddings or [0] * len(shapes), strict=True):
        found[name] = (at, shape)
        at += torch.Size(shape).numel() + padding
    return found


def _cut(offset: int, numel: int, flats: Sequence[Flat]) -> Iterator[Piece]:
    """The ranks' parts of the elements from ``offset`` on."""
    begin_of_rank = 0
    for rank, flat in enumerate(flats):
        begin = max(offset, begin_of_rank)
        end = min(offset + numel, begin_of_rank + flat.weights.numel)
        if begin < end:
            yield Piece(rank, begin - offset, end - offset, flat.weights, begin - begin_of_rank, flat.states)
        begin_of_rank += flat.weights.numel


def _compare_addresses(name: str, group: int, pieces: Sequence[Piece], shards: Sequence[Shard]) -> None:
    """Where DeepSpeed has noted where a parameter lies, this must be what was found."""
    found = {piece.file: (piece.at, piece.end - piece.begin) for piece in pieces}
    for rank, shard in enumerate(shards):
        if group >= len(shard.addresses):
            continue
        address = shard.addresses[group].get(name)
        noted = (address.attributes["start"], address.attributes["numel"]) if isinstance(address, Record) else None
        if noted is not None and noted[1] and noted != found.get(rank):
            raise CheckpointError(
                f"{shard.path} keeps {name!r} at {noted}, and by the order of parameters it lies at {found.get(rank)}: "
                "a layout that this does not know."
            )


# --- stage 3 ----------------------------------------------------------------------------------------------------------


def _add_sharded(draft: Draft, models: Sequence[ModelStates], shards: Sequence[Shard]) -> None:
    """Each parameter cut into equal parts, and these laid end to end."""
    states = models[0]
    world = len(shards)
    if any(len(shard.flats) != len(states.groups) for shard in shards):
        raise CheckpointError(
            f"{states.path} names {len(states.groups)} groups of parameters, and {shards[0].path.name} holds others."
        )
    for number, shapes in enumerate(states.groups):
        flats = [shard.flats[number] for shard in shards]
        at = 0
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            part = -(-numel // world)
            pieces = [
                Piece(rank, begin, end, flat.weights, at, flat.states)
                for rank, flat in enumerate(flats)
                for begin, end in [(min(rank * part, numel), min((rank + 1) * part, numel))]
            ]
            compute = states.module[name].dtype if name in states.module else flats[0].weights.dtype
            draft.add_parameter(name, shape, pieces, compute, flats[0].group, flats[0].others)
            at += part
        if any(flat.weights.numel != at for flat in flats):
            raise CheckpointError(
                f"{shards[0].path} holds {flats[0].weights.numel} elements of group {number}, expected {at} for one of "
                f"{world} parts: parameters were sharded over fewer ranks (MiCS), which this does not know."
            )
    for name, shape in states.frozen.items():
        numel = torch.Size(shape).numel()
        part = -(-numel // world)
        fragments = [each.fragments[name] for each in models]
        pieces = [
            Piece(rank, min(rank * part, numel), min((rank + 1) * part, numel), fragment, 0, {})
            for rank, fragment in enumerate(fragments)
        ]
        draft.add_parameter(name, shape, pieces, fragments[0].dtype, None, {})
