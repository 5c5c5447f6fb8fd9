"""Keys without effect are named once, by rank 0, however many ranks read the configuration."""

from __future__ import annotations

import logging

from tests.references import MLP
from tests.world.engine_runs import config_of, open_engine
from tests.worlds import World


def warnings_of_initialize() -> list[str]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("shardwise")
    package.addHandler(handler)
    try:
        model = MLP.model()
        with open_engine(model, MLP.optimizer(model), config_of(1, graph_harvesting=True)):
            pass
    finally:
        package.removeHandler(handler)
    return lines


def test_rank_0_names_them_once(world2: World) -> None:
    (line,), others = world2.run(warnings_of_initialize)
    assert "graph_harvesting: no CUDA graphs are captured" in line
    assert others == []
