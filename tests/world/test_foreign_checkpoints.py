"""Fear: what DeepSpeed has saved comes into our engine with other bits, or in another place, or not with everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.checkpoint.convert import convert_checkpoint, find_source
from shardwise.checkpoint.model import slices_of
from shardwise.checkpoint.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from shardwise.errors import CheckpointError
from tests.accelerators import accelerator_of
from tests.checkpoints import Whole, differences, join, optimizer_parts
from tests.foreign import (
    LEARNING_RATE,
    MICRO_BATCH,
    STEPS,
    Recording,
    build_odd,
    odd_adamw,
    odd_buffers,
    odd_groups,
    odd_loss,
    recorded_names,
    unpack,
)
from tests.grids import grid
from tests.world.engine_runs import STAGES, open_engine, rank, world_size
from tests.worlds import World, WorldPool

pytestmark = pytest.mark.world
WORLDS = (1, 2, 3)
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 4e-3, "warmup_num_steps": 10, "warmup_type": "linear"}}


def config_of(stage: int, **more: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": MICRO_BATCH, "zero_optimization": {"stage": stage}, "scheduler": WARMUP,
            **more}  # fmt: skip


def precision_of(name: str) -> dict[str, Any]:
    """What the recording was computed in."""
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
    return {"fp16": fp16} if "fp16" in name else {"bf16": {"enabled": True}} if "bf16" in name else {}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recording]:
    folder = tmp_path_factory.mktemp("recordings")
    return {name: unpack(name, folder) for name in recorded_names()}


def masters(engine: Any) -> list[tuple[str, str, int, torch.Tensor]]:
    """This rank's part of the weights, as the optimizer steps them."""
    return [
        ("weight", part.name, part.within_parameter.begin, part.values.load().detach().clone())
        for unit in engine.trained().units
        for segment in unit.segments
        for part in slices_of(segment, segment.parameters.master_span)
    ]


def empty_engine(stage: int, more: dict[str, Any]) -> Any:
    """Whose weights are all zero."""
    model = build_odd()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    return open_engine(model, odd_adamw(model), config_of(stage, **more))


def load_all(directories: dict[str, str], stage: int) -> dict[str, dict[str, Any]]:
    """What this rank holds after each load. Neighbours differ, so that nothing of one passes for the next one's."""
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        with empty_engine(stage, precision_of(precision)) as engine:
            for name, directory in directories.items():
                if precision_of(name) == precision_of(precision):
                    found[name] = load_one(engine, directory)
    return found


def load_one(engine: Any, directory: str) -> dict[str, Any]:
    """Everything that should have come along."""
    path, client_state = engine.load_checkpoint(directory)
    groups = engine.trained().optimizer.param_groups
    return {
        "path": path,
        "client_state": client_state,
        "parts": [*masters(engine), *optimizer_parts(engine)],
        "state_dict": engine.state_dict(),
        "facts": {
            "scale": engine.loss_scale,
            "lr": [float(lr) for lr in engine.get_lr()],
            "global_steps": engine.global_steps,
            "skipped_steps": engine.skipped_steps,
        },
        "counts": (engine.micro_steps, engine.lr_scheduler.last_batch_iteration),
        "settings": [(group["weight_decay"], group["betas"], group["eps"]) for group in groups],
    }


WORLDS_AND_STAGES = grid(WORLDS, STAGES, quick=[(1, 0), (2, 1), (2, 3), (3, 2), (3, 3)])


@pytest.mark.parametrize(("world", "stage"), WORLDS_AND_STAGES, indirect=["world"])
def test_everything_comes_along(world: World, stage: int, recordings: dict[str, Recording]) -> None:
    of_ranks = world.run(load_all, {name: str(each.directory) for name, each in recordings.items()}, stage)
    for name, recording in recordings.items():
        check_states([of_rank[name] for of_rank in of_ranks], recording, name)
        for of_rank in of_ranks:
            assert of_rank[name]["path"] == str(recording.own_directory)


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (3, 3)], indirect=["world"])
def test_what_was_converted_is_the_same(
    world: World, stage: int, recordings: dict[str, Recording], tmp_path: Path
) -> None:
    for name, recording in recordings.items():
        convert_checkpoint(find_source(recording.directory, None), tmp_path / name)
    of_ranks = world.run(load_all, {name: str(tmp_path / name) for name in recordings}, stage)
    for name, recording in recordings.items():
        check_states([of_rank[name] for of_rank in of_ranks], recording, name)
        weights = get_fp32_state_dict_from_zero_checkpoint(tmp_path / name)
        assert weights.keys() == of_ranks[0][name]["state_dict"].keys()
        for key, value in recording.of("weight").items():
            assert torch.equal(weights[key], value.float()), f"{name}: {key}"
        with pytest.raises(CheckpointError, match="already"):
            convert_checkpoint(recording.own_directory, tmp_path / name)


