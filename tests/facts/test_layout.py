"""The layout's arithmetic, for any sizes: nothing overlaps, nothing is lost, every cut is where it is promised."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.layout import ALIGNMENT, NO_GROUP, Layout, Slot, Span, even_layout, whole_parameter_layout

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""No clock decides: the machine may be busy with other things."""

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple) | st.tuples(st.integers(1, 200))
SLOT_LISTS = st.lists(st.tuples(SHAPES, st.integers(NO_GROUP, 2)), max_size=8).map(
    lambda drawn: [Slot(f"p{index}", shape, group) for index, (shape, group) in enumerate(drawn)]
)
WORLDS = st.integers(1, 8)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    slots, world = draw(SLOT_LISTS), draw(WORLDS)
    return even_layout(slots, world) if draw(st.booleans()) else whole_parameter_layout(slots, [0] * world)


@st.composite
def layouts_with_a_span(draw: st.DrawFn) -> tuple[Layout, Span]:
    layout = draw(layouts())
    begin, end = sorted((draw(st.integers(0, layout.numel)), draw(st.integers(0, layout.numel))))
    return layout, Span(begin, end)


def elements(span: Span) -> set[int]:
    return set(range(span.begin, span.end))


def elements_of(spans: list[Span]) -> set[int]:
    """The union of spans, which must not overlap."""
    union = set().union(*map(elements, spans))
    assert len(union) == sum(span.numel for span in spans), "spans overlap"
    return union


def slot_of_element(layout: Layout) -> dict[int, int]:
    """The naive map that all methods are compared with: element of the buffer -> index of the slot."""
    return {at: index for index, slot in enumerate(layout.slots) for at in range(slot.offset, slot.offset + slot.numel)}


# -- spans


@untimed
@given(*[st.integers(0, 50)] * 4)
def test_the_intersection_of_spans_holds_what_both_hold(a: int, b: int, c: int, d: int) -> None:
    left, right = Span(*sorted((a, b))), Span(*sorted((c, d)))
    common = left.intersect(right)
    assert elements(common) == elements(left) & elements(right)
    assert common.numel == len(elements(common)) >= 0


def test_a_shifted_span_has_as_many_elements() -> None:
    assert Span(3, 10).shift(-3) == Span(0, 7)


# -- slots and cuts


def test_a_small_layout_by_hand() -> None:
    slots = [Slot("bias", (7,), 1), Slot("weight", (5, 7), 0), Slot("scale", (), 1)]
    layout = even_layout(slots, 3)
    assert [(slot.name, slot.offset) for slot in layout.slots] == [("weight", 0), ("bias", 64), ("scale", 96)]
    assert layout.cuts == (0, 64, 128, 192)
    assert list(layout.gaps()) == [Span(35, 64), Span(71, 96), Span(97, 192)]
    assert list(layout.runs(layout.whole, 1000)) == [(0, Span(0, 35)), (1, Span(64, 97))]
    assert [(p.slot, p.within_parameter) for p in layout.pieces(Span(30, 66))] == [(0, Span(30, 35)), (1, Span(0, 2))]


@untimed
@given(layouts())
def test_slots_are_aligned_apart_and_inside(layout: Layout) -> None:
    assert all(slot.offset % ALIGNMENT == 0 for slot in layout.slots)
    assert all(slot.numel == math.prod(slot.shape) for slot in layout.slots)
    assert elements_of([slot.span for slot in layout.slots]) <= elements(layout.whole)


@untimed
@given(SLOT_LISTS, WORLDS)
def test_every_parameter_gets_one_slot(slots: list[Slot], world: int) -> None:
    for layout in (even_layout(slots, world), whole_parameter_layout(slots, [0] * world)):
        assert sorted((s.name, s.shape, s.group) for s in layout.slots) == sorted(
            (s.name, s.shape, s.group) for s in slots
        )


@untimed
@given(layouts())
def test_cuts_rise_from_zero_to_the_end(layout: Layout) -> None:
    assert layout.cuts[0] == 0
    assert list(layout.cuts) == sorted(layout.cuts)
    assert layout.world == len(layout.cuts) - 1
    assert elements_of([layout.shard(rank) for rank in range(layout.world)]) == elements(layout.whole)


