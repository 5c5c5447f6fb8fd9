"""ZeRO++ sends less: hpZ without changing a bit, quantised travel within a stated error, and all ranks agree.

Four ranks are two nodes of two; traffic is counted on messages, for shared memory sends none.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardwise
from shardwise.comm.base import CollectiveId
from shardwise.errors import ConfigError
from shardwise.quantize import build_quantizer
from tests.references import GPT, MLP, WIDE, Recipe, assert_same
from tests.world.engine_runs import (
    Config,
    config_of,
    equals_reference,
    open_engine,
    rank,
    reference_of,
    train_with_engine,
    world_size,
)
from tests.worlds import World

HPZ = {"zero_hpz_partition_size": 2}
QWZ = {"zero_quantized_weights": True}
QGZ = {"zero_quantized_gradients": True}
ALL = HPZ | QWZ | QGZ
HPZ_OF_FOUR = {"zero_hpz_partition_size": 4}
NAMES = {"hpZ": HPZ, "qwZ": QWZ, "qgZ": QGZ, "all": ALL}
TECHNIQUES = [pytest.param(technique, id=name) for name, technique in NAMES.items()]
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""Every unit is gathered for forward and again for backward, so that M elements of parameters travel twice."""


def plus(technique: Config, zero: Config | None = None, own: Config | None = None, **others: Any) -> Config:
    shardwise = {"transport": "process_group", "simulated_nodes": max(1, world_size() // 2), **(own or {})}
    return config_of(3, zero={**technique, **(zero or {})}, shardwise=shardwise, **others)


# -- hpZ


def hpz_equals_reference(recipe: Recipe, size: int, **others: Any) -> None:
    equals_reference(recipe, plus({"zero_hpz_partition_size": size}, **others))


@pytest.mark.parametrize("world", [2, 4], indirect=True)
@pytest.mark.parametrize("recipe", [dataclasses.replace(WIDE, steps=4), GPT], ids=["wide", "gpt"])
def test_a_secondary_shard_changes_no_bit(world: World, recipe: Recipe) -> None:
    world.run(hpz_equals_reference, recipe, 2)


@pytest.mark.parametrize("zero", [{}, NOTHING_STAYS], ids=["as set", "nothing stays"])
def test_nor_with_accumulation_and_clipping(world4: World, zero: Config) -> None:
    recipe = dataclasses.replace(GPT, accumulation=3, clip=0.5)
    world4.run(equals_plain, recipe, zero)


def equals_plain(recipe: Recipe, zero: Config) -> None:
    settings = {"accumulation": recipe.accumulation, "gradient_clipping": recipe.clip}
    plain = train_with_engine(recipe, plus({}, zero, **settings))
    assert_same(train_with_engine(recipe, plus(HPZ, zero, **settings)), plain, "hpZ against plain stage 3")


def test_groups_need_not_be_nodes(world3: World) -> None:
    world3.run(hpz_equals_reference, MLP, 3)


# -- traffic


class Chain(nn.Sequential):
    """M elements; with four ranks every block of 256 is full."""

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(256, 256, bias=False), nn.GELU()) for _ in range(3)))


