"""Weights come from files into models and engines: right names, right bits, and no byte that a rank will not hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import shardwise
from shardwise.checkpoint import weights_file
from shardwise.errors import CheckpointError, ConfigError, StateError
from tests import pieces as built
from tests.references import adamw_in_two_groups
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, world_size
from tests.worlds import World


class Model(nn.Module):
    """A tie, persistent buffers and one that is not, a weight that is laid out in another order, crumbs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = built.Rows()
        self.turned = nn.Parameter(torch.randn(211, 61).t())
        self.crumb = nn.Parameter(torch.randn(3))
        self.register_buffer("kept", torch.randn(57))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("made", torch.arange(5.0), persistent=False)

    def fill(self, module: nn.Module) -> None:
        assert module is self
        module.made = torch.arange(5.0)  # type: ignore[assignment]


def model_of(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model()


def build_3() -> nn.Module:
    return model_of(3)


def weights() -> dict[str, Tensor]:
    """What the files hold; the tied weight has one name there."""
    state = {name: value.detach().clone().contiguous() for name, value in model_of(1).state_dict().items()}
    del state["body.wte.weight"]
    return state


def write(directory: Path, how: str) -> Path:
    state = weights()
    if how == "bf16":
        state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    if how in ("file", "bf16"):
        save_file(state, directory / "model.safetensors", {"format": "pt"})
    elif how == "shards":
        names = sorted(state)
        files = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: state[name] for name in names if files[name] == file}, directory / file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    elif how == "bin":
        torch.save(state, directory / "pytorch_model.bin")
    else:
        torch.save(state, directory / "weights.pt", _use_new_zipfile_serialization=False)
        return directory / "weights.pt"
    return directory


HOWS = ("file", "bf16", "shards", "bin", "old bin")


