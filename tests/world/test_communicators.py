"""Every transport against the naive collective: any dtype, cuts and bucket; and a clear error where ranks differ."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwise.comm.base import Buckets, CollectiveId, Communicator
from shardwise.comm.choose import build_communicator
from shardwise.comm.memory_file import RING
from shardwise.comm.process_group import OrderedNative
from shardwise.errors import CollectiveError
from shardwise.mesh import build_mesh
from tests.worlds import World

ORDERED = ["shared_memory", "messages", "ordered_native"]
TRANSPORTS = [*ORDERED, "native", "all_reduce"]
IDENTIFYING = ["shared_memory", "messages"]  # those that carry every collective's identity, unasked

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LARGE = 66_001  # more than one chunk of the shared-memory transport
AT_ONCE = 500_000_000

LONG = timedelta(seconds=60)
SHORT_SECONDS = 1.0

WORLDS = pytest.mark.parametrize("world", [2, 4], indirect=True)
EVERY_TRANSPORT = pytest.mark.parametrize("transport", TRANSPORTS)


# -- what the cases are made of


@contextmanager
def connect(transport: str, bucket_numel: int = AT_ONCE, timeout: timedelta = LONG) -> Iterator[Communicator]:
    mesh = build_mesh("cpu", timeout)
    comm: Communicator
    if transport == "ordered_native":
        comm = OrderedNative(mesh.dp_shard, mesh.device, Buckets(bucket_numel, bucket_numel))
    else:
        comm = build_communicator(
            mesh,
            transport={"shared_memory": "shared_memory", "single": "auto"}.get(transport, "process_group"),
            reduction="native" if transport == "native" else "auto",
            reduce_scatter=transport != "all_reduce",
            reduce_bucket_numel=bucket_numel,
            gather_bucket_numel=bucket_numel,
        )
    try:
        yield comm
    finally:
        comm.close()


def name(operation: str = "reduce-scatter", unit: str = "block.0", step: int = 3) -> CollectiveId:
    return CollectiveId(operation, unit, step)


@functools.lru_cache(maxsize=64)
def values(rank: int, numel: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """What any rank knows that `rank` has, for reading only. Many magnitudes, so that another order of adding shows."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return (torch.randn(numel, generator=generator) * torch.logspace(-2, 2, numel)).to(dtype)


def filled(comm: Communicator, content: torch.Tensor, borrowed: bool = False) -> torch.Tensor:
    make = comm.borrow if borrowed else comm.allocate
    buffer = make(content.numel(), content.dtype)
    buffer.copy_(content)
    return buffer


def all_cuts(size: int) -> list[list[int]]:
    lengths = [
        [1024] * size,
        [LARGE, *[3] * (size - 1)],
        [*range(7, 7 + size)],
        [0, *[17] * (size - 1)],
        [*[0] * (size - 1), 1021],
        [0] * size,
    ]
    return [[0, *itertools.accumulate(of_ranks)] for of_ranks in lengths]


