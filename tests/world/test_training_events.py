"""The curves of a run: rank 0's losses as backward got them, rates and loss scale, over samples of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.references import MLP
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, world_size
from tests.worlds import World

STEPS, ACCUMULATION = 3, 2


def read(path: Path) -> list[tuple[int, float]]:
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    return [(int(samples), float(value)) for samples, value in rows]


def train(config: dict[str, Any], directory: Path, divide: bool) -> list[float]:
    """Train with a monitor; every rank writes to a place of its own, if it writes at all."""
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(directory), "job_name": f"rank{rank()}"}}
    losses: list[float] = []
    model = MLP.model()
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 10, "warmup_type": "linear"}}
    with open_engine(
        model, MLP.optimizer(model), {**config, **_same_on_all(monitor), "scheduler": scheduler}
    ) as engine:
        rates = []
        for index in range(STEPS * ACCUMULATION):
            loss = MLP.loss(engine, MLP.batch(index, rank()))
            losses.append(float(loss.detach()))
            if divide:
                engine.backward(loss)
            else:
                engine.backward(loss / ACCUMULATION, scale_wrt_gas=False)
            engine.step()
            rates.append(engine.get_lr()[0])
    if rank() == 0:
        batch = models.MICRO_BATCH * ACCUMULATION * world_size()
        samples = [batch * (step + 1) for step in range(STEPS)]
        means = [sum(losses[i : i + ACCUMULATION]) / ACCUMULATION for i in range(0, len(losses), ACCUMULATION)]
        found = read(directory / "rank0" / "Train_Samples_train_loss.csv")
        assert [at for at, _ in found] == samples
        assert [value for _, value in found] == pytest.approx(means, rel=1e-6)
        assert read(directory / "rank0" / "Train_Samples_lr.csv") == list(
            zip(samples, rates[ACCUMULATION - 1 :: ACCUMULATION], strict=True)
        )
        scale = directory / "rank0" / "Train_Samples_loss_scale.csv"
        if "fp16" in config:
            assert read(scale) == [(at, 8.0) for at in samples]
        else:
            assert not scale.exists()
    return losses


def _same_on_all(monitor: dict[str, Any]) -> dict[str, Any]:
    """Ranks must agree on their configuration, so all of them get rank 0's."""
    import torch.distributed as dist

    box = [monitor]
    dist.broadcast_object_list(box)
    return box[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("divide", [True, False], ids=["engine divides", "script divides"])
def test_rank_0_writes_the_curves_of_a_run(world2: World, tmp_path: Path, stage: int, divide: bool) -> None:
    world2.run(train, config_of(stage, accumulation=ACCUMULATION), tmp_path, divide)
    assert [path.name for path in tmp_path.iterdir()] == ["rank0"], "only rank 0 writes"


def test_fp16_writes_its_loss_scale(world2: World, tmp_path: Path) -> None:
    fp16 = {"enabled": True, "loss_scale": 8}
    world2.run(train, config_of(2, accumulation=ACCUMULATION, fp16=fp16), tmp_path, True)
