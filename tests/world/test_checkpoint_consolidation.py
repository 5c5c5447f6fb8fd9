"""Whole weights of a checkpoint, with and without shardwise: the numbers of the engine, whatever file they go to."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardwise.errors import CheckpointError
from shardwise.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from tests.checkpoints import Whole, begin, build_forgetful, train_steps
from tests.world.engine_runs import config_of
from tests.worlds import WorldPool

STEPS = 3


def write(directory: str, stage: int) -> Whole:
    """Train and save; the engine's own whole weights, in bf16."""
    with begin(config_of(stage, bf16={"enabled": True})) as engine:
        train_steps(engine, 0, STEPS)
        engine.save_checkpoint(directory)
        return engine.state_dict()


@pytest.fixture(scope="module", params=[(2, 3), (3, 2), (1, 0)], ids=lambda p: f"world{p[0]}-stage{p[1]}")
def checkpoint(
    request: pytest.FixtureRequest, worlds: WorldPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Whole, int, int]:
    world, stage = request.param
    directory = tmp_path_factory.mktemp("consolidation")
    weights = worlds[world].run(write, str(directory), stage)[0]
    return directory, weights, world, stage


def assert_is(found: Whole, wanted: Whole) -> None:
    """In bf16, which the engine computes in, the fp32 masters are the engine's weights."""
    assert list(found) == list(wanted) or sorted(found) == sorted(wanted)
    for name, value in found.items():
        if value.is_floating_point():
            assert value.dtype == torch.float32, name
        assert torch.equal(value.to(wanted[name].dtype), wanted[name]), name


def run_script(directory: Path, *arguments: str, python: tuple[str, ...] = ("-S",)) -> str:
    """As the manual says: from inside the directory, without anything but torch and safetensors to import."""
    site = str(Path(torch.__file__).parents[1])
    code = f"import sys, runpy; sys.path.append({site!r}); sys.modules['shardwise'] = None; sys.argv = {['zero_to_fp32.py', *arguments]!r}; runpy.run_path('zero_to_fp32.py', run_name='__main__')"  # noqa: E501
    done = subprocess.run([sys.executable, *python, "-c", code], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_in_the_directory(checkpoint: tuple[Path, Whole, int, int], tmp_path: Path) -> None:
    directory, weights, world, stage = checkpoint
    elsewhere = tmp_path / "moved"
    shutil.copytree(directory, elsewhere)
    said = run_script(elsewhere, ".", "pytorch_model.bin").splitlines()
    total = sum(p.numel() for p in build_forgetful().parameters())
    assert said == [
        f"Processing zero checkpoint at global_step{STEPS}",
        f"Detected checkpoint of type zero stage {stage}, world_size: {world}",
        f"Saving fp32 state dict to pytorch_model.bin (total_numel={total})",
    ]
    found = torch.load(elsewhere / "pytorch_model.bin", weights_only=True)
    assert_is(found, weights)
    assert found["left.weight"].data_ptr() == found["right.weight"].data_ptr(), "the tie was cut"
    build_forgetful().load_state_dict(found)
    assert (elsewhere / "zero_to_fp32.py").stat().st_mode & 0o100, "not executable"


def test_a_directory_gets_shards_with_an_index(checkpoint: tuple[Path, Whole, int, int], tmp_path: Path) -> None:
    directory, weights, _, _ = checkpoint
    run_script(directory, ".", str(tmp_path / "torch"), "--max_shard_size", "10KB")
    convert_zero_checkpoint_to_fp32_state_dict(directory, tmp_path / "safe", "10KB", safe_serialization=True)
    for folder, index_name, suffix in [
        ("torch", "pytorch_model.bin.index.json", ".bin"), ("safe", "model.safetensors.index.json", ".safetensors"),
    ]:  # fmt: skip
        index = json.loads((tmp_path / folder / index_name).read_text())
        files = sorted(path.name for path in (tmp_path / folder).glob(f"*{suffix}"))
        assert len(files) > 2
        assert sorted(set(index["weight_map"].values())) == files
        found: dict[str, Any] = {}
        for file in files:
            path = tmp_path / folder / file
            part = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
            assert all(index["weight_map"][name] == file for name in part)
            found |= part
        assert index["metadata"]["total_size"] == sum(t.nbytes for n, t in found.items() if n != "right.weight")
        if suffix == ".safetensors":  # keeps one name of a tie, as safetensors itself does
            found["right.weight"] = found["left.weight"]
        assert_is(found, weights)


def test_one_file_of_safetensors_in_another_dtype(checkpoint: tuple[Path, Whole, int, int], tmp_path: Path) -> None:
    from safetensors.torch import load_model

    directory, weights, _, _ = checkpoint
    convert_zero_checkpoint_to_fp32_state_dict(directory, tmp_path / "x.safetensors", dtype="bf16")
    found = load_file(tmp_path / "x.safetensors")
    for name, value in found.items():
        assert torch.equal(value, weights[name]), name
    model = build_forgetful().bfloat16()
    load_model(model, str(tmp_path / "x.safetensors"))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_functions_of_utils(checkpoint: tuple[Path, Whole, int, int], capsys: pytest.CaptureFixture[str]) -> None:
    directory, weights, _, _ = checkpoint
    assert_is(get_fp32_state_dict_from_zero_checkpoint(str(directory)), weights)
    lazy = get_fp32_state_dict_from_zero_checkpoint(directory, f"global_step{STEPS}", lazy_mode=True)
    assert_is({name: value.contiguous() for name, value in lazy.items()}, weights)
    trained = get_fp32_state_dict_from_zero_checkpoint(directory, exclude_frozen_parameters=True)
    assert set(weights) - set(trained) == {"frozen.weight", "frozen.bias"}
    model: Any = build_forgetful().bfloat16()
    assert load_state_dict_from_zero_checkpoint(model, directory) is model
    assert_is(model.state_dict(), weights)
    assert model.left.weight is model.right.weight
    assert not model.frozen.weight.requires_grad and model.head.weight.requires_grad
    assert capsys.readouterr().out == ""


def test_mistakes_are_told(checkpoint: tuple[Path, Whole, int, int], tmp_path: Path) -> None:
    directory, *_ = checkpoint
    with pytest.raises(CheckpointError, match="latest"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(directory, "global_step99")
    with pytest.raises(CheckpointError, match="'5 parsecs'"):
        convert_zero_checkpoint_to_fp32_state_dict(directory, tmp_path / "out", "5 parsecs")
    with pytest.raises(CheckpointError, match="fp8"):
        convert_zero_checkpoint_to_fp32_state_dict(directory, tmp_path / "out", dtype="fp8")
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    file = next((broken / f"global_step{STEPS}").glob("rank_00000*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_00000.*damaged"):
        get_fp32_state_dict_from_zero_checkpoint(broken)
    assert list(tmp_path.glob("out*")) == []