def check_states(of_ranks: list[dict[str, Any]], recording: Recording, name: str) -> None:
    wanted = {f"weight {key}": value.reshape(-1).float() for key, value in recording.of("weight").items()}
    for kind in ("exp_avg", "exp_avg_sq"):
        wanted |= {f"{kind} {key}": value.reshape(-1) for key, value in recording.of(kind).items()}
    steps = float(STEPS - recording.facts["skipped_steps"])
    wanted |= {f"step of all {key}": torch.tensor([steps]) for key in recording.of("exp_avg")}
    whole = join([of_rank["parts"] for of_rank in of_ranks])
    if "round-robin" in name:  # DeepSpeed has no word for its moments then; the next step shows that they are right
        whole = {key: value for key, value in whole.items() if key.startswith("weight")}
    assert not differences({key: value.float() for key, value in whole.items()}, wanted), name
    for of_rank in of_ranks:
        check_run(of_rank, recording, name)


def check_run(found: dict[str, Any], recording: Recording, name: str) -> None:
    mask = found["client_state"].pop("mask")
    assert torch.equal(mask, torch.arange(5))
    assert found["client_state"] == {"epoch": 7, "seen": [1, 2.5, "three"]}
    assert found["facts"] == recording.facts, name
    assert found["counts"] == (STEPS, STEPS - recording.facts["skipped_steps"] - 1)
    assert found["settings"] == [(0.1, (0.8, 0.95), 1e-8), (0.0, (0.9, 0.999), 1e-7)]
    state = found["state_dict"]
    assert torch.equal(state["right.weight"], state["left.weight"])
    for key, value in {**recording.of("weight"), **odd_buffers(0)}.items():
        if key != "seen":  # each rank's own
            assert torch.equal(state[key], value.to(state[key].dtype)), f"{name}: {key}"


def go_on(directory: str, stage: int, more: dict[str, Any]) -> Whole:
    """One more step from the checkpoint."""
    with empty_engine(stage, more) as engine:
        engine.load_checkpoint(directory)
        engine.backward(odd_loss(engine, STEPS, rank()))
        engine.step()
        assert engine.global_steps == STEPS + 1
        return engine.state_dict()


