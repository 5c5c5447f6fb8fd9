"""A unit without any engine becomes whole, is put away, averages gradients; and says so when it is driven wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.comm.base import CollectiveId, Communicator
from shardwise.comm.choose import build_communicator
from shardwise.errors import StateError
from shardwise.layout import NO_GROUP, Layout, Slot, even_layout, whole_parameter_layout
from shardwise.mesh import build_mesh
from shardwise.precision import Precision
from shardwise.zero.sharding import STAGES
from shardwise.zero.unit import ShardedState, Unit, build_segment, with_gradients
from tests.worlds import World

FP32, BF16 = torch.float32, torch.bfloat16
TRANSPORTS = ["shared_memory", "process_group"]
TRAINED = {"weight": (41, 7), "bias": (41,), "scale": ()}

EVERY_TRANSPORT = pytest.mark.parametrize("transport", TRANSPORTS)


class Module(nn.Module):
    """Three trained parameters, one of them 0-dim, and a frozen one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in TRAINED.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.frozen = nn.Parameter(torch.randn(33, generator=generator), requires_grad=False)


@dataclass
class Hand:
    """What a test drives, with a step number of its own."""

    comm: Communicator
    module: Module
    unit: Unit
    stage: int
    step: int = 0

    @property
    def sharded(self) -> bool:
        return self.stage == 3

    @property
    def layout(self) -> Layout:
        return self.unit.segments[0].layout

    def whole(self) -> dict[str, torch.Tensor]:
        """Every parameter's values, by way of unshard and reshard."""
        self.unit.unshard(self.step)
        self.unit.wait_unsharded()
        values = {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}
        self.unit.reshard()
        return values

    def take(self, gradients: dict[str, torch.Tensor], keep: bool = False) -> list[bool]:
        """Hand over gradients in the order of backward: last parameter first."""
        names = self.unit.trainable[0][0].names
        self.unit.begin_backward()
        return [
            self.unit.take_gradient(0, names.index(name), gradients[name].clone(), keep) for name in [*gradients][::-1]
        ]

    def reduce(self) -> None:
        self.step += 1
        for pending in self.unit.reduce(self.step):
            pending.wait()

    def flat(self, values: dict[str, torch.Tensor], dtype: torch.dtype = FP32) -> torch.Tensor:
        """`values` laid out by hand, zeros where there are none."""
        buffer = torch.zeros(self.layout.numel, dtype=dtype)
        for slot in self.layout.slots:
            if slot.name in values:
                buffer[slot.offset : slot.offset + slot.numel] = values[slot.name].flatten()
        return buffer

    def mine(self, buffer: torch.Tensor) -> torch.Tensor:
        return self.comm.my_slice(buffer, self.layout.cuts)

    def barrier(self) -> None:
        self.comm.exchange(CollectiveId("barrier", "", self.step), b"")


@contextmanager
def build(
    transport: str,
    stage: int,
    precision: Precision | None = None,
    seed_of_rank: int = 0,
    whole_parameters: bool = False,
    contiguous: bool = True,
) -> Iterator[Hand]:
    precision = precision or Precision(None, None)
    comm = build_communicator(build_mesh("cpu", timedelta(seconds=60)), transport, "ordered")
    try:
        module = Module(seed_of_rank * comm.rank)
        segments = []
        for names, group in ((tuple(TRAINED), 0), (("frozen",), NO_GROUP)):
            slots = [Slot(name, tuple(module.get_parameter(name).shape), group) for name in names]
            cut_whole = whole_parameters and group == 0
            layout = whole_parameter_layout(slots, [0] * comm.size) if cut_whole else even_layout(slots, comm.size)
            parameters = [module.get_parameter(slot.name) for slot in layout.slots]
            segment = build_segment(comm, layout, parameters, STAGES[stage], precision)
            segments.append(with_gradients(comm, segment, precision, contiguous) if segment.trainable else segment)
        comm.publish()
        unit = Unit("by_hand", 0, module, segments)
        yield Hand(comm, module, unit, stage)
    finally:
        comm.close()


