"""MiCS: states sharded over groups of ranks and replicated over the groups; all replicas have the bits of one sum.

The sum is that of `references.ordered_mean` with a group size: inside each group first, then over the groups.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardwise
from shardwise.checkpoint.manifest import read_manifest
from shardwise.comm.traffic import Route
from shardwise.config.load import load_config
from shardwise.errors import CollectiveError, ConfigError
from shardwise.explain.states import states_per_rank
from shardwise.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
)
from shardwise.zero.sharding import StateBytes
from tests import models
from tests.checkpoints import Forgetful
from tests.references import GPT, MLP, WIDE, Recipe, Record, adamw_in_two_groups, assert_near, assert_same
from tests.world.engine_runs import (
    Config,
    config_of,
    open_engine,
    rank,
    reference_of,
    run_steps,
    train_with_engine,
    world_size,
)
from tests.world.test_recovery import MishapError, build_fragile
from tests.world.test_unused_parameters import Choice, parts_unused_on_some_ranks, with_choice
from tests.worlds import World

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 4}}
HIERARCHICAL = {"mics_hierarchical_params_gather": True}
SETTLED = {"accumulation": 2, "gradient_clipping": 0.5}


def mics(size: int, *, zero: Config | None = None, **others: Any) -> Config:
    return config_of(3, zero={"mics_shard_size": size, **(zero or {})}, **others)


def plain(**others: Any) -> Config:
    return config_of(3, shardwise={"transport": "process_group"}, **others)


def digest_of(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().float().clone().numpy().tobytes() for t in tensors)).hexdigest()


def assert_replicas_agree(engine: Any) -> None:
    """What rests of values and optimizer states is the same on all ranks with one place in their groups."""
    resting = [segment.parameters.resting.load() for segment in engine._segments]
    states = sorted(
        ((piece.name, piece.within_parameter.begin, key, rest.load())
         for piece in engine._step.states() for key, rest in piece.elementwise.items()),
        key=lambda state: state[:3],
    )  # fmt: skip
    mine = (engine._comm.rank, engine._scaler.scale, digest_of([*resting, *(state[3] for state in states)]))
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    assert len(set(found)) == engine._comm.size, found


# -- bits


def reference_in_groups(recipe: Recipe, size: int) -> Record:
    # A group of one shards nothing: its gradients rest whole and are reduced once a step.
    return reference_of(recipe, "once" if size == 1 else "every", None if size == world_size() else size)


def equals_reference_in_groups(recipe: Recipe, size: int, **others: Any) -> None:
    reference = reference_in_groups(recipe, size)
    record = train_with_engine(recipe, mics(size, accumulation=recipe.accumulation, **others))
    assert_same(record, reference, f"groups of {size} against one process")


def has_the_bits_of_its_order() -> None:
    """Every group size, wide and odd widths, ties, accumulation; and little is lost against the plain order."""
    sizes = [size for size in (1, 2, 4) if size <= world_size()]
    for size in sizes:
        for recipe in (dataclasses.replace(WIDE, steps=2), dataclasses.replace(GPT, steps=2, accumulation=3)):
            equals_reference_in_groups(recipe, size)
        record, whole = train_with_engine(MLP, mics(size)), train_with_engine(MLP, plain())
        assert_near(record, whole, f"groups of {size} against plain stage 3", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [2, 4], indirect=True)
def test_bits(world: World) -> None:
    world.run(has_the_bits_of_its_order)


def one_group_is_plain(**others: Any) -> None:
    recipe = dataclasses.replace(MLP, accumulation=2, clip=0.5)
    here = train_with_engine(recipe, mics(world_size(), **SETTLED, **others))
    there = train_with_engine(recipe, config_of(3, **SETTLED, **others))
    assert_same(here, there, "one group against plain stage 3")
    assert here.norms == there.norms


def other_settings_have_the_same_bits() -> None:
    """Buckets, divisions, checks, small units: none of them is seen in the sum; the backend's own order may be."""
    recipe = dataclasses.replace(MLP, steps=2, accumulation=2)
    for zero, others in (
        ({"reduce_bucket_size": 100, "allgather_bucket_size": 100, "overlap_comm": False}, {}),
        ({"stage3_param_persistence_threshold": 2000, "contiguous_gradients": False}, {}),
        ({"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 10**9}, {"comms_logger": {"enabled": True}}),
        ({}, {"shardwise": {"check_collectives": True}}),
        ({}, {"gradient_predivide_factor": 2.0}),
        ({}, {"prescale_gradients": True}),
    ):
        equals_reference_in_groups(recipe, 2, zero=zero, **others)
    reference = reference_in_groups(recipe, 2)
    for zero, own in (({}, {"reduction": "native"}), ({"reduce_scatter": False}, {})):
        record = train_with_engine(recipe, mics(2, zero=zero, accumulation=2, shardwise=own))
        assert_near(record, reference, "the backend's sums", rtol=1e-4, atol=1e-5)


def test_one_group_is_plain_stage_3(world2: World) -> None:
    for others in ({}, BF16, FP16):
        world2.run(one_group_is_plain, **others)


def test_other_settings(world4: World) -> None:
    world4.run(other_settings_have_the_same_bits)


# -- replicas agree


def replicas_agree(size: int, zero: Config, others: Config) -> None:
    """After every step, with clipping by the norm of one replica; near the plain run, which skips the same steps: in
    fp16 the second one, for the gradient of one rank."""
    recipe = dataclasses.replace(MLP, steps=3, accumulation=2, clip=0.5)
    record, skipped = Record(), []
    for config in (mics(size, zero=zero, **SETTLED, **others), plain(**SETTLED, **others)):
        model = recipe.model()
        with open_engine(model, recipe.optimizer(model), config) as engine:
            assert engine.train_batch_size() == models.MICRO_BATCH * 2 * world_size()
            before, record = record, Record()
            for step in range(recipe.steps):
                for index in recipe.micro_batches(step):
                    loss = recipe.loss(engine, recipe.batch(index, rank()))
                    record.add_losses((loss,))
                    overflows = "fp16" in others and step == 1 and rank() == world_size() - 1
                    engine.backward(loss * 1e30 if overflows else loss)
                    engine.step()
                assert_replicas_agree(engine)
                record.norms.append(engine.get_global_grad_norm())
            skipped.append(engine.skipped_steps)
            record.weights = engine.state_dict()
    assert skipped == [int("fp16" in others)] * 2
    norms, wanted = torch.tensor(before.norms), torch.tensor(record.norms)
    torch.testing.assert_close(norms, wanted, rtol=3e-2, atol=1e-4, equal_nan=True)
    assert (norms > 0).any()
    torch.testing.assert_close(
        torch.stack(before.losses).float(), torch.stack(record.losses).float(), rtol=3e-2, atol=3e-2
    )


@pytest.mark.parametrize("size", [1, 2])
def test_replicas_agree(world4: World, size: int) -> None:
    for others in ({}, BF16, FP16):
        world4.run(replicas_agree, size, HIERARCHICAL if size == 2 else {}, others)


def starts_as_rank_0() -> None:
    for size in (1, 2):
        torch.manual_seed(rank())
        model = models.Mlp()
        mine = [parameter.detach().clone() for parameter in model.parameters()]
        with open_engine(model, adamw_in_two_groups(model), mics(size)) as engine:
            state = engine.state_dict()
            found: list[Any] = [None] * world_size()
            dist.all_gather_object(found, (digest_of(mine), digest_of(list(state.values()))))
            assert {whole for _, whole in found} == {found[0][0]}
            assert len({own for own, _ in found}) == world_size()


def test_all_ranks_start_as_rank_0(world4: World) -> None:
    world4.run(starts_as_rank_0)


# -- gradients that are missing, kept, and no gradients at all


def used_in_one_replica(index: int, of_rank: int) -> Choice:
    return *models.vectors(index, of_rank), "xxx" if of_rank >= 2 else ("x..", "...")[index % 2]


def parts_are_stepped_on_all_replicas() -> None:
    for batch, size in ((used_in_one_replica, 2), (used_in_one_replica, 1), (parts_unused_on_some_ranks, 1)):
        recipe = Recipe(models.build_optional, batch, with_choice, adamw_in_two_groups, steps=2)
        equals_reference_in_groups(recipe, size)


def frozen_and_quiet_passes() -> None:
    frozen = dataclasses.replace(MLP, model=functools.partial(models.build_partly_frozen, ("blocks.1", "stem")))
    equals_reference_in_groups(frozen, 2)
    recipe = dataclasses.replace(MLP, accumulation=2)
    reference = reference_of(recipe, "once", 2)
    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), mics(2, accumulation=2)) as engine:
        record = Record()
        for step in range(recipe.steps):
            first, second = recipe.micro_batches(step)
            for index, context in ((first, engine.no_sync()), (second, engine.sync())):
                with context:
                    loss = recipe.loss(engine, recipe.batch(index, rank()))
                    record.add_losses((loss,))
                    engine.backward(loss)
                if index == first and step == 1:
                    whole = safe_get_full_grad(model.head.weight)
                    assert whole is not None
                    means: list[Any] = [None] * world_size()
                    dist.all_gather_object(means, digest_of([whole]))
                    assert len(set(means)) == 1
                engine.step()
        record.weights = engine.state_dict()
        with torch.no_grad():
            engine.eval()
            inputs = models.vectors(7, rank())[0]
            whole_model = recipe.model()
            whole_model.load_state_dict(record.weights)
            assert torch.equal(engine(inputs), whole_model(inputs))
    assert_same(record, reference, "passes under no_sync")


