from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.trace import BEFORE, TOWER, Event, Peak, Trace, rounded_bytes

from .planner.traces import any_trace, small_trace


def test_a_trace_survives_json() -> None:
    trace = small_trace(100)
    assert msgspec.json.decode(msgspec.json.encode(trace), type=Trace) == trace


@pytest.mark.parametrize(("size", "taken"), [(1, 512), (512, 512), (513, 1024)])
def test_sizes_are_rounded_as_the_allocator_does(size: int, taken: int) -> None:
    assert rounded_bytes(size) == taken


def test_places_of_a_part() -> None:
    trace = small_trace(10)
    assert trace.held() == {TOWER, BEFORE, 0, 1, 2, 3}
    assert trace.held(1, 3) == {1, 2}
    assert trace.held(BEFORE, 1) == {BEFORE, 0}
    assert trace.held(BEFORE, 1, has_tower=True) == {TOWER, BEFORE, 0}
    assert trace.held(has_tower=False) == {BEFORE, 0, 1, 2, 3}


def test_the_peak_names_what_is_alive() -> None:
    peak = small_trace(1000).peak(count=2)
    # One layer at work: token numbers, rotary tables, three caches, states twice and the temporary.
    alive = [8 * 1000, 256 * 1000, 128 * 1000, 128 * 1000, 128 * 1000, 1024 * 1000, 1024 * 1000, 4096 * 1000 + 10**6]
    assert peak.size_bytes == sum(map(rounded_bytes, alive))
    assert peak.place == 2
    assert peak.module == "layers.0"
    assert [tensor.size_bytes for tensor in peak.largest] == [rounded_bytes(5_096_000), rounded_bytes(1_024_000)]


def test_the_peak_of_a_later_part_has_copies_of_what_it_is_given() -> None:
    trace = small_trace(1000)
    events = list(trace.of_device(trace.held(1, 2)))
    copies = [(tensor, size) for tensor, size, _ in events if tensor < 0 and size]
    assert [size for _, size in copies] == [256_000, 1_024_000]
    assert {tensor for tensor, size, _ in events if tensor < 0 and not size} == {tensor for tensor, _ in copies}


def test_the_peak_behind_the_prompt() -> None:
    trace = small_trace(1000)
    begin = trace.decode_begin()
    assert trace.events[begin].size_bytes == 128 * 1001
    assert trace.peak(begin=begin).size_bytes < trace.peak(stop=begin).size_bytes == trace.peak().size_bytes
    assert small_trace(1000, more=0).decode_begin() == len(small_trace(1000, more=0).events)


def test_nothing_has_no_peak() -> None:
    empty = Trace(tokens=1, layers=1, modules=("",), events=(), passes=())
    assert empty.peak() == Peak()
    assert small_trace(5).peak(frozenset()) == Peak()


@given(any_trace(), st.data())
def test_a_device_frees_what_it_made_and_nothing_else(trace: Trace, data: st.DataObject) -> None:
    places = frozenset(data.draw(st.sets(st.integers(TOWER, trace.layers))))
    alive: set[int] = set()
    for tensor, size, index in trace.of_device(places):
        event = trace.events[index]
        if size:
            assert tensor not in alive
            assert event == Event(abs(tensor), size if tensor > 0 else -size, event.place, 0)
            alive.add(tensor)
        else:
            alive.remove(tensor)


@given(any_trace())
def test_everything_on_one_device_needs_no_copies(trace: Trace) -> None:
    assert all(tensor > 0 for tensor, _, _ in trace.of_device(trace.held()))