def at_every_stage(case: Callable[..., None], transport: str, ways: Sequence[tuple[Any, ...]] = ((),)) -> None:
    """One trip to the ranks for all stages and arguments; a failure says which it was."""
    for stage in range(4):
        for way in ways:
            try:
                case(transport, stage, *way)
            except Exception as error:
                error.add_note(f"at stage {stage} with {way}")
                raise


def initial(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in Module(seed).named_parameters()}


def gradients_of(rank: int, salt: int = 0, names: tuple[str, ...] = tuple(TRAINED)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * salt + rank + 1)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in TRAINED.items()}
    return {name: drawn[name] for name in names}


def mean(hand: Hand, buffers: list[torch.Tensor]) -> torch.Tensor:
    """The naive mean over ranks of whole buffers, in rank order."""
    total = buffers[0].to(FP32)
    for buffer in buffers[1:]:
        total = total + buffer.to(FP32)
    return total * (1.0 / hand.comm.size) if hand.comm.size > 1 else total


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# -- parameters


def becomes_whole_and_is_put_away(transport: str, stage: int) -> None:
    with build(transport, stage) as hand:
        unit, module = hand.unit, hand.module
        home = unit.segments[0].parameters
        assert unit.is_sharded == hand.sharded
        assert unit.numel_sharded == sum(s.layout.numel for s in unit.segments) * hand.sharded
        for _ in range(3):
            if hand.sharded:
                assert unit.state is ShardedState.SHARDED
                assert all(p.isnan().all() for p in module.parameters()), "a read outside must not look like a weight"
                assert {n: p.shape for n, p in module.named_parameters()} == {n: v.shape for n, v in initial().items()}
                assert unit.live_bytes() == home.full.untyped_storage().nbytes() == 0
            unit.unshard(0)
            assert unit.is_whole
            unit.unshard(0)  # on its way already: no second gather
            unit.wait_unsharded()
            unit.wait_unsharded()
            assert equal(dict(module.named_parameters()), initial())
            assert all(
                p.untyped_storage().data_ptr() == home.full.untyped_storage().data_ptr() for p in home.parameters
            )
            assert unit.live_bytes() == 4 * unit.numel_sharded
            unit.reshard()
            unit.reshard()
            assert unit.is_whole != hand.sharded
        hand.barrier()
        gathers = 3 * sum(s.layout.numel for s in unit.segments) * 4 * (hand.comm.size - 1) // hand.comm.size
        assert hand.comm.traffic.received_bytes.get("all-gather", 0) == gathers * hand.sharded


@EVERY_TRANSPORT
@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_parameters_become_whole_and_are_put_away(world: World, transport: str) -> None:
    world.run(at_every_stage, becomes_whole_and_is_put_away, transport)


def saved_views_live_again(transport: str) -> None:
    """What autograd saved in forward points into the buffer that backward's gather fills."""
    with build(transport, stage=3) as hand:
        hand.unit.unshard(0)
        hand.unit.wait_unsharded()
        saved = hand.module.weight.detach()
        hand.unit.reshard()
        hand.unit.unshard(1)
        hand.unit.wait_unsharded()
        assert torch.equal(saved, initial()["weight"])
        hand.unit.reshard()
        hand.barrier()


@EVERY_TRANSPORT
def test_views_that_were_saved_live_again(world2: World, transport: str) -> None:
    world2.run(saved_views_live_again, transport)


def put_away_at_once(transport: str) -> None:
    """A prefetched unit that nobody used: the gather under way must end before its memory goes."""
    with build(transport, stage=3) as hand:
        for step in range(3):
            hand.unit.unshard(step)
            hand.unit.reshard()
            assert hand.unit.live_bytes() == 0
        assert equal(hand.whole(), initial())
        hand.barrier()


@EVERY_TRANSPORT
def test_a_gather_that_nobody_waited_for(world2: World, transport: str) -> None:
    world2.run(put_away_at_once, transport)