def recovers(fails_in: str) -> None:
    recipe = dataclasses.replace(MLP, model=build_fragile)
    reference = reference_of(recipe, "once", 2)
    model: Any = recipe.model()
    record = dataclasses.replace(reference, losses=[])
    with open_engine(model, recipe.optimizer(model), mics(2)) as engine:
        for step in range(recipe.steps):
            model.blocks[1].fails_in = fails_in
            with pytest.raises(MishapError):
                engine.backward(recipe.loss(engine, recipe.batch(999, rank())))
            model.blocks[1].fails_in = ""
            engine.zero_grad()
            loss = recipe.loss(engine, recipe.batch(step, rank()))
            record.losses.append(loss.detach().clone())
            engine.backward(loss)
            engine.step()
        record.weights = engine.state_dict()
    assert_same(record, reference, f"after a mishap in {fails_in}")


def test_missing_and_kept_gradients(world4: World) -> None:
    world4.run(parts_are_stepped_on_all_replicas)
    world4.run(frozen_and_quiet_passes)
    for fails_in in ("forward", "backward"):
        world4.run(recovers, fails_in)


def averages_loose_gradients() -> None:
    """An engine without optimizer in groups of one: parameters are whole, and their gradients are means."""
    model = MLP.model()
    with open_engine(model, None, mics(1, comms_logger={"enabled": True})) as engine:
        engine.backward(MLP.loss(engine, MLP.batch(0, rank())))
        found: list[Any] = [None] * world_size()
        dist.all_gather_object(found, digest_of([p.grad for p in model.parameters() if p.grad is not None]))
        assert len(set(found)) == 1