def naive_mean(addends: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Widened, added in rank order, multiplied once."""
    total = addends[0].to(dtype)
    for addend in addends[1:]:
        total = total + addend.to(dtype)
    return total * (1.0 / len(addends)) if len(addends) > 1 else total


def assert_mean(transport: str, found: torch.Tensor, addends: list[torch.Tensor], before: torch.Tensor | None) -> None:
    """Bit for bit where the order is promised; else within the rounding of a sum of W terms in the addends' dtype."""
    expected = naive_mean(addends, found.dtype)
    expected = expected if before is None else before + expected
    if transport in (*ORDERED, "single"):
        assert torch.equal(found, expected)
        return
    terms = [*addends] if before is None else [*addends, before]
    magnitude = torch.stack([term.abs().double() for term in terms]).sum(0)
    allowed = 2 * len(terms) * torch.finfo(addends[0].dtype).eps * magnitude
    assert ((found.double() - expected.double()).abs() <= allowed).all()


# -- gathers


def gathers(transport: str) -> None:
    dtypes = ((FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16))
    with connect(transport) as comm:
        for numel, (dtype, output_dtype) in itertools.product((0, 1, 1021, LARGE), dtypes):
            mine = values(comm.rank, numel, dtype)
            shard = filled(comm, mine)
            comm.publish()
            output = torch.full((comm.size * numel,), -1.0, dtype=output_dtype)
            pending = comm.all_gather(name("all-gather"), output, shard)
            pending.wait()
            pending.wait()  # a second time changes nothing
            assert torch.equal(output, torch.cat([values(r, numel, dtype) for r in range(comm.size)]).to(output_dtype))
            assert torch.equal(shard, mine)
            comm.exchange(name("end"), b"")


@WORLDS
@EVERY_TRANSPORT
def test_gathers_hold_every_shard_in_rank_order(world: World, transport: str) -> None:
    world.run(gathers, transport)


def gathers_in_place(transport: str, bucket_numel: int) -> None:
    with connect(transport, bucket_numel) as comm:
        for cuts, dtype in itertools.product(all_cuts(comm.size), (FP32, BF16, FP16)):
            whole = torch.cat([values(r, cuts[r + 1] - cuts[r], dtype) for r in range(comm.size)])
            mine = comm.my_span(cuts)
            buffer = comm.allocate(cuts[-1], dtype)
            assert torch.equal(buffer, torch.zeros(cuts[-1], dtype=dtype)), "a fresh buffer holds zeros"
            buffer[mine.begin : mine.end] = whole[mine.begin : mine.end]
            comm.publish()
            pending = comm.all_gather_in_place(name("publication"), buffer, cuts)
            pending.wait()
            pending.wait()
            assert torch.equal(buffer, whole), cuts
            comm.exchange(name("end"), b"")


@WORLDS
@EVERY_TRANSPORT
def test_gathers_in_place_fill_the_others_slices(world: World, transport: str) -> None:
    world.run(gathers_in_place, transport, AT_ONCE)
    world.run(gathers_in_place, transport, 20_000)


def sees_what_was_published(transport: str, in_place: bool) -> None:
    """Rank 0 is late each time: nobody may see what it had before."""
    with connect(transport) as comm:
        cuts = [64 * rank for rank in range(comm.size + 1)]
        buffer = comm.allocate(cuts[-1], FP32)
        resting = comm.my_slice(buffer, cuts) if in_place else comm.allocate(64, FP32)
        store = dist.distributed_c10d._get_default_store()
        for step in range(5):
            if comm.rank == 0:
                # The others stand in the gather, or will very soon: either way they must wait for what comes now.
                store.wait([f"{transport} {in_place} {step} {rank}" for rank in range(1, comm.size)])
            resting.copy_(values(comm.rank, 64, FP32, salt=step))
            comm.publish()
            output = buffer if in_place else torch.empty(cuts[-1])
            if comm.rank > 0:
                store.set(f"{transport} {in_place} {step} {comm.rank}", "")
            if in_place:
                comm.all_gather_in_place(name(step=step), buffer, cuts).wait()
            else:
                comm.all_gather(name(step=step), output, resting).wait()
            assert torch.equal(output, torch.cat([values(r, 64, FP32, salt=step) for r in range(comm.size)]))
            comm.exchange(name("agreement", step=step), b"")


@pytest.mark.parametrize("in_place", [False, True], ids=["shards", "in place"])
@pytest.mark.parametrize("transport", ["shared_memory", "messages", "native"])
def test_a_gather_waits_for_the_owners_publication(world2: World, transport: str, in_place: bool) -> None:
    world2.run(sees_what_was_published, transport, in_place)


# -- reductions


REDUCED_DTYPES = ((FP32, FP32), (BF16, FP32), (FP16, FP32), (BF16, BF16))


def reduces(transport: str, bucket_numel: int, num_dtypes: int = len(REDUCED_DTYPES)) -> None:
    with connect(transport, bucket_numel) as comm:
        combinations = itertools.product(all_cuts(comm.size), REDUCED_DTYPES[:num_dtypes], (False, True))
        for number, (cuts, (dtype, shard_dtype), accumulate) in enumerate(combinations):
            borrowed = number % 3 > 0
            mine = comm.my_span(cuts)
            buffers = [values(rank, cuts[-1], dtype) for rank in range(comm.size)]
            before = values(comm.rank, mine.numel, shard_dtype, salt=7)
            shard = before.clone()
            buffer = filled(comm, buffers[comm.rank], borrowed)
            pending = comm.reduce_scatter(name(), buffer, cuts, shard, accumulate)
            pending.wait()
            pending.wait()
            addends = [other[mine.begin : mine.end] for other in buffers]
            assert_mean(transport, shard, addends, before if accumulate else None)
            comm.settle()
            if borrowed:
                comm.give_back(buffer)


@WORLDS
@EVERY_TRANSPORT
def test_reductions_are_the_mean_over_ranks(world: World, transport: str) -> None:
    world.run(reduces, transport, AT_ONCE)


def reduces_in_the_smallest_buckets(transport: str) -> None:
    """One element a rank and round, whatever the limit."""
    with connect(transport, bucket_numel=1) as comm:
        cuts = [0, *itertools.accumulate([5, 0, 3, 1][: comm.size])]
        mine = comm.my_span(cuts)
        buffers = [values(rank, cuts[-1], FP32) for rank in range(comm.size)]
        shard = torch.empty(mine.numel)
        comm.reduce_scatter(name(), filled(comm, buffers[comm.rank]), cuts, shard, False).wait()
        assert_mean(transport, shard, [other[mine.begin : mine.end] for other in buffers], None)
        comm.settle()


@WORLDS
@EVERY_TRANSPORT
def test_small_buckets_change_nothing(world: World, transport: str) -> None:
    world.run(reduces, transport, 20_000, num_dtypes=2)
    world.run(reduces_in_the_smallest_buckets, transport)


def reduces_into_its_own_slice(transport: str, bucket_numel: int) -> None:
    with connect(transport, bucket_numel) as comm:
        for cuts in all_cuts(comm.size):
            mine = comm.my_span(cuts)
            buffer = comm.allocate(cuts[-1], FP32)
            for salt in range(2):  # the same buffer again, once nobody reads it any more
                buffers = [values(rank, cuts[-1], FP32, salt) for rank in range(comm.size)]
                buffer.copy_(buffers[comm.rank])
                owned = comm.my_slice(buffer, cuts)
                comm.reduce_scatter(name(), buffer, cuts, owned, False).wait()
                assert_mean(transport, owned, [other[mine.begin : mine.end] for other in buffers], None)
                comm.settle()


@WORLDS
@EVERY_TRANSPORT
def test_a_slice_of_the_buffer_may_be_the_result(world: World, transport: str) -> None:
    world.run(reduces_into_its_own_slice, transport, AT_ONCE)
    world.run(reduces_into_its_own_slice, transport, 20_000)


def many_reductions(transport: str, num_reductions: int, under_way: bool) -> None:
    """One after the other; or all under way at once, rank 0 far ahead, waited for in reverse on every second rank."""
    with connect(transport) as comm:
        store = dist.distributed_c10d._get_default_store()
        if under_way and comm.rank > 0:
            store.wait([f"{transport} {comm.size} is ahead"])
            time.sleep(0.1)  # time enough to overwrite what nobody has read, if nothing kept it from that
        cuts = [16 * rank for rank in range(comm.size + 1)]
        mine = comm.my_span(cuts)
        shards = [torch.empty(mine.numel) for _ in range(num_reductions)]
        pending = []
        for step, shard in enumerate(shards):
            buffer = filled(comm, values(comm.rank, cuts[-1], FP32, salt=step), borrowed=True)
            pending.append(comm.reduce_scatter(name(step=step), buffer, cuts, shard, False))
            if step == RING - 1 and comm.rank == 0:
                store.set(f"{transport} {comm.size} is ahead", "")
            if not under_way:
                pending[-1].wait()
                comm.give_back(buffer)
        for reduction in pending[::-1] if comm.rank % 2 else pending:
            reduction.wait()
        for step, shard in enumerate(shards):
            buffers = [values(rank, cuts[-1], FP32, salt=step) for rank in range(comm.size)]
            assert_mean(transport, shard, [other[mine.begin : mine.end] for other in buffers], None)
        comm.settle()


@WORLDS
@pytest.mark.parametrize("under_way", [False, True], ids=["one by one", "all at once"])
@pytest.mark.parametrize("transport", IDENTIFYING)
def test_more_reductions_than_the_ring_has_places(world: World, transport: str, under_way: bool) -> None:
    world.run(many_reductions, transport, RING + 44, under_way)


# -- the life of gradient buffers


def lends_only_what_everybody_has_read() -> None:
    """Rank 1 deposits first and then does not look: rank 0's buffer is reduced here and unread there."""
    with connect("shared_memory") as comm:
        store = dist.distributed_c10d._get_default_store()
        cuts = [0, 32, 64]
        contents = [values(rank, 64, FP32) for rank in range(2)]
        shard = torch.empty(32)
        if comm.rank == 1:
            pending = comm.reduce_scatter(name(), filled(comm, contents[1], borrowed=True), cuts, shard, False)
            store.set("deposited", "")
            store.wait(["overwritten"])
            pending.wait()
        else:
            store.wait(["deposited"])
            buffer = filled(comm, contents[0], borrowed=True)
            comm.reduce_scatter(name(), buffer, cuts, shard, False).wait()
            comm.give_back(buffer)
            address = buffer.data_ptr()
            assert comm.pooled_bytes() == buffer.nbytes
            other = comm.borrow(64, FP32).fill_(float("nan"))
            assert other.data_ptr() != address, "a buffer was lent while rank 1 had not read it"
            store.set("overwritten", "")
            comm.settle()
            assert comm.borrow(64, FP32).data_ptr() == address, "a buffer that everybody has read was not lent again"
            assert comm.pooled_bytes() == 0
        expected = naive_mean([content[32 * comm.rank : 32 * comm.rank + 32] for content in contents], FP32)
        assert torch.equal(shard, expected)
        comm.exchange(name("end"), b"")


def test_a_buffer_is_lent_again_when_all_have_read_it(world2: World) -> None:
    world2.run(lends_only_what_everybody_has_read)


def settles(num_deposits: int) -> None:
    """After `settle` the buffer may be overwritten, however late the other rank is."""
    with connect("shared_memory") as comm:
        cuts = [0, 32, 64]
        buffer = comm.allocate(64, FP32)
        for step in range(num_deposits):
            contents = [values(rank, 64, FP32, salt=step) for rank in range(2)]
            buffer.copy_(contents[comm.rank])
            shard = torch.empty(32)
            comm.reduce_scatter(name(step=step), buffer, cuts, shard, False)
            comm.settle()  # which also finishes what nobody waited for
            buffer.fill_(float("nan"))
            assert torch.equal(shard, naive_mean([c[32 * comm.rank : 32 * comm.rank + 32] for c in contents], FP32))


def test_a_settled_buffer_may_be_written(world2: World) -> None:
    world2.run(settles, 20)


def keeps_at_most_two_buffers_of_a_size(transport: str) -> int:
    with connect(transport) as comm:
        cuts = [32 * rank for rank in range(comm.size + 1)]
        addresses = set()
        for step in range(20):
            buffer = filled(comm, values(comm.rank, cuts[-1], FP32), borrowed=True)
            addresses.add(buffer.data_ptr())
            comm.reduce_scatter(name(step=step), buffer, cuts, torch.empty(32), False).wait()
            comm.give_back(buffer)
        comm.settle()
        assert comm.pooled_bytes() == len(addresses) * cuts[-1] * 4
        return len(addresses)


@EVERY_TRANSPORT
def test_gradient_buffers_do_not_pile_up(world2: World, transport: str) -> None:
    allowed = 2 if transport == "shared_memory" else 1
    assert max(world2.run(keeps_at_most_two_buffers_of_a_size, transport)) <= allowed


# -- host bytes


def exchanges(transport: str) -> None:
    with connect(transport) as comm:
        for lengths in ([0, 10_000, 1, 4097], [0, 0, 0, 0], [4096, 1, 0, 4096], [7, 7, 7, 7], [1, 0, 8192, 3]):
            payloads = [bytes(i * (rank + 3) % 251 for i in range(lengths[rank])) for rank in range(comm.size)]
            for step in range(3):
                assert comm.exchange(name("agreement", step=step), payloads[comm.rank]) == payloads


@WORLDS
@EVERY_TRANSPORT
def test_payloads_of_any_length_reach_everybody(world: World, transport: str) -> None:
    world.run(exchanges, transport)


def broadcasts(transport: str) -> None:
    with connect(transport) as comm:
        for dtype in (FP32, BF16, torch.int64):
            buffer = torch.full((1021,), comm.rank + 5).to(dtype)
            comm.broadcast(buffer)
            assert torch.equal(buffer, torch.full((1021,), 5).to(dtype))


@EVERY_TRANSPORT
def test_rank_0s_values_win(world2: World, transport: str) -> None:
    world2.run(broadcasts, transport)


# -- counting


def counts_its_traffic(transport: str) -> dict[str, Any]:
    with connect(transport) as comm:
        comm.exchange(name("agreement"), b"is not counted")
        cuts = [0, *itertools.accumulate([10, 0, 300, 7][: comm.size])]
        buffer = comm.allocate(cuts[-1], FP32)
        shard = filled(comm, values(comm.rank, 1000, FP32))
        comm.publish()
        comm.all_gather(name(), torch.empty(comm.size * 1000, dtype=BF16), shard).wait()
        gathered = comm.traffic.received_bytes["all-gather"]
        comm.traffic.clear()
        comm.all_gather_in_place(name(), buffer, cuts).wait()
        in_place = comm.traffic.received_bytes.get("all-gather", 0)
        comm.traffic.clear()
        comm.exchange(name("end"), b"")
        comm.reduce_scatter(name(), buffer, cuts, torch.empty(comm.my_span(cuts).numel), False).wait()
        comm.settle()
        return {"cast gather": gathered, "in place": in_place, **comm.traffic.received_bytes}


@WORLDS
@EVERY_TRANSPORT
def test_received_bytes_are_counted(world: World, transport: str) -> None:
    size = world.size
    lengths = [10, 0, 300, 7][:size]
    itemsize = 4 if transport == "shared_memory" else 2  # a reader of memory casts, a sender casts before
    for rank, counted in enumerate(world.run(counts_its_traffic, transport)):
        others = sum(lengths) - lengths[rank]
        reduced = {"reduce-scatter": 4 * lengths[rank] * (size - 1)}
        expected = {"all-reduce": 2 * 4 * others} if transport == "all_reduce" else reduced
        expected = {operation: num_bytes for operation, num_bytes in expected.items() if num_bytes}
        assert counted == {"cast gather": itemsize * 1000 * (size - 1), "in place": 4 * others, **expected}


# -- one rank


def test_one_rank_needs_no_transport() -> None:
    with connect("single") as comm:
        assert (comm.rank, comm.size) == (0, 1)
    gathers("single")
    gathers_in_place("single", AT_ONCE)
    reduces("single", AT_ONCE)
    reduces_into_its_own_slice("single", AT_ONCE)
    exchanges("single")
    broadcasts("single")
    with connect("single") as comm:
        comm.realign()
        assert comm.traffic.received_bytes == {}


# -- ranks that do not meet


def reduce_as(
    transport: str,
    identities: list[CollectiveId],
    numels: list[int] | None = None,
    seconds: float = 60.0,
    check: bool = False,
) -> None:
    """Each rank reduces under an identity, and with a size, of its own."""
    with connect(transport, timeout=timedelta(seconds=seconds)) as comm:
        comm.check = check
        numel = numels[comm.rank] if numels else 64
        cuts = [numel * rank for rank in range(comm.size + 1)]
        buffer = comm.borrow(cuts[-1], FP32)
        comm.reduce_scatter(identities[comm.rank], buffer, cuts, torch.empty(numel), False).wait()
        comm.settle()


def assert_all_told(failures: list[Any], *texts: str) -> None:
    """Every rank has one CollectiveError of a few lines that holds all `texts`."""
    for rank, failure in enumerate(failures):
        assert failure is not None, f"rank {rank} noticed nothing"
        assert isinstance(failure.exception, CollectiveError), failure.traceback
        assert len(failure.message.splitlines()) <= 4
        for text in texts:
            assert text in failure.message, failure.message


APART = {
    "unit": (name(unit="branch_a"), name(unit="branch_b"), ("'branch_a'", "'branch_b'")),
    "operation": (name("all-gather"), name("reduce-scatter"), ("all-gather of", "reduce-scatter of")),
    "step": (name(step=7), name(step=8), ("step 7", "step 8")),
}


@pytest.mark.parametrize("what", APART)
def test_shared_memory_names_both_collectives(world2: World, what: str) -> None:
    first, second, texts = APART[what]
    failures = world2.run_expecting_errors(reduce_as, "shared_memory", [first, second], reusable=True)
    assert_all_told(failures, "rank 0", "rank 1", *texts)


def test_one_of_four_ranks_is_elsewhere(world4: World) -> None:
    here, there = name(unit="here"), name(unit="there")
    failures = world4.run_expecting_errors(reduce_as, "shared_memory", [here, here, there, here], reusable=True)
    assert_all_told(failures, "'here'", "'there'", "rank 2")


def test_messages_name_both_collectives(own_world: Callable[..., World]) -> None:
    first, second, texts = APART["unit"]
    assert_all_told(
        own_world(2).run_expecting_errors(reduce_as, "messages", [first, second]), "rank 0", "rank 1", *texts
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_check_mode_stops_before_the_collective(world2: World, transport: str) -> None:
    first, second, texts = APART["unit"]
    failures = world2.run_expecting_errors(reduce_as, transport, [first, second], check=True, reusable=True)
    assert_all_told(failures, "rank 0", "rank 1", *texts)


def long_names(transport: str) -> None:
    """However a name meets the end of its place in the header, it equals itself."""
    with connect(transport) as comm:
        for unit in [*("u" * length for length in range(150, 200)), "ü" * 60, "ü" * 100, "ü" * 101]:
            comm.exchange(name(unit=unit), b"")


@pytest.mark.parametrize("transport", IDENTIFYING)
def test_names_of_any_length_equal_themselves(world2: World, transport: str) -> None:
    world2.run(long_names, transport)


@pytest.mark.parametrize("numels", [[64, 65], [64, 100_000]], ids=str)
@pytest.mark.parametrize("transport", IDENTIFYING)
def test_different_sizes_are_an_error(own_world: Callable[..., World], transport: str, numels: list[int]) -> None:
    """The engine compares the ranks' models first; should sizes differ all the same, nobody may read foreign memory."""
    world = own_world(2, grace_seconds=60.0)
    failures = world.run_expecting_errors(reduce_as, transport, [name()] * 2, numels, SHORT_SECONDS)
    told = [failure for failure in failures if failure is not None]
    assert told, "both ranks went on"
    for failure in told:
        assert isinstance(failure.exception, CollectiveError), failure.traceback


def one_rank_ends(transport: str, how: str) -> None:
    with connect(transport) as comm:
        comm.exchange(name("start"), b"")
        if comm.rank == 1:
            if how == "killed":
                os._exit(3)
            return
        buffer = comm.borrow(64, FP32)
        comm.reduce_scatter(name(unit="the_unit"), buffer, [0, 32, 64], torch.empty(32), False).wait()


@pytest.mark.parametrize("transport", IDENTIFYING)
def test_a_rank_that_ended_is_named(own_world: Callable[..., World], transport: str) -> None:
    failures = own_world(2, grace_seconds=60.0).run_expecting_errors(one_rank_ends, transport, "killed")
    assert failures[1] is not None and failures[1].type_name == "ProcessDied"
    assert_all_told(failures[:1], "rank 1", "has ended", "'the_unit'", "step 3")


def test_a_rank_that_closed_its_engine_is_named(world2: World) -> None:
    failures = world2.run_expecting_errors(one_rank_ends, "shared_memory", "closed", reusable=True)
    assert failures[1] is None
    assert_all_told(failures[:1], "rank 1", "has closed its engine", "'the_unit'")


def stand_in_different_places() -> None:
    with connect("shared_memory", timeout=timedelta(seconds=SHORT_SECONDS)) as comm:
        if comm.rank == 0:
            comm.exchange(name("agreement", "", 5), b"")
        else:
            buffer = comm.borrow(64, FP32)
            comm.reduce_scatter(name(unit="the_unit"), buffer, [0, 32, 64], torch.empty(32), False).wait()


def test_a_time_out_says_where_the_others_stand(world2: World) -> None:
    failures = world2.run_expecting_errors(stand_in_different_places, reusable=True)
    assert_all_told(failures)
    first = [failure.message for failure in failures if "waited 1 s in" in failure.message]
    assert any("agreement" in message and "'the_unit'" in message and "waits in" in message for message in first), first


# -- after a pass that was given up


def realigns(num_started: list[int], num_rounds: int) -> list[str]:
    """Rank r starts `num_started[r]` reductions and gives them up; what comes then is right all the same."""
    with connect("shared_memory") as comm:
        cuts = [32 * rank for rank in range(comm.size + 1)]
        mine = comm.my_span(cuts)
        for attempt in range(num_rounds):
            for number in range(num_started[(comm.rank + attempt) % comm.size]):
                buffer = filled(comm, torch.full((cuts[-1],), float("nan")), borrowed=True)
                comm.reduce_scatter(name(unit=f"given up {number}"), buffer, cuts, torch.empty(32), False)
            comm.realign()
            for step in range(3):
                buffers = [values(rank, cuts[-1], FP32, salt=step) for rank in range(comm.size)]
                shard = torch.empty(32)
                buffer = filled(comm, buffers[comm.rank], borrowed=True)
                comm.reduce_scatter(name(unit="after", step=step), buffer, cuts, shard, False).wait()
                comm.give_back(buffer)
                assert torch.equal(shard, naive_mean([other[mine.begin : mine.end] for other in buffers], FP32))
        comm.settle()
        return comm.log


@WORLDS
def test_reductions_given_up_are_forgotten(world: World) -> None:
    world.run(realigns, [2, 0, 1, 3][: world.size], 4)


def test_a_ring_of_given_up_reductions_is_forgotten(world2: World) -> None:
    world2.run(realigns, [200, 0], 3)


def test_what_was_given_up_leaves_no_trace_in_the_log(world2: World) -> None:
    """Ranks compare their logs once a step: what only one of them started must not stop the next step."""
    first, second = world2.run(realigns, [2, 1], 1)
    assert first == second