@untimed
@given(SLOT_LISTS, WORLDS)
def test_an_even_layout_has_equal_aligned_shards_and_little_padding(slots: list[Slot], world: int) -> None:
    layout = even_layout(slots, world)
    shard = layout.shard(0).numel
    assert shard % ALIGNMENT == 0
    assert [layout.shard(rank).numel for rank in range(world)] == [shard] * world
    filled = sum(-(-slot.numel // ALIGNMENT) * ALIGNMENT for slot in slots)
    assert filled <= layout.numel < filled + world * ALIGNMENT


@untimed
@given(SLOT_LISTS, WORLDS, WORLDS)
def test_an_even_layout_places_parameters_alike_at_every_world(slots: list[Slot], one: int, other: int) -> None:
    assert even_layout(slots, one).slots == even_layout(slots, other).slots


@untimed
@given(SLOT_LISTS, WORLDS)
def test_an_even_layout_lays_groups_together_in_their_given_order(slots: list[Slot], world: int) -> None:
    placed = even_layout(slots, world).slots
    assert [slot.group for slot in placed] == sorted(slot.group for slot in slots)
    for group in {slot.group for slot in slots}:
        assert [s.name for s in placed if s.group == group] == [s.name for s in slots if s.group == group]


# -- whole parameters


@untimed
@given(SLOT_LISTS, WORLDS)
def test_a_whole_parameter_layout_never_cuts_a_parameter(slots: list[Slot], world: int) -> None:
    layout = whole_parameter_layout(slots, [0] * world)
    shards = [layout.shard(rank) for rank in range(world)]
    for slot in layout.slots:
        if slot.numel:
            assert sum(slot.span.intersect(shard) == slot.span for shard in shards) == 1, slot


@untimed
@given(st.lists(SLOT_LISTS, min_size=1, max_size=4), WORLDS)
def test_loads_are_counted_and_balanced_over_several_layouts(units: list[list[Slot]], world: int) -> None:
    loads = [0] * world
    owned = [0] * world
    for slots in units:
        layout = whole_parameter_layout(slots, loads)
        for rank in range(world):
            owned[rank] += sum(piece.within_buffer.numel for piece in layout.pieces(layout.shard(rank)))
        assert loads == owned
    largest = max((slot.numel for slots in units for slot in slots), default=0)
    assert max(loads) - min(loads) <= largest


def test_the_largest_parameter_is_placed_first() -> None:
    """In the given order the last one would land on a rank that has half of the rest already."""
    loads = [0, 0]
    whole_parameter_layout([Slot("a", (50,), 0), Slot("b", (50,), 0), Slot("c", (100,), 0)], loads)
    assert loads == [100, 100]


# -- pieces, gaps, runs


@untimed
@given(layouts_with_a_span())
def test_pieces_are_the_parameters_elements_in_a_span(drawn: tuple[Layout, Span]) -> None:
    layout, span = drawn
    naive = {at: index for at, index in slot_of_element(layout).items() if at in elements(span)}
    found = {}
    for piece in layout.pieces(span):
        assert piece.within_buffer.numel == piece.within_parameter.numel > 0
        assert piece.within_parameter.shift(layout.slots[piece.slot].offset) == piece.within_buffer
        found.update(dict.fromkeys(range(piece.within_buffer.begin, piece.within_buffer.end), piece.slot))
    assert found == naive
    assert elements_of([piece.within_buffer for piece in layout.pieces(span)]) == set(naive)


@untimed
@given(layouts())
def test_parameters_and_gaps_fill_the_buffer(layout: Layout) -> None:
    gaps = list(layout.gaps())
    assert all(gap.numel > 0 for gap in gaps)
    assert elements_of(gaps + [slot.span for slot in layout.slots]) == elements(layout.whole)


@untimed
@given(layouts_with_a_span(), st.integers(1, 200))
def test_runs_cover_each_groups_elements_and_no_others(drawn: tuple[Layout, Span], max_numel: int) -> None:
    layout, span = drawn
    groups = {at: layout.slots[index].group for at, index in slot_of_element(layout).items()}
    runs = list(layout.runs(span, max_numel))
    covered = elements_of([run for _, run in runs])
    assert covered <= elements(span)
    assert {at for at, group in groups.items() if group != NO_GROUP} & elements(span) <= covered
    for group, run in runs:
        assert 0 < run.numel <= max_numel
        assert {groups[at] for at in elements(run) if at in groups} <= {group}, "a run mixes groups"
    ends = [slot.span.end for slot in layout.slots if slot.numel]
    assert all(run.end <= max(ends) for _, run in runs), "a run covers the padding"


@untimed
@given(layouts_with_a_span())
def test_runs_join_neighbours_of_one_group(drawn: tuple[Layout, Span]) -> None:
    layout, span = drawn
    groups = [layout.slots[piece.slot].group for piece in layout.pieces(span)]
    changes = [group for group, _ in itertools.groupby(groups) if group != NO_GROUP]
    assert [group for group, _ in layout.runs(span, layout.numel + 1)] == changes


# -- two layouts of one model


@untimed
@given(SLOT_LISTS, WORLDS, WORLDS)
def test_shards_of_two_worlds_overlap_without_gap_or_double(slots: list[Slot], one: int, other: int) -> None:
    """What a checkpoint written by one world and read by another relies on."""
    written, read = even_layout(slots, one), even_layout(slots, other)
    for rank in range(other):
        wanted = list(read.pieces(read.shard(rank)))
        parts = [
            part for source in range(one) for part in written.pieces(written.shard(source).intersect(read.shard(rank)))
        ]
        for piece in wanted:
            found = [part.within_parameter for part in parts if part.slot == piece.slot]
            assert elements_of(found) == elements(piece.within_parameter)


@pytest.mark.parametrize("world", [1, 3])
def test_a_layout_without_parameters(world: int) -> None:
    for layout in (even_layout([], world), whole_parameter_layout([], [0] * world)):
        assert layout.cuts == (0,) * (world + 1)
        assert list(layout.pieces(layout.whole)) == list(layout.gaps()) == list(layout.runs(layout.whole, 1)) == []