def test_without_an_optimizer(world2: World) -> None:
    world2.run(averages_loose_gradients)


# -- paths


def one_replica_apart(index: int, of_rank: int) -> Choice:
    return *models.vectors(index, of_rank), "a" if of_rank < 2 or index == 0 else "b"


def goes_apart(check: bool) -> None:
    recipe = Recipe(models.build_branches, one_replica_apart, with_choice, adamw_in_two_groups)
    train_with_engine(recipe, mics(2, shardwise={"check_collectives": check, "unit_classes": ["Block"]}))


@pytest.mark.parametrize("check", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_replica_on_another_path_is_an_error(world4: World, check: bool) -> None:
    failures = world4.run_expecting_errors(goes_apart, check)
    for failure in failures:
        assert failure is not None
        assert isinstance(failure.exception, CollectiveError), failure.traceback
    told = [failure.message for failure in failures if failure is not None]
    assert any("branch_" in text and "rank 0" in text and "rank 2" in text for text in told), told


# -- offload


def offloaded_agrees_with_device(size: int, path: str) -> None:
    recipe = dataclasses.replace(MLP, steps=2, accumulation=2, clip=0.5)
    for others in ({}, BF16):
        here = None
        for device in ("none", "cpu", "nvme"):
            place = {"device": device, "nvme_path": path}
            zero = {"offload_param": place, "offload_optimizer": place}
            model = recipe.model()
            with open_engine(model, recipe.optimizer(model), mics(size, zero=zero, **SETTLED, **others)) as engine:
                record = run_steps(recipe, engine)
                assert_replicas_agree(engine)
            here = here or record
            if size > 1:
                assert_same(record, here, f"states on {device}")
            else:  # groups of one keep whole gradients on the device, and sums of them elsewhere
                assert_near(record, here, f"states on {device}", rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.slow
def test_offload(world4: World, size: int, tmp_path: Path) -> None:
    world4.run(offloaded_agrees_with_device, size, str(tmp_path))


# -- what is held and what travels


class Chain(nn.Sequential):
    """P elements, which 4 shards and 2 parts of each divide."""

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.GELU()) for _ in range(3)))


