"""Every rank gets the batches that it would get from Accelerate: recorded by bench/record_batches.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.data_loader import prepare_data_loader
from tests.data_cases import CASES, Case, arguments, plain_loader

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures" / "batches.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_rank_gets_the_recorded_batches(case: Case) -> None:
    for rank, recorded in enumerate(RECORDED["shards"][case.name]):
        loader = prepare_data_loader(plain_loader(case), process_index=rank, **arguments(case))
        given = [[batch.tolist() for batch in loader] for _ in range(case.epochs)]
        assert given == recorded["given"]
        if recorded["len"] is not None:
            assert len(loader) == len(given[-1])
