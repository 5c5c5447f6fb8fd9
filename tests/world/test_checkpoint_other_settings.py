"""What was saved under one setting comes back under every other: precision, what stays whole, whole matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import Whole, begin, differences, join, optimizer_parts, train_steps
from tests.models import build_mlp
from tests.optimizers import maker
from tests.world.engine_runs import config_of, open_engine
from tests.worlds import WorldPool

PRECISIONS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "fp32": ({}, torch.float32),
    "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16),
    "fp16": ({"fp16": {"enabled": True, "initial_scale_power": 9}}, torch.float16),
}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "persistent": {"stage3_param_persistence_threshold": 2000},
    "one bucket": {"reduce_bucket_size": 10**8, "sub_group_size": 1000},
}
"""Additions to zero_optimization, each of which reads what any other wrote: a way to offload is one more row."""
Parts = list[tuple[str, str, int, torch.Tensor]]


def write_all(directory: str, ways: dict[str, dict[str, Any]]) -> dict[str, tuple[Whole, Parts]]:
    """Train and save in each way; weights in the compute dtype, and this rank's part of the optimizer's state."""
    saved = {}
    for name, config in ways.items():
        with begin(config) as engine:
            train_steps(engine, 0, 3)
            engine.save_checkpoint(f"{directory}/{name}")
            saved[name] = engine.state_dict(), optimizer_parts(engine)
    return saved


def read_all(directory: str, names: list[str], config: dict[str, Any]) -> list[tuple[Whole, Parts]]:
    found = []
    with begin(config) as engine:
        for name in names:
            engine.load_checkpoint(f"{directory}/{name}")
            found.append((engine.state_dict(), optimizer_parts(engine)))
    return found


def test_every_precision_reads_every_other(worlds: WorldPool, tmp_path: Path) -> None:
    ways = {name: config_of(3, **settings) for name, (settings, _) in PRECISIONS.items()}
    written = worlds[2].run(write_all, str(tmp_path), ways)
    for size, stage in ((3, 1), (1, 0), (2, 3)):
        for settings, dtype in PRECISIONS.values():
            found = worlds[size].run(read_all, str(tmp_path), list(ways), config_of(stage, **settings))
            for number, name in enumerate(ways):
                # Masters are fp32 in every precision, so only what they are rounded to differs.
                moments = join([of_rank[name][1] for of_rank in written])
                assert not differences(join([of_rank[number][1] for of_rank in found]), moments), name
                if PRECISIONS[name][1] in (dtype, torch.float32):
                    weights = {key: v.to(dtype) if v.is_floating_point() else v
                               for key, v in written[0][name][0].items() if "running" not in key}  # fmt: skip
                    read = {key: v for key, v in found[0][number][0].items() if "running" not in key}
                    assert not differences(read, weights), f"{name} read as {dtype}"


def test_every_row_reads_every_other(worlds: WorldPool, tmp_path: Path) -> None:
    ways = {name: config_of(3, zero=zero) for name, zero in ROWS.items()}
    written = worlds[3].run(write_all, str(tmp_path), ways)
    for size in (2, 3):
        for zero in ROWS.values():
            found = worlds[size].run(read_all, str(tmp_path), list(ways), config_of(3, zero=zero))
            for number, name in enumerate(ways):
                assert not differences(found[0][number][0], written[0][name][0]), name
                moments = join([of_rank[name][1] for of_rank in written])
                assert not differences(join([of_rank[number][1] for of_rank in found]), moments), name


def whole_matrices(directory: str, name: str, stage: int, writes: bool) -> Parts:
    model = build_mlp()
    with open_engine(model, maker(name, lr=1e-2)(model), config_of(stage)) as engine:
        if writes:
            train_steps(engine, 0, 3)
            engine.save_checkpoint(directory)
        else:
            engine.load_checkpoint(directory)
        return [part for part in optimizer_parts(engine) if "step" not in part[0]]


@pytest.mark.parametrize("name", ["Lamb", "Adafactor"])
def test_whole_matrices_at_each_stage_that_has_them(worlds: WorldPool, name: str, tmp_path: Path) -> None:
    for writer in (0, 1, 2):
        wanted = join(worlds[2].run(whole_matrices, f"{tmp_path}/{writer}", name, writer, True))
        assert wanted
        for size, reader in ((1, 2), (3, 1), (2, 0)):
            found = join(worlds[size].run(whole_matrices, f"{tmp_path}/{writer}", name, reader, False))
            assert not differences(found, wanted), f"stage {writer} to {reader}"