P = 3 * 64 * 64
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


def received_in_a_step(
    size: int, accumulation: int, zero: Config, nodes: int, **others: Any
) -> tuple[dict[Route, int], int]:
    torch.manual_seed(0)
    model = Chain()
    own = {"unit_classes": ["Sequential"], "simulated_nodes": nodes}
    config = mics(size, zero=NOTHING_STAYS | zero, accumulation=accumulation, shardwise=own, **others)
    with open_engine(model, torch.optim.AdamW(model.parameters()), config) as engine:
        for _ in range(2):
            engine._comm.traffic.clear()
            for _ in range(accumulation):
                x = torch.ones(2, 64, dtype=next(model.parameters()).dtype)
                engine.backward(F.mse_loss(engine(x).float(), torch.zeros(2, 64)))
                engine.step()
        report = engine.memory_report()
        assert report.states_bytes == report.predicted_bytes
        return engine._comm.traffic.by_route, report.states_bytes


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_step_moves_what_the_formula_says(world4: World, accumulation: int) -> None:
    """W = 4, groups of k, R = W/k replicas, b bytes, g micro-batches: gathers of 2 g b P (k - 1)/k and a reduction of
    g b P (k - 1)/k inside the group, and g times 8 P/k (R - 1)/R bytes of fp32 sums between replicas."""
    g = accumulation
    for k, nodes, others, b, wire in ((2, 2, {}, 4, "float32"), (2, 2, BF16, 2, "bfloat16"), (2, 1, {}, 4, "float32")):
        r = 4 // k
        for received, states in world4.run(received_in_a_step, k, g, {}, nodes, **others):
            far = nodes > 1  # a group is a node: only replicas meet across
            assert received == {
                Route("all-gather", wire, False, "dp_shard"): 2 * g * b * P * (k - 1) // k,
                Route("reduce-scatter", wire, False, "dp_shard"): g * b * P * (k - 1) // k,
                Route("reduce-scatter", "float32", far, "dp_replicate"): g * 4 * P // k * (r - 1) // r,
                Route("all-gather", "float32", far, "dp_replicate"): g * 4 * P // k * (r - 1) // r,
            }
            assert states == 16 * P // k
    for received, states in world4.run(received_in_a_step, 1, g, {}, 2):
        # One sum a step, of whole gradients; ranks 2 and 3 are on the other node for 0 and 1.
        for operation in ("reduce-scatter", "all-gather"):
            for far, ranks in ((False, 1), (True, 2)):
                assert received.pop(Route(operation, "float32", far, "dp_replicate")) == ranks * 4 * P // 4
        assert received == {}
        assert states == 16 * P


def gathers_over_nodes(zero: Config) -> dict[Route, int]:
    recipe = dataclasses.replace(MLP, steps=1)
    reference = reference_in_groups(recipe, 4)
    model = recipe.model()
    # Two nodes of four, were there eight ranks: a group of four spans two nodes of two.
    config = mics(4, zero=zero, shardwise={"simulated_nodes": 2, "transport": "process_group"})
    with open_engine(model, recipe.optimizer(model), config) as engine:
        record = run_steps(recipe, engine)
        received: dict[Route, int] = engine._comm.traffic.by_route
    assert_same(record, reference, "gathers in two hops")
    return {route: size for route, size in received.items() if route.operation == "all-gather"}


def test_gathers_cross_nodes_once(world4: World) -> None:
    """By messages two ranks of a node each fetch the other node's two shards; in two hops each fetches one of them."""
    for once, twice in zip(
        world4.run(gathers_over_nodes, HIERARCHICAL), world4.run(gathers_over_nodes, {}), strict=True
    ):
        far, near = Route("all-gather", "float32", True), Route("all-gather", "float32", False)
        assert (once[far] * 2, once[far] + once[near]) == (twice[far], twice[far] + twice[near])


def test_a_group_inside_a_node_gathers_as_without(world4: World) -> None:
    assert world4.run(received_in_a_step, 2, 1, HIERARCHICAL, 2) == world4.run(received_in_a_step, 2, 1, {}, 2)


def test_explain_counts_a_group() -> None:
    def in_force(config: Config, num_ranks: int) -> StateBytes:
        states = states_per_rank(load_config(config), 1_000_000, num_ranks)
        return next(stage.bytes for stage in states.stages if stage.in_force)

    assert in_force(mics(2, **BF16), 8) == in_force(plain(**BF16), 2)
    assert in_force(mics(1), 8) == in_force(plain(), 1)
    with pytest.raises(ConfigError, match="does not divide 8 ranks"):
        in_force(mics(3), 8)