def starts_from_rank_0(transport: str, stage: int) -> None:
    with build(transport, stage, seed_of_rank=5) as hand:
        assert equal(hand.whole(), initial(seed=0))
        hand.barrier()


@EVERY_TRANSPORT
def test_rank_0s_values_win(world2: World, transport: str) -> None:
    world2.run(at_every_stage, starts_from_rank_0, transport)


def guards_of_other_dtypes() -> None:
    """No NaN where there is none: the least integer, or False."""
    comm = build_communicator(build_mesh("cpu", timedelta(seconds=60)), "auto", "ordered")
    try:
        units = []
        for dtype in (torch.int64, torch.bool, torch.complex64):
            parameter = nn.Parameter(torch.ones(5, 3, dtype=dtype), requires_grad=False)
            layout = even_layout([Slot("it", (5, 3), NO_GROUP)], comm.size)
            segment = build_segment(comm, layout, [parameter], STAGES[3], Precision(BF16, None))
            units.append((Unit(str(dtype), 0, nn.Module(), [segment]), parameter, dtype))
        comm.publish()
        for unit, parameter, dtype in units:
            assert parameter.dtype == dtype
            assert not (parameter == 1).any()
            unit.unshard(0)
            unit.wait_unsharded()
            assert torch.equal(parameter, torch.ones(5, 3, dtype=dtype))
            unit.reshard()
        comm.exchange(CollectiveId("end", "", 0), b"")
    finally:
        comm.close()


def test_guards_of_parameters_without_nan(world2: World) -> None:
    world2.run(guards_of_other_dtypes)


# -- gradients


def reduces(transport: str, stage: int, whole_parameters: bool, contiguous: bool) -> None:
    with build(transport, stage, whole_parameters=whole_parameters, contiguous=contiguous) as hand:
        ranks = range(hand.comm.size)
        home = hand.unit.trainable[0][1]
        for salt in range(3):
            assert not hand.unit.has_unreduced
            assert not hand.unit.all_used
            assert hand.take(gradients_of(hand.comm.rank, salt)) == [False, False, True], "complete with the last one"
            assert hand.unit.has_unreduced
            assert hand.unit.all_used
            hand.reduce()
            assert not hand.unit.has_unreduced
            expected = mean(hand, [hand.flat(gradients_of(rank, salt)) for rank in ranks])
            assert torch.equal(home.owned, hand.mine(expected))
            if stage >= 1:
                assert home.for_optimizer.data_ptr() == home.owned.data_ptr()
            hand.comm.publish()
            for pending in hand.unit.spread_gradients(hand.step):
                pending.wait()
            span = hand.unit.segments[0].parameters.master_span
            assert torch.equal(home.for_optimizer, expected[span.begin : span.end])
            assert span == (hand.comm.my_span(hand.layout.cuts) if stage else hand.layout.whole)
            hand.barrier()
            hand.comm.settle()
            hand.unit.clear_gradients()


@EVERY_TRANSPORT
@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_gradients_become_the_mean_over_ranks(world: World, transport: str) -> None:
    world.run(at_every_stage, reduces, transport, ways=[(False, True), (False, False), (True, True)])


def reduces_what_is_there(transport: str, stage: int) -> None:
    """Rank 0 has one gradient, the others have none: they take part with zeros, whatever the buffer held before."""
    with build(transport, stage) as hand:
        hand.take(gradients_of(hand.comm.rank, salt=1))
        hand.reduce()
        hand.comm.settle()
        hand.unit.clear_gradients()
        taken = gradients_of(0, salt=2, names=("bias",))
        assert hand.take(taken if hand.comm.rank == 0 else {}) == ([False] if hand.comm.rank == 0 else [])
        hand.reduce()
        buffers = [hand.flat(taken if rank == 0 else {}) for rank in range(hand.comm.size)]
        assert torch.equal(hand.unit.trainable[0][1].owned, hand.mine(mean(hand, buffers)))
        used = dict(zip(hand.unit.trainable[0][0].names, hand.unit.used[0], strict=True))
        assert used == {"weight": 0, "bias": int(hand.comm.rank == 0), "scale": 0}
        hand.comm.settle()


