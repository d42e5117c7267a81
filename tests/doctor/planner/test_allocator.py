"""The replay of torch's allocator, against its rules and against what a GPU did."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.planner.allocator import Allocator, Block, OutOfMemoryError
from vlm_doctor.units import MIB

HISTORY = json.loads((Path(__file__).parent / "recorded" / "h100-history.json").read_text())


def replay(allocator: Allocator, events: list[int]) -> None:
    blocks: list[Block] = []
    for event in events:
        if event < 0:
            allocator.free(blocks[-1 - event])
        else:
            blocks.append(allocator.make(event))


def test_a_recorded_history_reserves_what_the_gpu_reserved() -> None:
    allocator = Allocator(None, HISTORY["loaded_reserved_bytes"])
    replay(allocator, HISTORY["events"])
    assert allocator.peak_reserved_bytes == pytest.approx(HISTORY["peak_reserved_bytes"], rel=3e-4)
    allocated = HISTORY["loaded_allocated_bytes"] + allocator.peak_allocated_bytes
    assert allocated == pytest.approx(HISTORY["peak_allocated_bytes"], rel=1e-5)


@pytest.mark.parametrize(
    ("size", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (100 * MIB + 1, 102 * MIB),
    ],
)
def test_a_segment_is_as_large_as_torch_makes_it(size: int, reserved: int) -> None:
    allocator = Allocator()
    allocator.make(size)
    assert allocator.reserved_bytes == reserved


def test_the_smallest_block_that_is_large_enough_serves_and_its_rest_stays_free() -> None:
    allocator = Allocator()
    large, small = allocator.make(64 * MIB), allocator.make(32 * MIB)
    allocator.free(large)
    allocator.free(small)
    first = allocator.make(30 * MIB)
    assert first is small
    assert allocator.make(64 * MIB) is large
    assert allocator.reserved_bytes == 96 * MIB
    assert allocator.make(2 * MIB).address == small.address + 30 * MIB


def test_a_rest_of_a_mebibyte_is_not_cut_off() -> None:
    allocator = Allocator()
    whole = allocator.make(32 * MIB)
    allocator.free(whole)
    assert allocator.make(31 * MIB).size == 32 * MIB
    assert allocator.allocated_bytes == 32 * MIB


def test_of_equal_segments_the_last_one_made_has_the_lowest_address() -> None:
    allocator = Allocator()
    blocks = [allocator.make(32 * MIB) for _ in range(3)]
    for block in blocks:
        allocator.free(block)
    assert allocator.make(32 * MIB) is blocks[2]


def test_neighbors_that_are_free_are_joined() -> None:
    allocator = Allocator()
    allocator.free(allocator.make(60 * MIB))
    parts = [allocator.make(20 * MIB) for _ in range(3)]
    for part in (parts[0], parts[2], parts[1]):
        allocator.free(part)
    assert allocator.make(60 * MIB).size == 60 * MIB
    assert allocator.reserved_bytes == 60 * MIB


def test_whole_segments_are_given_back_before_memory_runs_out() -> None:
    allocator = Allocator(100 * MIB)
    allocator.free(allocator.make(60 * MIB))
    allocator.make(80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB


def test_a_segment_with_one_tensor_in_it_is_not_given_back() -> None:
    allocator = Allocator(100 * MIB)
    allocator.free(allocator.make(60 * MIB))
    kept = allocator.make(20 * MIB)
    with pytest.raises(OutOfMemoryError):
        allocator.make(50 * MIB)
    allocator.free(kept)
    assert allocator.make(50 * MIB).size == 50 * MIB


@given(
    st.lists(st.tuples(st.integers(1, 200 * MIB), st.booleans(), st.integers(0, 10**6)), max_size=60),
    st.none() | st.integers(50 * MIB, 2000 * MIB),
)
def test_no_two_tensors_share_memory_and_nothing_is_lost(
    steps: list[tuple[int, bool, int]], capacity_bytes: int | None
) -> None:
    allocator = Allocator(capacity_bytes)
    alive: list[Block] = []
    for size, frees, pick in steps:
        if frees and alive:
            allocator.free(alive.pop(pick % len(alive)))
        else:
            try:
                alive.append(allocator.make(size))
            except OutOfMemoryError:
                assert capacity_bytes is not None
                break
        spans = sorted((block.address, block.address + block.size) for block in alive)
        assert all(before[1] <= behind[0] for before, behind in pairwise(spans))
        assert allocator.allocated_bytes == sum(block.size for block in alive)
        assert allocator.allocated_bytes <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
        assert capacity_bytes is None or allocator.reserved_bytes <= capacity_bytes
    for block in alive:
        allocator.free(block)
    allocator.free(allocator.make(1)) if capacity_bytes is None else None
    assert allocator.allocated_bytes == 0


def test_what_is_freed_twice_is_refused_alone_and_joined_with_its_neighbor() -> None:
    allocator = Allocator()
    before, block, behind = (allocator.make(4 * MIB) for _ in range(3))
    allocator.free(before)
    allocator.free(block)
    for gone in (before, block):
        with pytest.raises(ValueError, match="freed twice"):
            allocator.free(gone)
    assert allocator.allocated_bytes == behind.size