def logged_axes(size: int) -> set[tuple[str, str]]:
    model = MLP.model()
    with open_engine(model, MLP.optimizer(model), mics(size, comms_logger={"enabled": True})) as engine:
        run_steps(MLP, engine)
        assert "dp_replicate" in str(engine.comms_summary())
        return {(total.axis, total.operation) for total in engine.comms_summary().totals}


def test_the_log_tells_axes_apart(world4: World) -> None:
    across = {("dp_replicate", "reduce_scatter"), ("dp_replicate", "all_gather"), ("world", "exchange")}
    inside = {("dp_shard", "reduce_scatter"), ("dp_shard", "all_gather")}
    assert world4.run(logged_axes, 2) == [across | inside] * 4
    assert world4.run(logged_axes, 1) == [across] * 4


# -- checkpoints and whole values


def build_forgetful() -> nn.Module:
    torch.manual_seed(3)
    return Forgetful()


FORGETFUL = Recipe(build_forgetful, models.vectors, models.regression, adamw_in_two_groups)


def open_forgetful(config: Config) -> Any:
    model = build_forgetful()
    return open_engine(model, adamw_in_two_groups(model), config)


def train(engine: Any, first: int, last: int) -> None:
    for index in range(first, last):
        engine.backward(FORGETFUL.loss(engine, FORGETFUL.batch(index, rank())))
        engine.step()


def saves_and_goes_on(size: int, path: str) -> None:
    """In the middle of a step, with gradients that are reduced and some that are not: bit for bit in the same world."""
    config = mics(size, accumulation=3)
    with open_forgetful(config) as engine:
        torch.manual_seed(100 + rank())
        train(engine, 0, 4)
        with engine.no_sync():
            train(engine, 4, 4)
            engine.backward(FORGETFUL.loss(engine, FORGETFUL.batch(4, rank())))
        engine.save_checkpoint(path, tag="middle")
        engine.micro_steps += 1
        train(engine, 5, 9)
        wanted = engine.state_dict()
    with open_forgetful(config) as engine:
        torch.manual_seed(200 + rank())
        train(engine, 0, 2)
        engine.load_checkpoint(path, tag="middle")
        engine.micro_steps += 1
        train(engine, 5, 9)
        assert_replicas_agree(engine)
        got = engine.state_dict()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    record = read_manifest(Path(path) / "middle")
    holders = {file for parameter in record.models[0].parameters.values() for file, _, _ in parameter.pieces}
    assert record.world == len(record.ranks) == world_size()
    assert holders <= set(range(size))


def travels_between_shapes(path: str) -> None:
    """From groups to none and back, masters and moments stay what they are."""
    shapes = [mics(2), config_of(2), mics(1), plain(), mics(2)]
    with open_forgetful(shapes[0]) as engine:
        train(engine, 0, 2)
        engine.save_checkpoint(path, tag="0")
        wanted = whole_states(engine)
    for number, config in enumerate(shapes[1:], start=1):
        with open_forgetful(config) as engine:
            engine.load_checkpoint(path, tag=str(number - 1))
            for name, value in whole_states(engine).items():
                assert torch.equal(value, wanted[name]), (number, name)
            engine.save_checkpoint(path, tag=str(number), async_save=number == 2)
            engine.wait_for_checkpoint()


def whole_states(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        value = safe_get_full_fp32_param(parameter)
        assert value is not None
        found[name] = value
        moment = safe_get_full_optimizer_state(parameter, "exp_avg") if parameter.requires_grad else None
        if moment is not None:
            found[f"exp_avg of {name}"] = moment
    return found


def loads_in_another_world(path: str, size: int) -> dict[str, torch.Tensor]:
    with open_forgetful(mics(size)) as engine:
        engine.load_checkpoint(path)
        found = whole_states(engine)
        train(engine, 4, 5)
        engine.save_checkpoint(path, tag="two")
        return found


def test_checkpoints(world4: World, world2: World, tmp_path: Path) -> None:
    for size in (1, 2):
        world4.run(saves_and_goes_on, size, str(tmp_path / f"of {size}"))
    path = str(tmp_path / "shapes")
    world4.run(travels_between_shapes, path)
    (first, second), (third, _) = world2.run(loads_in_another_world, path, 1), world2.run(
        loads_in_another_world, path, 2
    )  # fmt: skip
    assert first.keys() == second.keys() == third.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())