def reference_step(recording: Recording, world: int) -> Whole:
    """The same step by torch alone, in one process, from what DeepSpeed said that the state was."""
    model = build_odd()
    model.load_state_dict({**model.state_dict(), **recording.of("weight"), **odd_buffers(0),
                           "right.weight": recording.of("weight")["left.weight"]})  # fmt: skip
    optimizer = odd_adamw(model)
    for group, rate in zip(optimizer.param_groups, recording.facts["lr"], strict=True):
        group["lr"] = rate
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {"step": torch.tensor(float(STEPS)),
                                          "exp_avg": recording.of("exp_avg")[name].clone(),
                                          "exp_avg_sq": recording.of("exp_avg_sq")[name].clone()}  # fmt: skip
            parameter.grad = torch.zeros_like(parameter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_ranks = [torch.autograd.grad(odd_loss(model, STEPS, rank), trained) for rank in range(world)]
    for parameter, *gradients in zip(trained, *of_ranks, strict=True):
        for gradient in gradients:
            parameter.grad.add_(gradient)
        parameter.grad.mul_(1 / world)
    optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def goes_on(recordings: dict[str, Recording], stage: int) -> None:
    """Both in this process: how many threads there are says in which order torch adds."""
    for name, recording in recordings.items():
        wanted = reference_step(recording, world_size())
        found = go_on(str(recording.directory), stage, {})
        assert not [key for key in wanted if not torch.equal(found[key], wanted[key])], name


@pytest.mark.parametrize(("world", "stage"), WORLDS_AND_STAGES, indirect=["world"])
def test_training_goes_on(world: World, stage: int, recordings: dict[str, Recording]) -> None:
    names = ("z1-w2-fp32", "z3-w2-fp32", "universal-of-z3-w2-fp32")
    world.run(goes_on, {name: recordings[name] for name in names}, stage)


@pytest.mark.parametrize("name", ["z2-w2-fp32", "z2-w2-bf16", "z2-w2-fp16", "z2-w2-round-robin"])
def test_the_next_step_is_deepspeeds_but_for_rounding(
    worlds: WorldPool, name: str, recordings: dict[str, Recording]
) -> None:
    recording = recordings[name]
    (found, _) = worlds[2].run(go_on, str(recording.directory), 2, precision_of(name))
    moved = 0.0
    for key, value in recording.of("next/weight").items():
        before = recording.of("weight")[key].float()
        moved = max(moved, float((value.float() - before).abs().max()))
        torch.testing.assert_close(found[key].float(), value.float().to(found[key].dtype).float(), rtol=1e-2, atol=3e-5)
    assert moved > LEARNING_RATE / 10


def buffers_of(directory: str) -> torch.Tensor:
    """Of this rank."""
    with empty_engine(3, {}) as engine:
        engine.load_checkpoint(directory)
        seen: torch.Tensor = engine.state_dict()["seen"]
        return seen


def test_each_rank_gets_its_own_buffers_again(worlds: WorldPool, recordings: dict[str, Recording]) -> None:
    recording = recordings["z3-w2-fp32"]
    for size in (2, 3):
        found = worlds[size].run(buffers_of, str(recording.directory))
        for number, seen in enumerate(found):
            assert torch.equal(seen, odd_buffers(number if size == 2 else 0)["seen"])


def choose(directory: str) -> None:
    """What is not asked for stays as it was."""
    with empty_engine(2, {}) as engine:
        engine.load_checkpoint(directory, load_module_only=True)
        assert engine.global_steps == 0 and not optimizer_parts(engine)
        assert float(engine.state_dict()["gain"]) != 0
    with empty_engine(2, {}) as engine:
        engine.load_checkpoint(directory, load_optimizer_states=False, load_lr_scheduler_states=False)
        assert engine.global_steps == STEPS and engine.lr_scheduler.last_batch_iteration == -1
        assert not optimizer_parts(engine)
    model = build_odd()
    with open_engine(model, torch.optim.Adagrad(odd_groups(model)), config_of(2)) as engine:
        with pytest.raises(CheckpointError, match="load_optimizer_states"):
            engine.load_checkpoint(directory)
        engine.load_checkpoint(directory, load_optimizer_states=False)
    model = build_odd()
    with (
        open_engine(model, torch.optim.AdamW(model.parameters()), config_of(2)) as engine,
        pytest.raises(CheckpointError, match=r"2 group\(s\)"),
    ):
        engine.load_checkpoint(directory)


def test_choices_and_refusals(world2: World, recordings: dict[str, Recording]) -> None:
    world2.run(choose, str(recordings["z3-w2-fp32"].directory))


def by_the_accelerator(directory: str) -> None:
    config = {**config_of(3), "gradient_accumulation_steps": 1}
    with accelerator_of(config) as accelerator:
        model = build_odd()
        loader = torch.utils.data.DataLoader(torch.arange(20), batch_size=MICRO_BATCH)
        model, _, loader = accelerator.prepare(model, odd_adamw(model), loader)
        accelerator.load_state(directory)
        assert model.global_steps == STEPS
        assert optimizer_parts(model)
        model.save_checkpoint(f"{directory}/again")


def test_load_state_takes_it(world2: World, recordings: dict[str, Recording]) -> None:
    recording = recordings["z1-w1-fp32"]
    world2.run(by_the_accelerator, str(recording.directory))
    weights = get_fp32_state_dict_from_zero_checkpoint(recording.directory / "again")
    assert all(torch.equal(weights[key], value) for key, value in recording.of("weight").items())


def test_stage_0_gives_its_weights(worlds: WorldPool, tmp_path: Path) -> None:
    """Without optimizer files and parameters' shapes a directory is what stage 0 leaves."""
    recording = unpack("z1-w1-fp32", tmp_path)
    (path,) = recording.own_directory.glob("mp_rank_00_model_states.pt")
    values = torch.load(path, weights_only=True)
    torch.save({**values, "param_shapes": None, "shared_params": None}, path)
    for other in recording.own_directory.glob("*optim_states.pt"):
        other.unlink()
    worlds[1].run(load_weights_alone, str(recording.directory), recording.of("weight"))


def load_weights_alone(directory: str, wanted: Whole) -> None:
    with empty_engine(0, {}) as engine:
        with pytest.raises(CheckpointError, match="no optimizer"):
            engine.load_checkpoint(directory)
        engine.load_checkpoint(directory, load_optimizer_states=False)
        state = engine.state_dict()
        assert all(torch.equal(state[key], value) for key, value in wanted.items())
        assert engine.lr_scheduler.last_batch_iteration == STEPS - 1