@EVERY_TRANSPORT
def test_missing_gradients_count_as_zeros(world2: World, transport: str) -> None:
    world2.run(at_every_stage, reduces_what_is_there, transport)


def reduces_twice(transport: str, stage: int) -> None:
    """Two reductions in one step add up, also where the second has news on one rank only."""
    with build(transport, stage) as hand:
        ranks = range(hand.comm.size)
        owned = hand.unit.trainable[0][1].owned
        hand.take(gradients_of(hand.comm.rank, salt=1))
        hand.reduce()
        first = mean(hand, [hand.flat(gradients_of(rank, salt=1)) for rank in ranks])
        hand.take(gradients_of(0, salt=2, names=("weight",)) if hand.comm.rank == 0 else {})
        hand.reduce()
        second = mean(
            hand, [hand.flat(gradients_of(0, salt=2, names=("weight",)) if rank == 0 else {}) for rank in ranks]
        )
        assert torch.equal(owned, hand.mine(first + second))
        assert not hand.unit.has_unreduced
        hand.comm.settle()
        hand.unit.clear_gradients()
        hand.take(gradients_of(hand.comm.rank, salt=3))
        hand.reduce()
        assert torch.equal(owned, hand.mine(mean(hand, [hand.flat(gradients_of(rank, salt=3)) for rank in ranks])))
        hand.comm.settle()


@EVERY_TRANSPORT
@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_reductions_of_one_step_add_up(world: World, transport: str) -> None:
    world.run(at_every_stage, reduces_twice, transport)


def keeps(transport: str, stage: int, contiguous: bool) -> None:
    """Passes that do not reduce add up on each rank; the next reduction takes the sum."""
    with build(transport, stage, contiguous=contiguous) as hand:
        salts = (1, 2, 3)
        for salt in salts[:-1]:
            hand.take(gradients_of(hand.comm.rank, salt), keep=True)
            assert hand.unit.has_unreduced
        hand.take(gradients_of(hand.comm.rank, salts[-1]))
        hand.reduce()
        buffers = []
        for rank in range(hand.comm.size):
            first, second, third = (hand.flat(gradients_of(rank, salt)) for salt in salts)
            buffers.append(first + second + third)
        assert torch.equal(hand.unit.trainable[0][1].owned, hand.mine(mean(hand, buffers)))
        hand.comm.settle()


@EVERY_TRANSPORT
def test_passes_without_reduction_add_up(world2: World, transport: str) -> None:
    world2.run(at_every_stage, keeps, transport, ways=[(True,), (False,)])


def forgets(transport: str, stage: int) -> None:
    with build(transport, stage) as hand:
        hand.take(gradients_of(hand.comm.rank, salt=1), keep=True)
        resting = hand.unit.segments[0].resting_bytes()
        hand.unit.clear_gradients()
        assert not hand.unit.has_unreduced
        assert not any(hand.unit.used[0])
        assert hand.unit.live_bytes() == 0
        assert hand.unit.segments[0].resting_bytes() == resting
        assert hand.take(gradients_of(hand.comm.rank, salt=2))[-1], "it counts from zero again"
        hand.reduce()
        expected = mean(hand, [hand.flat(gradients_of(rank, salt=2)) for rank in range(hand.comm.size)])
        assert torch.equal(hand.unit.trainable[0][1].owned, hand.mine(expected))
        hand.comm.settle()


@EVERY_TRANSPORT
def test_cleared_gradients_leave_no_trace(world2: World, transport: str) -> None:
    world2.run(at_every_stage, forgets, transport)


# -- steps and dtypes