def expected(dtype: torch.dtype | None = None, how: str = "file") -> dict[str, Tensor]:
    state = dict(model_of(1).state_dict())
    for name, value in state.items():
        if value.is_floating_point():
            value = value.bfloat16().float() if how == "bf16" else value
            state[name] = value.to(dtype) if dtype is not None and name != "kept" else value
    return state


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes that are read of safetensors files, but for headers."""
    read = [0]
    plain = weights_file.SafetensorsFile._read

    def counting(self: Any, descriptor: int, at: int, out: Tensor) -> None:
        read[0] += out.nbytes
        plain(self, descriptor, at, out)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(weights_file.SafetensorsFile, "_read", counting)
        yield read


def into_models(paths: dict[str, str]) -> None:
    for how, path in paths.items():
        for dtype in (None, torch.bfloat16):
            wanted = expected(dtype, how)
            with torch.device("meta"):
                on_meta = model_of(3)
            under_init: Any = built.in_pieces(build_3)
            for model in (on_meta, under_init, model_of(3)):
                keys = shardwise.load_pretrained(model, path, dtype=dtype, init_buffers=model.fill)
                assert keys == ([], [])
                assert model.body.head.weight is model.body.wte.weight
                assert torch.equal(model.made, torch.arange(5.0))
                built.assert_same_state(built.whole_state(model), wanted)
                if world_size() > 1 and model is not on_meta:
                    with open_engine(model, None, config_of(3)) as engine:
                        built.assert_same_state(engine.state_dict(), wanted)


@pytest.mark.parametrize("world", [1, 2, 3], indirect=True)
def test_every_kind_of_file_into_every_kind_of_model(world: World, tmp_path: Path) -> None:
    paths = {}
    for how in HOWS:
        (tmp_path / how).mkdir()
        paths[how] = str(write(tmp_path / how, how))
    world.run(into_models, paths)


def into_engines(path: str, narrow: bool) -> None:
    config = {"bf16": {"enabled": True}} if narrow else {}
    for stage in STAGES:
        model = model_of(3)
        with open_engine(model, adamw_in_two_groups(model), config_of(stage, **config)) as engine, counted_bytes() as n:
            shardwise.load_pretrained(engine, path)
            wanted = expected()
            for name, parameter in model.named_parameters():
                value = wanted[name] if parameter.requires_grad else wanted[name].to(parameter.dtype).float()
                assert torch.equal(shardwise.utils.safe_get_full_fp32_param(parameter), value), name
            got = engine.state_dict()
            for name, value in wanted.items():
                assert torch.equal(got[name], value.to(got[name].dtype)), (stage, name)
            total = sum(value.nbytes for value in weights().values())
            if stage == 3 and world_size() > 1:
                assert n[0] < 1.02 * total / world_size() + 1000, (n, total)


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_into_an_engine(world2: World, narrow: bool, tmp_path: Path) -> None:
    world2.run(into_engines, str(write(tmp_path, "file")), narrow)


def bytes_read(path: str) -> tuple[int, int]:
    with torch.device("meta"):
        model = model_of(3)
    model.turned = nn.Parameter(torch.empty(61, 211, device="meta"))
    with counted_bytes() as read:
        shardwise.load_pretrained(model, path, init_buffers=model.fill)
    whole = sum(v.nbytes for v in model.buffers()) + sum(p.nbytes for p in model.parameters() if p.nbytes < 4096)
    return read[0], whole


@pytest.mark.parametrize("how", ["file", "shards"])
def test_a_rank_reads_what_it_will_hold(world3: World, how: str, tmp_path: Path) -> None:
    total = sum(value.nbytes for value in weights().values())
    found = world3.run(bytes_read, str(write(tmp_path, how)))
    whole = found[0][1]
    assert sum(read for read, _ in found) <= total + 3 * whole
    assert max(read for read, _ in found) < (total - whole) / 3 * 1.02 + whole + 1000


def refused(directory: str) -> None:
    path = Path(directory)
    for model in (built.in_pieces(build_3), model_of(3)):
        before = built.whole_state(model)
        with pytest.raises(CheckpointError, match=r"missing: 'body.head.weight'|missing: 'body.wte.weight'") as caught:
            shardwise.load_pretrained(model, path / "wrong")
        assert "unexpected: 'other'" in str(caught.value)
        assert "'turned' has shape (61, 3), expected (61, 211)" in str(caught.value)
        for bad, words in {
            "nothing": "does not exist",
            "empty": "there are no weights",
            "short": "no whole safetensors file",
            "header": "its header",
            "outside": "names the file '../model.safetensors'",
            "pickle": "cannot be read as weights",
        }.items():
            with pytest.raises(CheckpointError, match=words):
                shardwise.load_pretrained(model, path / bad)
        built.assert_same_state(built.whole_state(model), before)
        keys = shardwise.load_pretrained(model, path / "part", strict=False)
        assert "crumb" in keys.missing_keys and keys.unexpected_keys == ["other"]
        after = built.whole_state(model)
        assert torch.equal(after["kept"], torch.ones(57)) and torch.equal(after["crumb"], before["crumb"])
    with pytest.raises(CheckpointError, match=r"only on rank 1|there are no weights"):
        shardwise.load_pretrained(model, path / ("good" if rank() == 0 else "empty"))
    with torch.device("meta"):
        on_meta = model_of(3)
    with pytest.raises(CheckpointError, match="on the meta device"):
        shardwise.load_pretrained(on_meta, path / "part", strict=False, init_buffers=on_meta.fill)
    with pytest.raises(ConfigError, match=r"Model.made' are on the meta device.*init_buffers"):
        shardwise.load_pretrained(on_meta, path / "good")
    with pytest.raises(StateError, match=r"inside zero\.Init"), shardwise.zero.Init():
        shardwise.load_pretrained(model, path / "good")


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/this-must-not-be-made",)


def test_what_does_not_fit_is_refused_on_every_rank(world2: World, tmp_path: Path) -> None:
    for name in ("wrong", "empty", "short", "header", "outside", "pickle", "part", "good"):
        (tmp_path / name).mkdir()
    write(tmp_path / "good", "file")
    wrong = {**weights(), "other": torch.ones(3), "turned": torch.ones(61, 3)}
    del wrong["body.head.weight"]
    save_file(wrong, tmp_path / "wrong" / "model.safetensors")
    save_file({"kept": torch.ones(57), "other": torch.ones(3)}, tmp_path / "part" / "model.safetensors")
    whole = (tmp_path / "good" / "model.safetensors").read_bytes()
    (tmp_path / "short" / "model.safetensors").write_bytes(whole[:-40])
    (tmp_path / "header" / "model.safetensors").write_bytes(b"\xff" * 8 + whole[8:])
    (tmp_path / "outside" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    torch.save({"a": Payload()}, tmp_path / "pickle" / "pytorch_model.bin")
    world2.run(refused, str(tmp_path))
    assert not os.path.exists("/tmp/this-must-not-be-made")