def received_by_route(technique: Config, accumulation: int) -> tuple[dict[tuple[str, str, bool], int], int, int]:
    """Bytes in the second step, elements M, and the most bytes of secondary shards at a time."""
    torch.manual_seed(0)
    model = Chain()
    config = plus(
        technique, NOTHING_STAYS, {"unit_classes": ["Sequential"]}, accumulation=accumulation, bf16={"enabled": True}
    )
    most = 0
    with open_engine(model, torch.optim.AdamW(model.parameters()), config) as engine:
        for _ in range(2):
            engine._comm.traffic.clear()
            for micro_batch in range(accumulation):
                x = torch.full((2, 256), float(rank() + micro_batch), dtype=torch.bfloat16)
                engine.backward(F.mse_loss(engine(x).float(), torch.ones(2, 256)))
                most = max(most, engine.memory_report().secondary_bytes)
                engine.step()
        by_route = engine._comm.traffic.by_route
        return {(r.operation, r.wire, r.across): n for r, n in by_route.items()}, 3 * 256 * 256, most


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ["plain", *NAMES])
def test_a_step_moves_what_the_formula_says(world4: World, name: str, accumulation: int) -> None:
    """Bytes that one rank receives, of W ranks on N nodes of s ranks; b = 2 bytes, g micro-batches.

    By messages a plain collective brings W - 1 slices of M/W elements, (W - s) of them from other nodes. In two hops
    N - 1 slices come from other nodes, and what a node has is passed on inside it.
    """
    w, n, s, g = 4, 2, 2, accumulation
    technique = NAMES.get(name, {})
    int8, int4, bf16 = 1 + 4 / 256, 0.5 + 4 / 256, 2.0
    for received, m, secondary in world4.run(received_by_route, technique, g):
        gather = int8 if name in ("qwZ", "all") else bf16
        wire = "int8" if name in ("qwZ", "all") else "bfloat16"
        expected: dict[tuple[str, str, bool], float] = {}
        if name in ("plain", "qgZ"):
            expected["all-gather", wire, True] = 2 * g * bf16 * m * (w - s) / w
            expected["all-gather", wire, False] = 2 * g * bf16 * m * (s - 1) / w
        else:
            hops_across = 1 if name in ("hpZ", "all") else 2 * g
            expected["all-gather", wire, True] = hops_across * gather * m * (n - 1) / w
            expected["all-gather", wire, False] = 2 * g * gather * m * (s - 1) / s
        if name in ("qgZ", "all"):
            expected["reduce-scatter", "int4", False] = g * int4 * m * (s - 1) / s
            expected["reduce-scatter", "int4", True] = g * int4 * m * (n - 1) / w
        else:
            expected["reduce-scatter", "bfloat16", True] = g * bf16 * m * (w - s) / w
            expected["reduce-scatter", "bfloat16", False] = g * bf16 * m * (s - 1) / w
        assert received == {route: round(size) for route, size in expected.items()}
        assert secondary == (round(gather * m / s) if name in ("hpZ", "all") else 0)
        if g == 1:
            # As the paper counts, in 2-byte elements that enter a node: each technique's share of 3 M to 0.75 M.
            across = sum(size for (_, _, far), size in received.items() if far)
            plain = name == "plain"
            elements = across / 2 / m * n / (n - 1) * (1 if plain else s)
            if plain:
                assert elements == 3.0
            elif name == "all":
                assert elements == pytest.approx(0.75 + 2 * 4 / 256 / 2)


# -- agreement


def trains_in_agreement(recipe: Recipe, config: Config, tolerance: float) -> None:
    """Near the run in one process, and all ranks compute with the same parameters after every step."""
    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), config) as engine:
        losses = []
        for step in range(recipe.steps):
            for index in recipe.micro_batches(step):
                loss = recipe.loss(engine, recipe.batch(index, rank()))
                losses.append(loss.detach().float())
                engine.backward(loss)
                engine.step()
            digest = hashlib.sha256()
            for unit in engine._units:
                unit.unshard(step)
                unit.wait_unsharded()
                for segment in unit.segments:
                    digest.update(segment.parameters.full.float().clone().numpy().tobytes())
                unit.reshard()
            digests: list[str] = [""] * world_size()
            dist.all_gather_object(digests, digest.hexdigest())
            assert len(set(digests)) == 1, f"step {step}: {digests}"
        assert engine.global_steps == recipe.steps
    reference = reference_of(recipe, "every")
    torch.testing.assert_close(
        torch.stack(losses), torch.stack(reference.losses).float(), rtol=tolerance, atol=tolerance
    )