def reads_and_writes_whole_values(size: int) -> None:
    recipe = dataclasses.replace(MLP, steps=1)
    model: Any = recipe.model()
    config = mics(size, zero={"stage3_gather_16bit_weights_on_model_save": True})
    with open_engine(model, recipe.optimizer(model), config) as engine:
        run_steps(recipe, engine)
        weight = model.blocks[0].up.weight
        state = engine.state_dict()
        gathered = engine.gather_state_dict()
        assert (list(gathered) == list(state)) if rank() == 0 else gathered == {}
        assert all(torch.equal(gathered[name], value) for name, value in state.items() if name in gathered)
        assert torch.equal(safe_get_full_fp32_param(weight), state["blocks.0.up.weight"])
        # Every replica is given other values: the first one's, and rank 0's, count.
        with shardwise.zero.GatheredParameters(weight, modifier_rank=3):
            weight.data.fill_(float(rank()))
        assert (safe_get_full_fp32_param(weight) == 3.0).all()
        safe_set_full_fp32_param(weight, torch.full_like(weight, 5.0 + rank()))
        assert (safe_get_full_fp32_param(weight) == 5.0).all()
        if size > 1:
            part = safe_get_local_fp32_param(weight)
            safe_set_local_fp32_param(weight, torch.full_like(part, 10.0 + rank()))
            values = safe_get_full_fp32_param(weight).unique().tolist()
            assert set(values) <= {10.0 + place for place in range(size)}
        else:
            with pytest.raises(ConfigError, match="whole on every rank"):
                safe_set_local_fp32_param(weight, torch.zeros(weight.numel()))
        safe_set_full_optimizer_state(weight, torch.full(tuple(weight.shape), 0.5 + rank()), "exp_avg")
        assert (safe_get_full_optimizer_state(weight, "exp_avg") == 0.5).all()
        assert_replicas_agree(engine)
        engine.backward(recipe.loss(engine, recipe.batch(1, rank())))
        safe_set_full_grad(weight, torch.full(tuple(weight.shape), 2.0 + rank()))
        gradient = safe_get_full_grad(weight)
        assert gradient is not None and (gradient == 2.0).all()
        engine.step()
        assert_replicas_agree(engine)
        with engine.gathered_parameters():
            found: list[Any] = [None] * world_size()
            dist.all_gather_object(found, digest_of(list(model.parameters())))
            assert len(set(found)) == 1


def test_whole_values(world4: World) -> None:
    for size in (1, 2):
        world4.run(reads_and_writes_whole_values, size)


# -- errors


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as told:
        train_with_engine(MLP, config)
    return str(told.value)


def test_what_makes_no_sense_is_refused(world3: World) -> None:
    for size in (2, 4):
        for text in world3.run(refused, mics(size)):
            assert f"mics_shard_size: found {size}, which does not divide 3 ranks. Expected 1 or 3" in text
    for config, expected in (
        (config_of(2, zero={"mics_shard_size": 3}), "at stage 2"),
        (mics(3, zero={"zero_hpz_partition_size": 3}), "zero_hpz_partition_size is set"),
        (mics(3, zero={"zero_quantized_weights": True}), "zero_quantized_weights is set"),
        (mics(3, zero={"zero_quantized_gradients": True}), "zero_quantized_gradients is set"),
        (mics(1, shardwise={"transport": "shared_memory"}), "parts them into groups"),
    ):
        for text in world3.run(refused, config):
            assert expected in text


def gathers_where(local_ranks: tuple[int, ...], size: int) -> None:
    """With LOCAL_RANK as a launcher on nodes of other sizes sets it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(local_ranks[rank()]))
        equals_reference_in_groups(MLP, size, zero=HIERARCHICAL, shardwise={"transport": "process_group"})


def refused_where(local_ranks: tuple[int, ...], size: int) -> None:
    with pytest.raises(ConfigError, match="do not all lie on nodes alike"):
        gathers_where(local_ranks, size)


def test_groups_must_lie_on_nodes_alike(world4: World) -> None:
    world4.run(gathers_where, (0, 0, 0, 0), 2)
    world4.run(refused_where, (0, 1, 2, 0), 2)
    world4.run(refused_where, (0, 1, 2, 0), 4)
    for text in world4.run(refused, mics(2, zero=HIERARCHICAL, shardwise={"transport": "shared_memory"})):
        assert "where nothing travels" in text
