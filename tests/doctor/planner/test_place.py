"""The search against brute force: every ordered subset of the GPUs, every contiguous cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_doctor.planner.fleet import MAX_SETS, Fleet, Room, no_preference
from vlm_doctor.planner.order import Split, even_out, fastest_split
from vlm_doctor.planner.place import Need, extend, extents, largest, smallest_count

from .brute_force import all_splits
from .examples import examples


def priced(weights: Sequence[int], anchor: int, peak: int) -> Need:
    """A price like a model's: weights add up, working memory counts once, and the first stage has its own."""

    def need(first: int, end: int) -> int:
        own = weights[first:end]
        return sum(own) + max(own) * peak + (anchor if first == 0 else 0)

    return need


def best_by_force(atoms: int, need: Need, capacities: Sequence[int], count: int) -> list[Split]:
    return [
        split for split in all_splits(atoms, len(capacities), count) if split.margin(need, Fleet(capacities).rooms) >= 0
    ]


instances = st.tuples(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(0, 8),
    st.integers(0, 2),
)


@given(instances)
@settings(max_examples=examples(300), deadline=None)
def test_the_fewest_gpus_are_those_of_brute_force(instance: tuple[list[int], list[int], int, int]) -> None:
    weights, capacities, anchor, peak = instance
    need, atoms = priced(weights, anchor, peak), len(weights)
    for least in range(1, len(capacities) + 1):
        counts = range(least, len(capacities) + 1)
        expected = next((count for count in counts if best_by_force(atoms, need, capacities, count)), None)
        assert smallest_count(atoms, need, Fleet(capacities), counts) == expected


@given(instances, st.lists(st.integers(0, 3), min_size=6, max_size=6))
@settings(max_examples=examples(300), deadline=None)
def test_links_are_as_fast_as_those_of_brute_force(
    instance: tuple[list[int], list[int], int, int], ranks: list[int]
) -> None:
    weights, capacities, anchor, peak = instance
    need, atoms = priced(weights, anchor, peak), len(weights)
    table = dict(zip(itertools.combinations(range(4), 2), ranks, strict=True))

    def rank(a: int, b: int) -> int:
        return table[min(a, b), max(a, b)]

    def total(split: Split) -> int:
        return sum(rank(a, b) for a, b in itertools.pairwise(split.gpus))

    for count in range(1, len(capacities) + 1):
        possible = best_by_force(atoms, need, capacities, count)
        if not possible:
            continue
        found = fastest_split(atoms, need, Fleet(capacities, rank), count)
        assert found.is_exact
        assert found.margin(need, Fleet(capacities).rooms) >= 0
        assert len(set(found.gpus)) == len(found.gpus) == count
        assert total(found) == min(map(total, possible))
        narrow = fastest_split(atoms, need, Fleet(capacities, rank), count, width=1)
        assert narrow.margin(need, Fleet(capacities).rooms) >= 0


@given(instances)
@settings(max_examples=examples(200), deadline=None)
def test_evening_out_keeps_a_split_valid_and_never_lowers_its_margin(
    instance: tuple[list[int], list[int], int, int],
) -> None:
    weights, capacities, anchor, peak = instance
    need, atoms = priced(weights, anchor, peak), len(weights)
    for count in range(1, len(capacities) + 1):
        rooms = Fleet(capacities).rooms
        for split in best_by_force(atoms, need, capacities, count)[:3]:
            evened = even_out(split, need, rooms)
            assert evened.gpus == split.gpus
            assert evened.margin(need, rooms) >= split.margin(need, rooms)


def test_evening_out_moves_layers_to_the_emptier_neighbor() -> None:
    need = priced([1] * 9, 0, 0)
    evened = even_out(Split((0, 1, 2), (3, 8, 9)), need, Fleet([5, 9, 9]).rooms, lambda _: True)
    assert evened.ends == (1, 5, 9)


def test_evening_out_does_nothing_that_is_not_allowed() -> None:
    need = priced([1] * 9, 0, 0)
    split = Split((0, 1), (8, 9))
    assert even_out(split, need, Fleet([9, 9]).rooms, lambda _: False) == split


def test_extents_and_prefixes_skip_atoms_that_fit_nowhere_on_a_gpu() -> None:
    stage = extents(4, priced([1, 9, 1, 1], 0, 0), Room(2))
    assert stage.ends == [1, 1, 4, 4]
    assert stage.begins == 0b1101
    assert extend(0b0001, stage) == 0b00010
    assert extend(0b0010, stage) == 0
    assert extend(0b0101, stage) == 0b11010


def test_gpus_that_differ_in_capacity_or_links_are_not_interchangeable() -> None:
    pairs = {(0, 1): 0, (2, 3): 0}

    def rank(a: int, b: int) -> int:
        return pairs.get((min(a, b), max(a, b)), 5)

    assert Fleet([8, 8, 8, 8], rank).kinds == [(0, 1), (2, 3)]
    assert Fleet([8, 8, 8, 8]).kinds == [(0, 1, 2, 3)]
    assert Fleet([8, 9, 8, 8], no_preference).kinds == [(0, 2, 3), (1,)]


def test_a_search_that_dropped_every_way_through_gives_the_links_up_and_says_so() -> None:
    # Only the order 1, 0 holds; a beam of one state keeps the wrong last GPU.
    need = priced([5, 1, 1], 0, 0)
    found = fastest_split(3, need, Fleet([2, 5, 5]), 2, width=1)
    assert not found.is_exact
    assert found.margin(need, Fleet([2, 5, 5]).rooms) >= 0


def test_no_broken_link_is_used_even_where_every_kept_way_was_a_dead_end() -> None:
    # GPUs 0 and 1 must not be neighbors, so that 2 stands between them; a beam of one state begins without it.
    ranks = {(0, 1): None, (0, 2): 0, (1, 2): 1}
    fleet = Fleet([2, 3, 3], lambda a, b: ranks[min(a, b), max(a, b)])
    need = priced([1, 1, 1], 0, 0)
    found = fastest_split(3, need, fleet, 3, width=1)
    assert found.gpus[1] == 2
    assert not found.is_exact
    assert found.margin(need, fleet.rooms) >= 0


def test_many_different_capacities_are_rounded_down_just_enough() -> None:
    few = [10 * 2**30 + number for number in range(10)]
    assert Fleet(few).rounded().rooms == Fleet(few).rooms
    many = [10 * 2**30 + number * 2**25 for number in range(16)]
    coarse = [room.capacity_bytes for room in Fleet(many).rounded().rooms]
    assert all(0 <= capacity - low < 2**30 for capacity, low in zip(many, coarse, strict=True))
    assert len(set(coarse)) < 16
    assert MAX_SETS == 1024


@pytest.mark.parametrize("answer", [0, 1, 2, 6, 7, 99, 100])
def test_the_largest_number_that_holds_is_found(answer: int) -> None:
    assert largest(0, 100, lambda number: number <= answer) == answer


def test_sixteen_equal_gpus_are_taken_from_the_first() -> None:
    need = priced([9, *[2] * 80, 3], 4, 1)
    assert smallest_count(82, need, Fleet([24] * 16), range(1, 17)) == 9
    assert fastest_split(82, need, Fleet([24] * 16), 9).gpus == tuple(range(9))
