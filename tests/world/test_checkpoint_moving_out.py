"""Fear: what leaves for transformers or for torch.distributed.checkpoint has other bits, or cannot be read there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from shardwise.checkpoint.dcp import write_dcp
from shardwise.checkpoint.load import Checkpoint
from shardwise.checkpoint.model import slices_of
from shardwise.errors import CheckpointError, ConfigError
from tests import real_models
from tests.checkpoints import Whole, join, optimizer_parts
from tests.foreign import STEPS, build_odd, odd_adamw, odd_loss, unpack
from tests.front.command import shardwise_here as run
from tests.world.engine_runs import config_of, open_engine, rank
from tests.worlds import World

pytestmark = pytest.mark.world
NARROW = {"bf16": {"enabled": True}}
Parts = list[tuple[str, str, int, torch.Tensor]]


# --- torch.distributed.checkpoint -------------------------------------------------------------------------------------


def train_and_export(directory: str, stage: int, settings: dict[str, Any]) -> Parts:
    """Both ways out; this rank's part of what should be there."""
    model = build_odd()
    with open_engine(model, odd_adamw(model), config_of(stage, **settings)) as engine:
        for step in range(2):
            engine.backward(odd_loss(engine, step, rank()))
            engine.step()
        engine.export_dcp(f"{directory}/live")
        engine.save_checkpoint(f"{directory}/own")
        weights = [
            ("weight", part.name, part.within_parameter.begin, part.values.load().detach().float().clone())
            for unit in engine.trained().units
            for segment in unit.segments
            for part in slices_of(segment, segment.parameters.master_span)
        ]
        return [*weights, *optimizer_parts(engine)]


def plain_torch(directory: Path) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that never heard of us, as dcp.load fills them."""
    model = build_odd()
    optimizer = odd_adamw(model)
    weights, states = get_state_dict(model, optimizer)
    for value in weights.values():
        value.zero_()
    found = {"model": weights, "optim": states}
    dcp.load(found, checkpoint_id=str(directory), no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optim"])
    return model, optimizer


def assert_is(model: torch.nn.Module, optimizer: torch.optim.Optimizer, wanted: Whole, steps: int) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.reshape(-1), wanted[f"weight {name}"]), name
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            assert float(state["step"]) == steps
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state[kind].reshape(-1), wanted[f"{kind} {name}"]), name
                assert state[kind].abs().max() > 0


@pytest.mark.parametrize(("stage", "settings"), [(0, {}), (3, {}), (2, NARROW)])
def test_plain_torch_loads_weights_and_moments(
    world2: World, stage: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    wanted = join(world2.run(train_and_export, str(tmp_path), stage, settings))
    done = run("convert", "own", "offline", "--to", "dcp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == ".") == [], "the way out was left"
    for way in ("live", "offline"):
        model, optimizer = plain_torch(tmp_path / way)
        assert_is(model, optimizer, wanted, 2)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_from_deepspeed_to_plain_torch_at_once(tmp_path: Path) -> None:
    recording = unpack("z3-w2-fp32", tmp_path)
    with Checkpoint(recording.own_directory) as checkpoint:
        write_dcp(checkpoint, tmp_path / "dcp")
        with pytest.raises(CheckpointError, match="not empty"):
            write_dcp(checkpoint, tmp_path / "dcp")
    model, optimizer = plain_torch(tmp_path / "dcp")
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    wanted = {f"{kind} {name}": value.reshape(-1) for kind in kinds for name, value in recording.of(kind).items()}
    assert_is(model, optimizer, wanted, STEPS)


def test_no_tensor_waits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read when its turn comes, and let go before the next."""
    import weakref

    from shardwise.checkpoint.whole import Whole as Lazy

    alive: list[weakref.ref[torch.Tensor]] = []
    most = [0]
    read = Lazy.read

    def watched(self: Lazy) -> torch.Tensor:
        tensor = read(self)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(Lazy, "read", watched)
    with Checkpoint(unpack("z2-w2-fp32", tmp_path).own_directory) as checkpoint:
        write_dcp(checkpoint, tmp_path / "dcp")
    assert len(alive) > 20 and most[0] <= 2


# --- save_pretrained --------------------------------------------------------------------------------------------------


def export_model(directory: str, kind: str, stage: int, settings: dict[str, Any]) -> Whole:
    """Both ways out; the whole weights."""
    model = getattr(real_models, f"build_{kind}")()
    with open_engine(model, torch.optim.AdamW(model.parameters()), config_of(stage, **settings)) as engine:
        engine.export_pretrained(f"{directory}/live", max_shard_size="40KB")
        engine.save_checkpoint(f"{directory}/own")
        state: Whole = engine.gather_state_dict()
        return state


@pytest.mark.parametrize(("kind", "stage", "settings"), [
    ("gpt2", 3, NARROW), ("mixtral", 3, {}), ("t5", 2, NARROW), ("bert", 1, {}),
])  # fmt: skip
def test_from_pretrained_gives_the_same_weights(
    world2: World, kind: str, stage: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    wanted = world2.run(export_model, str(tmp_path), kind, stage, settings)[0]
    like = type(getattr(real_models, f"build_{kind}")())
    assert json.loads((tmp_path / "live" / "config.json").read_text())["architectures"] == [like.__name__]
    assert (tmp_path / "live" / "model.safetensors.index.json").exists()
    dtype = "bf16" if settings else "fp32"
    done = run("consolidate", "own", "offline", "--like", "live", "--dtype", dtype, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for way in ("live", "offline"):
        model = like.from_pretrained(tmp_path / way)
        found = model.state_dict()
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), f"{way}: {name}"
        assert model.can_generate() == (tmp_path / way / "generation_config.json").exists()
    if kind == "gpt2":
        assert model.lm_head.weight is model.transformer.wte.weight


def export_another(directory: str) -> str:
    model = torch.nn.Linear(3, 2)
    with open_engine(model, torch.optim.AdamW(model.parameters()), config_of(3)) as engine:
        with pytest.raises(ConfigError) as caught:
            engine.export_pretrained(directory)
        return str(caught.value)


def test_other_models_and_directories_are_refused(world2: World, tmp_path: Path) -> None:
    for said in world2.run(export_another, str(tmp_path / "out")):
        assert "Linear" in said and "write_weights" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "latest").write_text("absent")
    done = run("consolidate", ".", "out", "--like", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "config.json" in done.stderr and not (tmp_path / "out").exists()
