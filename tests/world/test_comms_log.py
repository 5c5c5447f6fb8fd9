"""The log of collectives counts what travelled, changes no bit, and does not exist unless it is asked for."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch

from shardwise.comm.base import CollectiveId
from shardwise.comm.logged import CommsLogSettings, Logged
from shardwise.errors import StateError
from tests.references import MLP, assert_same
from tests.world.engine_runs import STAGES, config_of, open_engine, rank, run_steps, train_with_engine, world_size
from tests.world.test_communicators import connect
from tests.worlds import World

ON = {"comms_logger": {"enabled": True}}


def counts_of_a_run(config: dict[str, Any]) -> list[tuple[str, str, str | None, int, int]]:
    model = MLP.model()
    with open_engine(model, MLP.optimizer(model), config) as engine:
        run_steps(MLP, engine)
        summary = engine.comms_summary()
        assert all(t.waited_seconds > 0 for t in summary.totals)
        received = dict(summary.received_bytes)
        for operation, key in (("all_gather", "all-gather"), ("reduce_scatter", "reduce-scatter")):
            messages = sum(t.total_bytes for t in summary.totals if t.operation == operation)
            # A rank receives its share of each gathered buffer but its own, and as much for each reduced one.
            assert received.get(key, 0) == messages * (world_size() - 1) // world_size()
        return [(t.axis, t.operation, t.unit, t.message_bytes, t.count) for t in summary.totals]


@pytest.mark.parametrize("transport", ["shared_memory", "process_group"])
@pytest.mark.parametrize("stage", STAGES)
def test_messages_add_up_to_what_was_received(world2: World, stage: int, transport: str) -> None:
    first, second = world2.run(counts_of_a_run, config_of(stage, shardwise={"transport": transport}, **ON))
    assert first == second
    reductions = [row for row in first if row[1] == "reduce_scatter"]
    assert sum(count for *_, count in reductions) % MLP.steps == 0
    assert {axis for axis, *_ in first} == {"dp_shard"}


def test_units_are_told_apart_where_it_is_asked_for(world2: World) -> None:
    config = config_of(
        2, comms_logger={"enabled": True, "debug": True, "prof_all": False, "prof_ops": ["reduce_scatter"]}
    )
    (rows, _) = world2.run(counts_of_a_run_by_name, config)
    assert {operation for operation, *_ in rows} == {"reduce_scatter"}
    assert len({unit for _, unit, _ in rows}) == len(rows) > 1
    assert all(count == MLP.steps for *_, count in rows)


def counts_of_a_run_by_name(config: dict[str, Any]) -> list[tuple[str, str | None, int]]:
    model = MLP.model()
    with open_engine(model, MLP.optimizer(model), config) as engine:
        run_steps(MLP, engine)
        return [(t.operation, t.unit, t.count) for t in engine.comms_summary().totals]


def same_bits_with_the_log(stage: int, others: dict[str, Any]) -> None:
    plain = train_with_engine(MLP, config_of(stage, **others))
    assert_same(train_with_engine(MLP, config_of(stage, **others, **ON)), plain, "logged against not logged")


@pytest.mark.parametrize("others", [{}, {"prescale_gradients": True}], ids=["mean", "prescaled"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_log_changes_no_bit(world2: World, stage: int, others: dict[str, Any]) -> None:
    world2.run(same_bits_with_the_log, stage, others)


def like_its_transport_and_waited_twice() -> list[int]:
    with connect("messages") as inner:
        comm = Logged(inner, "dp_shard", CommsLogSettings())
        for fact in ("rank", "size", "device", "overlaps", "one_sided_gathers", "forgets", "factor_after_sum"):
            assert getattr(comm, fact) == getattr(inner, fact), fact
        shard = comm.allocate(3, torch.float32)
        comm.publish()
        pending = comm.all_gather(CollectiveId("all-gather", "u", 0), torch.empty(3 * comm.size), shard)
        pending.wait()
        before = comm.summary()
        pending.wait()
        assert comm.summary() == before
        comm.exchange(CollectiveId("end", "", 0), b"ab")
        return [t.count for t in comm.summary().totals]


def test_the_transport_is_the_same_to_others_and_a_second_wait_is_free(world2: World) -> None:
    assert world2.run(like_its_transport_and_waited_twice) == [[1, 1], [1, 1]]


def lines_of_a_run(config: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("shardwise")
    level, handlers = package.level, list(package.handlers)
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        model = MLP.model()
        with open_engine(model, MLP.optimizer(model), config) as engine:
            engine.backward(MLP.loss(engine, MLP.batch(0, rank())))
            engine.step()
    finally:
        package.setLevel(level)
        package.handlers[:] = handlers
    return lines


def test_rank_0_logs_the_summary_at_the_end(world2: World) -> None:
    first, second = world2.run(lines_of_a_run, config_of(3, **ON))
    (text,) = first
    assert text.startswith("collectives of rank 0:\n") and "all_gather" in text and "reduce_scatter" in text
    assert second == []


def test_each_collective_is_a_line_where_it_is_asked_for(world2: World) -> None:
    first, second = world2.run(lines_of_a_run, config_of(3, comms_logger={"enabled": True, "verbose": True}))
    assert sum(line.startswith("reduce_scatter over dp_shard: reduce-scatter of unit") for line in first) > 1
    assert second == []


def summary_of_a_plain_engine() -> str:
    model = MLP.model()
    with open_engine(model, MLP.optimizer(model), config_of(2)) as engine:
        assert not isinstance(engine._comm, Logged)
        with pytest.raises(StateError, match=r"comms_logger.enabled"):
            engine.comms_summary()
    return type(engine).__name__


def test_without_the_key_nothing_is_logged(world2: World) -> None:
    assert world2.run(summary_of_a_plain_engine) == ["Engine", "Engine"]


@pytest.mark.parametrize(("ops", "named"), [([], "nothing"), (["all_to_all", "exchange"], "all_to_all")], ids=str)
def test_names_of_no_collective_are_told_to_the_user(world2: World, ops: list[str], named: str) -> None:
    block = {"enabled": True, "prof_all": False, "prof_ops": ops}
    first, second = world2.run(lines_of_a_run, config_of(2, comms_logger=block))
    assert first[0].startswith(f"comms_logger.prof_ops names {named}: no collective is called so.")
    assert second == []


def table_of_two_hops() -> str:
    zero = {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    model = MLP.model()
    with open_engine(
        model, MLP.optimizer(model), config_of(3, zero=zero, shardwise={"simulated_nodes": 2}, **ON)
    ) as engine:
        run_steps(MLP, engine)
        return str(engine.comms_summary())


def test_the_table_says_where_bytes_came_from_and_as_what(world4: World) -> None:
    for table in world4.run(table_of_two_hops):
        for wire in (r"all-gather +int8", r"reduce-scatter +int4"):
            for near in ("same node", "other nodes"):
                assert re.search(rf"^dp_shard +{wire} +{near} +[0-9,]+ B$", table, re.MULTILINE), table
