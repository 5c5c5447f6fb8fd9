"""The numbers that scripts ask the engine for: batch sizes, steps, rates."""

from __future__ import annotations

import pytest

from tests import models
from tests.references import MLP
from tests.world.engine_runs import STAGES, config_of, open_engine, rank
from tests.worlds import World


def counts(stage: int) -> dict[str, object]:
    model = MLP.model()
    with open_engine(model, MLP.optimizer(model), config_of(stage, accumulation=2)) as engine:
        steps = []
        for index in range(5):
            engine.backward(MLP.loss(engine, MLP.batch(index, rank())))
            engine.step()
            steps.append((engine.micro_steps, engine.global_steps, engine.skipped_steps))
        return {
            "accumulation": engine.gradient_accumulation_steps(),
            "micro batch": engine.train_micro_batch_size_per_gpu(),
            "batch": engine.train_batch_size(),
            "steps": steps,
            "rates": engine.get_lr(),
            "device": str(engine.device),
            "module": engine.module is model,
        }


@pytest.mark.parametrize("stage", STAGES)
def test_counts(world2: World, stage: int) -> None:
    wanted = {
        "accumulation": 2,
        "micro batch": models.MICRO_BATCH,
        "batch": models.MICRO_BATCH * 2 * 2,
        "steps": [(1, 0, 0), (2, 1, 0), (3, 1, 0), (4, 2, 0), (5, 2, 0)],
        "rates": [3e-3, 3e-3],
        "device": "cpu",
        "module": True,
    }
    assert world2.run(counts, stage) == [wanted, wanted]
