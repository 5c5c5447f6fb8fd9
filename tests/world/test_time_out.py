"""A rank whose data run out early does not hang the rest: the error names the collective, the unit and the rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

import shardwise
from shardwise.errors import StateError
from tests.grids import grid
from tests.references import MLP
from tests.world.engine_runs import config_of, open_engine, rank
from tests.worlds import World

TIMEOUT_SECONDS = 3.0
GIVEN_UP = "rank 0 has given up"
STEPS_OF_RANK = {0: 4, 1: 2}


def run_out_of_data(stage: int, stay: bool, transport: str) -> None:
    """Rank 1 has two batches, rank 0 four. `stay` keeps rank 1's engine open until rank 0 has given up."""
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    shardwise.init_distributed(timeout=timeout)
    store = dist.distributed_c10d._get_default_store()
    model = MLP.model()
    try:
        config = config_of(stage, shardwise={"transport": transport})
        with open_engine(model, MLP.optimizer(model), config, timeout=timeout) as engine:
            for step in range(STEPS_OF_RANK[rank()]):
                engine.backward(MLP.loss(engine, MLP.batch(step, rank())))
                engine.step()
            if stay and rank() == 1:
                store.wait([GIVEN_UP], timedelta(seconds=60))
    finally:
        if rank() == 0:
            store.set(GIVEN_UP, "")


STAYING, LEAVING = (3, True), (3, False)


@pytest.mark.parametrize(
    ("case", "transport"),
    grid(
        [(1, False), STAYING, LEAVING],
        ["process_group", "shared_memory"],
        quick=[(STAYING, "shared_memory"), (LEAVING, "process_group")],
    ),
)
def test_data_run_out_on_one_rank(own_world: Callable[..., World], case: tuple[int, bool], transport: str) -> None:
    world = own_world(2, process_group=False, grace_seconds=60.0)
    failures = world.run_expecting_errors(run_out_of_data, *case, transport)
    assert failures[1] is None, failures[1]
    assert failures[0] is not None, "rank 0 went on without the other"
    assert isinstance(failures[0].exception, StateError), failures[0].traceback
    told = failures[0].message
    assert "rank 1" in told, told
    assert "unit" in told, told
    assert any(operation in told for operation in ("gather", "reduce", "exchange", "schedule")), told
    assert len(told.splitlines()) <= 8, told
