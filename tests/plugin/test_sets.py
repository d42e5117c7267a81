"""Sets of GPUs are disjoint, large enough, and nobody's that CUDA hides. Pure functions, so laws are tested."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vlmgpu.leasing.sets import Demand, Need, by_preference, cover, demands_of, divide, owners_of, total_demand
from pytest_vlmgpu.options import GpuChoice
from pytest_vlmgpu.requirements import Requirements, VlmSpec
from vlm_doctor.machine import Driver, Gpu, Machine
from vlm_doctor.units import GIB

A = VlmSpec("org/a")


def machine(*free_gib: int, capability: tuple[int, int] = (8, 9)) -> Machine:
    gpus = tuple(
        Gpu(
            index=index,
            uuid=f"GPU-{index}",
            name="L4",
            bus_id=f"0000:0{index}:00.0",
            memory_total_bytes=24 * GIB,
            memory_free_bytes=size * GIB,
            compute_capability=(7, 0) if index == 9 else capability,
        )
        for index, size in enumerate(free_gib)
    )
    return Machine(origin="live", description="", gpus=gpus, driver=Driver(nvml_state="ok"))


def planner(count: int, *, fits: bool = True) -> Any:
    def plan_of(spec: VlmSpec, machine: Machine, gpus: tuple[int, ...]) -> Any:
        return SimpleNamespace(fits=fits, stages=[SimpleNamespace(gpu=index) for index in gpus[-count:]])

    return plan_of


def demand(need: Need, found: Machine, plan_of: Any = None) -> list[Demand]:
    return demands_of(need, found, GpuChoice(), plan_of or (lambda *_: None))


gpu_names = st.lists(st.integers(0, 30).map("GPU-{}".format), unique=True, max_size=16)


@given(gpu_names, st.lists(st.integers(0, 20), max_size=12), st.integers(1, 20))
def test_sets_are_disjoint_complete_and_large_enough(gpus: list[str], sizes: list[int], workers: int) -> None:
    sets = divide(gpus, sizes, workers)

    assert len(sets) == workers
    assert [name for names in sets for name in names] == gpus, "a GPU is lost, or has two workers"
    filled = [names for names in sets if names]
    assert sets[: len(filled)] == filled, "a worker without GPUs comes before one with"
    if gpus:
        assert len(sets[0]) >= min(max(sizes, default=0), len(gpus)), "no worker can run the largest group"


@pytest.mark.parametrize(
    ("gpus", "sizes", "workers", "counts"),
    [
        (2, [1, 1], 2, [1, 1]),
        (8, [1, 1], 2, [4, 4]),
        (8, [1] * 9, 3, [3, 3, 2]),
        (2, [2, 1, 1], 2, [2, 0]),
        (3, [2, 1, 1], 3, [2, 1, 0]),
        (4, [2, 1, 1], 2, [2, 2]),
        (1, [1, 1], 2, [1, 0]),
        (2, [1], 2, [2, 0]),
        (2, [], 2, [2, 0]),
        (0, [1], 2, [0, 0]),
        (2, [5], 1, [2]),
    ],
)
def test_how_many_gpus_each_worker_gets(gpus: int, sizes: list[int], workers: int, counts: list[int]) -> None:
    assert [len(names) for names in divide([f"GPU-{n}" for n in range(gpus)], sizes, workers)] == counts


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), max_size=12),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_every_group_has_one_owner_that_can_run_it(groups: list[tuple[int, int]], counts: list[int]) -> None:
    gpus = list(range(sum(counts)))
    sets = [gpus[sum(counts[:n]) : sum(counts[: n + 1])] for n in range(len(counts))]
    demands = {number: [Demand(size, tuple(gpus))] for number, (size, _) in enumerate(groups)}

    owners = owners_of(demands, {number: tests for number, (_, tests) in enumerate(groups)}, sets)

    assert owners.keys() == demands.keys()
    for number, owner in owners.items():
        assert len(sets[owner]) >= min(demands[number][0].gpus, max(map(len, sets)))


def test_work_is_spread_and_goes_where_it_can_be_done() -> None:
    one = {number: [Demand(1, (0, 1))] for number in range(4)}
    assert sorted(owners_of(one, {0: 5, 1: 5, 2: 1, 3: 1}, [[0], [1]]).values()) == [0, 0, 1, 1]
    # Only GPU 1 is new enough for the second group.
    assert owners_of({0: [Demand(1, (0, 1))], 1: [Demand(1, (1,))]}, {0: 1, 1: 9}, [[0], [1]]) == {0: 0, 1: 1}
    # Nobody can: the largest says why.
    assert owners_of({0: [Demand(3, (0, 1, 2))]}, {0: 1}, [[0], [1, 2]]) == {0: 1}
    # Without GPUs (the CPU) everybody can.
    assert sorted(owners_of({0: (), 1: ()}, {0: 1, 1: 1}, [(), ()]).values()) == [0, 1]


def test_a_demand_is_what_markers_and_plan_say_together() -> None:
    found = machine(20, 20, 20, 20)
    plain = Need((), (Requirements(),))

    assert demand(plain, found) == [Demand(1, (0, 1, 2, 3))]
    assert demand(Need((), (Requirements(gpus=2),)), found)[0].gpus == 2
    assert demand(Need((), (Requirements(total_vram_bytes=50 * GIB),)), found)[0].gpus == 3
    assert demand(Need((), (Requirements(), Requirements(gpus=3))), found)[0].gpus == 3
    assert demand(Need((), (Requirements(),), takes_all=True), found)[0].gpus == 4
    assert demand(Need((VlmSpec("org/a", min_gpus=2),), (Requirements(),)), found)[0].gpus == 2
    assert demand(Need((A,), (Requirements(),)), found, planner(2)) == [Demand(2, (0, 1, 2, 3), (2, 3))]
    assert demand(Need((A,), (Requirements(),)), found, planner(2, fits=False)) == [Demand(1, (0, 1, 2, 3))]


def test_tests_that_will_not_run_demand_nothing() -> None:
    assert demand(Need((), (Requirements(gpus=5),)), machine(20, 20)) == []
    assert demand(Need((), (Requirements(gpus=5), Requirements())), machine(20, 20)) == [Demand(1, (0, 1))]


def test_what_no_gpu_meets_together_counts_one_by_one() -> None:
    found = machine(*[20] * 10)
    old = Requirements(vram_bytes=20 * GIB)
    new = Requirements(capability=(8, 0), gpus=10)

    demands = demand(Need((A,), (old, Requirements(gpus=10))), found)
    assert [each.gpus for each in demands] == [10]
    assert demand(Need((A,), (new, Requirements(gpus=10))), found) == [Demand(10, tuple(range(10)))]


def test_contradicting_tests_each_get_their_gpu() -> None:
    large = Gpu(
        index=0,
        uuid="GPU-0",
        name="V100",
        memory_total_bytes=32 * GIB,
        memory_free_bytes=32 * GIB,
        compute_capability=(7, 0),
    )
    new = Gpu(
        index=1, uuid="GPU-1", name="L4", memory_total_bytes=22 * GIB, memory_free_bytes=22 * GIB, compute_capability=(8, 9)
    )
    found = Machine(
        origin="live",
        description="",
        gpus=(large, new),
        driver=Driver(nvml_state="ok"),
        environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    )
    need = Need((A,), (Requirements(vram_bytes=30 * GIB), Requirements(capability=(8, 0))))

    demands = demand(need, found)

    assert [(each.gpus, each.able) for each in demands] == [(1, (0,)), (1, (1,))]
    assert cover([0, 1], demands) == [0, 1]


def test_the_freest_gpus_come_first_unless_a_plan_wants_others() -> None:
    found = machine(5, 20, 20)

    assert by_preference([0, 1, 2], [], found) == [1, 2, 0]
    assert by_preference([0, 1, 2], [Demand(1, (0, 1, 2), (2,))], found) == [2, 1, 0]


@given(
    st.lists(st.tuples(st.integers(1, 4), st.sets(st.integers(0, 7), min_size=4)), max_size=6), st.permutations(range(8))
)
def test_a_cover_meets_every_demand_with_gpus_in_the_order_of_preference(
    wanted: list[tuple[int, set[int]]], ranked: list[int]
) -> None:
    demands = [Demand(count, tuple(sorted(able))) for count, able in wanted]

    chosen = cover(ranked, demands)

    assert all(each.is_met_by(chosen) for each in demands)
    assert chosen == [index for index in ranked if index in chosen]
    assert len(chosen) <= sum(each.gpus for each in demands)


def test_workers_can_use_the_largest_needs_at_once() -> None:
    demands = [Demand(1), Demand(2), Demand(1)]

    assert [total_demand(demands, workers) for workers in (1, 2, 3, 9)] == [2, 3, 4, 4]