def steps(transport: str, stage: int, compute: torch.dtype | None) -> None:
    """Masters change by hand, are published, and every rank reads them, narrowed to the compute dtype."""
    with build(transport, stage, Precision(compute, None)) as hand:
        segment = hand.unit.segments[0]
        home, dtype = segment.parameters, compute or FP32
        span = home.master_span
        masters = hand.flat(initial())
        assert home.master.dtype == FP32
        assert torch.equal(home.master, masters[span.begin : span.end]), (
            "masters keep what the compute dtype rounds away"
        )
        expected_bytes = {True: hand.layout.shard(0).numel, False: hand.layout.numel}
        row, narrow = STAGES[stage], compute is not None
        assert segment.resting_bytes() == (
            4 * expected_bytes[True] if row.parameter else dtype.itemsize * hand.layout.numel,
            4 * expected_bytes[row.gradient],
            4 * expected_bytes[row.optimizer] * (narrow and not row.parameter),
        )
        for step in range(3):
            hand.barrier()  # nobody reads any more
            home.master.add_(0.001)
            masters += 0.001
            publications = list(hand.unit.publish(step))
            assert len(publications) == 1, "frozen parameters are not published"
            hand.comm.publish()
            for pending in publications:
                pending.wait()
            found = hand.whole()
            for slot in hand.layout.slots:
                wanted = masters[slot.offset : slot.offset + slot.numel].view(slot.shape).to(dtype)
                assert found[slot.name].dtype == dtype
                assert torch.equal(found[slot.name], wanted)
            assert torch.equal(found["frozen"], initial()["frozen"].to(dtype))
        hand.barrier()


@EVERY_TRANSPORT
@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_a_step_reaches_every_rank(world: World, transport: str) -> None:
    world.run(at_every_stage, steps, transport, ways=[(None,), (BF16,), (torch.float16,)])


def travels(transport: str, stage: int, precision: Precision) -> None:
    """Gradients are rounded to the dtype that they travel in, summed in fp32, and added to fp32."""
    with build(transport, stage, precision) as hand:
        dtype = precision.communication or precision.compute or FP32
        expected = torch.zeros(hand.layout.numel)
        for salt in (1, 2):
            taken = [gradients_of(rank, salt) for rank in range(hand.comm.size)]
            if precision.compute is not None:
                taken = [{name: g.to(precision.compute) for name, g in of_rank.items()} for of_rank in taken]
            hand.take(taken[hand.comm.rank])
            hand.reduce()
            expected += mean(hand, [hand.flat(of_rank).to(dtype) for of_rank in taken])
        owned = hand.unit.trainable[0][1].owned
        assert owned.dtype == FP32
        assert torch.equal(owned, hand.mine(expected))
        hand.comm.settle()


@EVERY_TRANSPORT
def test_gradients_travel_in_the_dtype_that_is_asked_for(world2: World, transport: str) -> None:
    ways = [(Precision(compute, travel),) for compute in (None, BF16) for travel in (None, BF16, FP32)]
    world2.run(at_every_stage, travels, transport, ways=ways)


# -- wrong moves


def waits_while_sharded() -> None:
    with build("auto", stage=3) as hand:
        with pytest.raises(StateError, match="'by_hand' is SHARDED: expected UNSHARDED"):
            hand.unit.wait_unsharded()
        hand.unit.unshard(0)
        hand.unit.reshard()
        with pytest.raises(StateError, match="'by_hand'"):
            hand.unit.wait_unsharded()
        hand.barrier()


def test_waiting_for_a_sharded_unit_is_an_error(world2: World) -> None:
    world2.run(waits_while_sharded)


def nothing_to_train(transport: str) -> None:
    """A unit of frozen parameters takes part in gathers alone."""
    with build(transport, stage=3) as hand:
        unit = Unit("frozen", 1, hand.module, hand.unit.segments[1:])
        assert unit.trainable == ()
        assert (unit.num_gradients, unit.all_used, unit.has_unreduced) == (0, True, False)
        assert unit.reduce(0) == list(unit.publish(0)) == list(unit.spread_gradients(0)) == []
        unit.unshard(0)
        unit.wait_unsharded()
        assert torch.equal(hand.module.frozen, initial()["frozen"])
        unit.reshard()
        hand.barrier()


@EVERY_TRANSPORT
def test_a_unit_without_trainable_parameters(world2: World, transport: str) -> None:
    world2.run(nothing_to_train, transport)