def in_agreement(recipe: Recipe, technique: Config, own: Config, others: Config) -> None:
    settings = {"accumulation": recipe.accumulation, "gradient_clipping": recipe.clip}
    trains_in_agreement(recipe, plus(technique, own=own, **settings, **others), tolerance=3e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_ranks_agree_and_stay_near(world4: World, technique: Config, dtype: str) -> None:
    recipe = dataclasses.replace(GPT, steps=4, accumulation=2, clip=0.5)
    world4.run(in_agreement, recipe, technique, {}, {} if dtype == "fp32" else {dtype: {"enabled": True}})


@pytest.mark.parametrize(
    "own",
    [
        {"quantized_weights": "fp8", "quantized_gradients": "fp8"},
        {"quantized_gradients": "int8"},
        {"quantization_block": 32},
        {"error_feedback": True},
        {"simulated_nodes": 1},
        {"simulated_nodes": 4},
    ],
    ids=lambda own: " ".join(f"{key}={value}" for key, value in own.items()),
)
def test_other_settings(world4: World, own: Config) -> None:
    technique = QWZ | QGZ if "simulated_nodes" in own else ALL
    world4.run(in_agreement, dataclasses.replace(GPT, steps=3), technique, own, {})


@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_nodes_of_one_rank_and_one_node(world: World) -> None:
    world.run(in_agreement, GPT, QWZ | QGZ, {"simulated_nodes": None}, {})
    world.run(in_agreement, GPT, QWZ | QGZ, {"simulated_nodes": world.size}, {})


def offloaded_agrees_with_device(technique: Config, path: str) -> None:
    """Where states rest changes no bit of what travels."""
    recipe = dataclasses.replace(GPT, steps=3, accumulation=2, clip=0.5)
    settings = {"accumulation": 2, "gradient_clipping": 0.5, "bf16": {"enabled": True}}
    here = train_with_engine(recipe, plus(technique, **settings))
    place = {"device": "nvme", "nvme_path": path}
    there = train_with_engine(recipe, plus(technique, {"offload_param": place, "offload_optimizer": place}, **settings))
    assert all(torch.equal(a, b) for a, b in zip(here.losses, there.losses, strict=True))
    assert all(torch.equal(there.weights[name], value) for name, value in here.weights.items())


@pytest.mark.parametrize("technique", [HPZ, ALL], ids=["hpZ", "all"])
def test_with_states_in_files(world4: World, technique: Config, tmp_path: Any) -> None:
    world4.run(offloaded_agrees_with_device, technique, str(tmp_path))


# -- error


def reduces_within_bound(format: str, feedback: bool) -> None:
    """One reduction of wild values: each element within what two roundings may take, of their blocks."""
    model = nn.Linear(512, 64, bias=False)
    config = plus(QGZ, own={"quantized_gradients": format, "error_feedback": feedback})
    with open_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), config) as engine:
        comm = engine._comm
        numel, block = 4096, 256
        inputs = [
            torch.randn(4, numel, generator=torch.Generator().manual_seed(r))
            * torch.tensor([1e-30, 1.0, 1e4, 1e30])[:, None]
            for r in range(4)
        ]
        exact = torch.stack(inputs).double().mean(0)
        cuts = [numel * r for r in range(5)]
        quantizer = build_quantizer(format, block)

        def largest(values: torch.Tensor) -> torch.Tensor:
            return values.double().abs().view(-1, block).amax(1).repeat_interleave(block)

        mine = slice(comm.rank, comm.rank + 1)
        first = sum(largest(inputs[r][mine]) for r in range(4)) * quantizer.format.worst_error
        sums = [inputs[2 * node][mine] + inputs[2 * node + 1][mine] for node in range(2)]
        second = sum(largest(s) + first for s in sums) * quantizer.format.worst_error
        shard = torch.empty(numel)
        total = torch.zeros(numel, dtype=torch.float64)
        for step in range(8):
            buffer = torch.cat([row.clone() for row in inputs[comm.rank]])
            comm.reduce_scatter(CollectiveId("reduce-scatter", "u", step), buffer, cuts, shard, False).wait()
            error = (shard.double() - exact[comm.rank]).abs()
            if step == 0:
                assert (error <= (first + second) / 4 * (1 + 1e-5)).all()
                assert format == "int8" or error.max() > 0
            total += shard.double()
        far = (total - 8 * exact[comm.rank]).abs()
        # What is fed back does not add up over steps; what is not, does.
        assert (far <= 2 * (first + second) / 4).all() == feedback


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("feedback", [False, True], ids=["", "feedback"])
def test_a_reduction_is_within_its_bound(world4: World, format: str, feedback: bool) -> None:
    world4.run(reduces_within_bound, format, feedback)


def skips_what_is_not_finite(dtype: str, value: float) -> None:
    torch.manual_seed(0)
    model = Chain()
    others: Config = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    with open_engine(model, torch.optim.AdamW(model.parameters()), plus(ALL, **others)) as engine:
        steps = []
        for step in range(3):
            before = engine.state_dict()
            x = torch.ones(2, 256, dtype=next(model.parameters()).dtype)
            factor = value if step == 1 and rank() == 2 else 1.0
            engine.backward((engine(x).float() * factor).mean())
            engine.step()
            same = all(torch.equal(before[name], now) for name, now in engine.state_dict().items())
            steps.append((same, engine.skipped_steps))
        assert steps == [(False, 0), (True, 1), (False, 1)]
        assert all(torch.isfinite(weight).all() for weight in engine.state_dict().values())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_skips_the_step(world4: World, dtype: str, value: float) -> None:
    world4.run(skips_what_is_not_finite, dtype, value)


# -- checkpoints


def goes_on_from_a_checkpoint(path: str) -> None:
    """The same world goes on bit for bit; a world without ZeRO++ loads the same masters."""
    recipe = dataclasses.replace(GPT, steps=4)
    settings = {"bf16": {"enabled": True}}

    def train(engine: Any, first: int, last: int) -> None:
        for index in range(first, last):
            engine.backward(recipe.loss(engine, recipe.batch(index, rank())))
            engine.step()

    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), plus(ALL, **settings)) as engine:
        train(engine, 0, 2)
        engine.save_checkpoint(path)
        saved = engine.state_dict()
        train(engine, 2, 4)
        expected = engine.state_dict()
    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), plus(ALL, **settings)) as engine:
        train(engine, 2, 3)  # secondary shards of other values
        engine.load_checkpoint(path)
        train(engine, 2, 4)
        assert all(torch.equal(expected[name], value) for name, value in engine.state_dict().items())
    model = recipe.model()
    with open_engine(model, recipe.optimizer(model), config_of(2, **settings)) as engine:
        engine.load_checkpoint(path)
        assert all(torch.equal(saved[name], value) for name, value in engine.state_dict().items())


def test_checkpoints_know_nothing_of_travel(world4: World, tmp_path: Any) -> None:
    world4.run(goes_on_from_a_checkpoint, str(tmp_path))


# -- eight ranks


@pytest.mark.slow
def test_two_nodes_of_four(own_world: Callable[..., World]) -> None:
    world = own_world(8)
    world.run(eight_equal_plain, GPT)
    recipe = dataclasses.replace(GPT, steps=3, accumulation=2, clip=0.5)
    world.run(in_agreement, recipe, HPZ_OF_FOUR | QWZ | QGZ, {"simulated_nodes": 2}, {})


def eight_equal_plain(recipe: Recipe) -> None:
    equals_reference(recipe, plus(HPZ_OF_FOUR, own={"simulated_nodes": 2}))


# -- masters stay exact


def reads_and_writes_masters() -> None:
    """Who looks at parameters, or sets some of them, sees and keeps what rests, not what passes were given."""
    model = Chain()
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with open_engine(model, torch.optim.SGD(model.parameters(), lr=0.0), plus(ALL, NOTHING_STAYS)) as engine:
        x = torch.full((2, 256), 1.0 + rank())
        loss = engine(x).square().mean()
        assert all(torch.equal(value, exact[name]) for name, value in engine.state_dict().items())
        engine.backward(loss)
        engine.step()
        engine(x)  # the last unit may stay whole, rounded
        weight = model[2][0].weight
        with shardwise.zero.GatheredParameters([weight], modifier_rank=0):
            assert torch.equal(weight, exact["2.0.weight"])
            weight.data[0, 0] += rank() + 1.0
        exact["2.0.weight"][0, 0] += 1.0
        assert all(torch.equal(value, exact[name]) for name, value in engine.state_dict().items())
        with engine.gathered_parameters():
            assert all(torch.equal(value, exact[name]) for name, value in model.named_parameters())


def test_masters_are_read_and_written_exactly(world4: World) -> None:
    world4.run(reads_and_writes_masters)


# -- what cannot work


def open_with(config: Config) -> None:
    model = nn.Linear(8, 8)
    with open_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), config):
        pass


@pytest.mark.parametrize(
    ("zero", "own", "words"),
    [
        ({"zero_hpz_partition_size": 3}, {}, ["zero_hpz_partition_size", "found 3", "1 or 2 or 4"]),
        (QGZ, {"simulated_nodes": 3}, ["simulated_nodes", "found 3", "1 or 2 or 4"]),
    ],
)
def test_what_cannot_work_is_told(world4: World, zero: Config, own: Config, words: list[str]) -> None:
    for failure in world4.run_expecting_errors(open_with, config_of(3, zero=zero, shardwise=own), reusable=True):
        assert failure is not None
        assert isinstance(failure.exception, ConfigError)
        assert all(word in failure.message for word in words), failure.message
