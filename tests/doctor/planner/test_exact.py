"""The whole search against brute force on small models: preferences, pins, faulty links, broken towers, host memory."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vlm_doctor.machine import Host, Machine
from vlm_doctor.model import ModelProfile, TextShape, Unit, VisionShape
from vlm_doctor.planner import plan
from vlm_doctor.planner.budget import budgets
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.fleet import Fleet, Room
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.planner.near import near_best
from vlm_doctor.planner.offload import HOST_RESERVE_BYTES
from vlm_doctor.planner.order import any_split, fastest_split
from vlm_doctor.planner.place import smallest_count
from vlm_doctor.planner.search import choose
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Policy, Preference, Workload

from .brute_force import best_of, holding_splits
from .examples import examples
from .profiles import glm41v_9b, machine, unit

TEXT = TextShape(layers=5, hidden=512, intermediate=2048, heads=8, kv_heads=2, head_dim=64, vocabulary=20_000)
BARE = Policy(context_bytes=0, headroom_fraction=0, headroom_min_bytes=8 * MIB)


def tower(block_mib: list[int]) -> Unit:
    """A vision tower that may be cut between its blocks, as profiles make it."""
    sizes = [("patch_embed", 2, None), *((f"blocks.{n}", size, n) for n, size in enumerate(block_mib)), ("merger", 3, None)]
    parts = tuple(unit(f"tower.{name}", "vision", size * MIB // 2, layer=number) for name, size, number in sizes)
    whole = unit("tower", "vision", sum(part.elements for part in parts))
    return msgspec.structs.replace(whole, parts=parts)


def small(layer_mib: list[int], *, block_mib: list[int] | None = None, tied: bool = False) -> ModelProfile:
    """A small model whose layers differ in size."""
    return glm41v_9b(
        name="small",
        units=(
            tower(block_mib or [80]),
            unit("embed", "embedding", 10 * MIB),
            *(unit(f"layers.{n}", "layer", size * MIB // 2, layer=n) for n, size in enumerate(layer_mib)),
            unit("norm", "norm", 512),
            unit("head", "head", 30 * MIB),
        ),
        text=TEXT,
        vision=VisionShape(layers=2, hidden=256, intermediate=1024, heads=4, patch=14),
        tied=(("embed", "head"),) if tied else (),
    )


def prices(profile: ModelProfile, workload: Workload, *, breaks_tower: bool = False, offloaded: int = 0) -> Footprint:
    atoms = chain(profile, breaks_tower=breaks_tower).atoms
    border = len(atoms) - offloaded
    return Footprint(profile, workload, image_load(profile, workload), atoms[:border], atoms[border:])


class Instance(NamedTuple):
    """A question to the search alone."""

    footprint: Footprint
    fleet: Fleet
    counts: range
    prefer: Preference


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    breaks_tower = draw(st.booleans())
    profile = small(
        draw(st.lists(st.integers(8, 200), min_size=2, max_size=3 if breaks_tower else 5)),
        block_mib=draw(st.lists(st.integers(4, 60), min_size=1, max_size=3)),
        tied=draw(st.booleans()),
    )
    workload = Workload(
        images=draw(st.integers(0, 1)), image_height=280, text_tokens=draw(st.integers(1, 3_000)), new_tokens=8
    )
    offloaded = draw(st.integers(0, 1))
    footprint = prices(profile, workload, breaks_tower=breaks_tower, offloaded=offloaded)
    capacities = draw(st.lists(st.integers(100, 1_500), min_size=1, max_size=3))
    numbers = range(len(capacities))
    pins = draw(st.dictionaries(st.integers(0, len(footprint.atoms) - 1), st.sampled_from(numbers), max_size=2))
    barred = [sum(1 << atom for atom, gpu in pins.items() if gpu != number) for number in numbers]
    rooms = [Room(size * MIB, bits) for size, bits in zip(capacities, barred, strict=True)]
    ranks = {pair: draw(st.sampled_from([None, 0, 1, 1, 2])) for pair in itertools.combinations(numbers, 2)}
    fleet = Fleet(rooms, lambda a, b: ranks[min(a, b), max(a, b)])
    least = draw(st.integers(1, min(2, len(rooms))))
    return Instance(footprint, fleet, range(least, len(rooms) + 1), draw(st.sampled_from(["balanced", "speed", "context"])))


@given(instances())
@settings(max_examples=examples(400), deadline=None)
def test_the_choice_is_that_of_brute_force(instance: Instance) -> None:
    footprint, fleet, counts, prefer = instance
    splits = holding_splits(footprint, fleet, counts, 20_000)
    found = choose(footprint, fleet, counts, 20_000, prefer)
    need = footprint.needs(footprint.workload.text_tokens)
    assert (found is None) == (not splits)
    assert smallest_count(len(footprint.atoms), need, fleet, counts) == min((s.stages for s in splits), default=None)
    if found is None:
        return
    judged = next(s for s in splits if (s.split.gpus, s.split.ends) == (found.split.gpus, found.split.ends))
    assert judged.longest == found.text_tokens
    assert best_of([judged], prefer) == best_of(splits, prefer)
    assert any_split(len(footprint.atoms), need, fleet, judged.stages) in [
        msgspec.structs.replace(s.split, is_exact=True) for s in splits if s.stages == judged.stages
    ]


@given(instances(), st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=examples(80), deadline=None)
def test_near_best_splits_are_all_there_are(instance: Instance, share: float) -> None:
    footprint, fleet, counts, prefer = instance
    choice = choose(footprint, fleet, counts, 20_000, prefer)
    if choice is None:
        return
    near = list(near_best(footprint, fleet, choice, share=share))
    assert near[0] == choice.split
    assert len({(split.gpus, split.ends) for split in near}) == len(near)
    images = footprint.images.tokens
    shortest = max(footprint.workload.text_tokens, int((choice.text_tokens + images) * (1 - share)) - images)
    kind = {position: number for number, members in enumerate(fleet.kinds) for position in members}
    expected = {
        (tuple(kind[gpu] for gpu in s.split.gpus), s.split.ends)
        for s in holding_splits(footprint, fleet, range(len(choice.split.gpus), len(choice.split.gpus) + 1), 20_000)
        if s.longest >= shortest and set(s.split.gpus) == set(choice.split.gpus)
    }
    assert {(tuple(kind[gpu] for gpu in split.gpus), split.ends) for split in near} == expected


def test_more_than_four_stages_keep_their_order() -> None:
    footprint = prices(small([40] * 5), Workload(images=0, text_tokens=10, new_tokens=8))
    fleet = Fleet([(300 + number) * MIB for number in range(4)] + [600 * MIB])
    choice = choose(footprint, fleet, range(5, 6), 1_000)
    assert choice is not None
    near = list(near_best(footprint, fleet, choice, share=1))
    assert len(near) > 1
    assert {split.gpus for split in near} == {choice.split.gpus}


towers = st.tuples(
    st.lists(st.integers(8, 200), min_size=1, max_size=3),
    st.lists(st.integers(4, 120), min_size=1, max_size=3),
    st.lists(st.integers(0, 700), min_size=1, max_size=3),
    st.integers(1, 2_000),
    st.integers(0, 400),
)
Question = tuple[list[int], list[int], list[int], int, int]


def rooms_of(there: Machine, policy: Policy) -> list[Room]:
    return [Room(budget.available_bytes) for budget in budgets(there, policy).usable]


@given(towers, st.booleans())
@settings(max_examples=examples(80), deadline=None)
def test_tower_is_cut_and_layers_leave_the_gpus_only_where_they_must(question: Question, offload: bool) -> None:
    layer_mib, block_mib, free_mib, text_tokens, host_mib = question
    profile = small(layer_mib, block_mib=block_mib)
    workload = Workload(images=1, image_height=280, text_tokens=text_tokens, new_tokens=8)
    policy = msgspec.structs.replace(BARE, offload=offload)
    host = Host(os="Linux", kernel="6", memory_available_bytes=HOST_RESERVE_BYTES + host_mib * MIB)
    there = machine([size / 1024 for size in free_mib], host=host)
    fleet = Fleet(rooms_of(there, policy))
    made = plan(profile, there, workload, policy)

    def fits(footprint: Footprint) -> bool:
        return bool(holding_splits(footprint, fleet, range(1, len(free_mib) + 1), text_tokens))

    whole, broken = (fits(prices(profile, workload, breaks_tower=flag)) for flag in (False, True))
    is_cut = any(key.startswith("tower.") for stage in made.stages for key in stage.keys)
    if whole or broken:
        assert made.fits
        assert made.offloaded is None
        assert is_cut == (not whole)
        return
    weights = {unit.key: unit.stored_bytes for unit in profile.units}
    tail = [["head", "norm"], *([f"layers.{n}"] for n in reversed(range(len(layer_mib))))]
    fewest: dict[bool, list[str]] = {}
    for flag in (False, True):
        for count in range(1, len(tail) + 1):
            keys = [key for keys in tail[:count] for key in keys]
            if sum(weights[key] for key in keys) <= host_mib * MIB and fits(
                prices(profile, workload, breaks_tower=flag, offloaded=count)
            ):
                fewest.setdefault(flag, keys)
    if not offload or not fewest:
        assert not made.fits
        return
    assert made.fits
    assert made.offloaded is not None
    # A whole tower is worth more than a layer on a GPU.
    expected = fewest.get(False, fewest.get(True))
    assert expected is not None
    assert sorted(made.offloaded.keys) == sorted(expected)
    assert is_cut == (False not in fewest)
    assert made.offloaded.host_left_bytes == host_mib * MIB - made.offloaded.weights_bytes
    assert made.offloaded.host_left_bytes >= 0
    assert {key for key, device in made.device_map.items() if device == "cpu"} == set(expected)


@given(towers, st.booleans())
@settings(max_examples=examples(80), deadline=None)
def test_every_parameter_is_placed_once_and_every_gpu_keeps_its_budget(question: Question, offload: bool) -> None:
    layer_mib, block_mib, free_mib, text_tokens, _ = question
    profile = small(layer_mib, block_mib=block_mib)
    there = machine([size / 1024 for size in free_mib])
    workload = Workload(images=1, image_height=280, text_tokens=text_tokens, new_tokens=8)
    made = plan(profile, there, workload, msgspec.structs.replace(BARE, offload=offload))
    for stage in made.stages:
        assert sum(line.size_bytes for line in stage.ledger) == stage.total_bytes
    if not made.fits:
        assert made.device_map == {}
        return
    assert all(stage.left_bytes >= 0 for stage in made.stages)
    parameters = {unit.key: unit.elements for unit in profile.units if not unit.parts}
    parameters.update({part.key: part.elements for unit in profile.units for part in unit.parts})
    for key in parameters:
        assert sum(name in ("", key) or key.startswith(f"{name}.") for name in made.device_map) == 1
    # What follows the tower, bare parameters included, is where the prompt is embedded.
    devices = {
        key: next(d for name, d in made.device_map.items() if name in ("", key) or key.startswith(f"{name}."))
        for key in parameters
    }
    assert devices["tower.merger"] == devices["embed"]
    assert devices["tower.patch_embed"] == devices["tower.blocks.0"]


@given(towers, st.permutations([0, 1, 2]), st.integers(1, 400), st.booleans())
@example(question=([83, 22], [4], [0, 296, 76], 1, 0), order=[0, 2, 1], more_mib=1, offload=False)
@example(question=([83, 18], [4], [0, 298, 76], 1, 0), order=[0, 2, 1], more_mib=1, offload=False)
@settings(max_examples=examples(40), deadline=None)
def test_more_memory_and_other_numbers_change_nothing_for_the_worse(
    question: Question, order: list[int], more_mib: int, offload: bool
) -> None:
    layer_mib, block_mib, free_mib, text_tokens, _ = question
    profile = small(layer_mib, block_mib=block_mib)
    workload = Workload(images=1, image_height=280, text_tokens=text_tokens, new_tokens=8)
    policy = msgspec.structs.replace(BARE, offload=offload)
    before = plan(profile, machine([size / 1024 for size in free_mib]), workload, policy)
    richer = plan(profile, machine([(size + more_mib) / 1024 for size in free_mib]), workload, policy)
    assert richer.fits >= before.fits
    if before.fits and before.offloaded is None:
        assert richer.offloaded is None
    order = [number for number in order if number < len(free_mib)]
    renamed = plan(profile, machine([free_mib[number] / 1024 for number in order]), workload, policy)
    assert renamed.fits == before.fits
    assert (renamed.longest_prompt_tokens, len(renamed.stages)) == (before.longest_prompt_tokens, len(before.stages))
    assert [len(stage.keys) for stage in renamed.stages] == [len(stage.keys) for stage in before.stages] or not before.fits


@given(towers)
@settings(max_examples=examples(40), deadline=None)
def test_the_plan_for_the_gpus_of_a_plan_is_the_same_plan(question: Question) -> None:
    layer_mib, block_mib, free_mib, text_tokens, _ = question
    profile = small(layer_mib, block_mib=block_mib)
    workload = Workload(images=1, image_height=280, text_tokens=text_tokens, new_tokens=8)
    there = machine([size / 1024 for size in free_mib])
    made = plan(profile, there, workload, BARE)
    assume(made.fits)
    again = plan(profile, there, workload, msgspec.structs.replace(BARE, gpus=tuple(stage.gpu for stage in made.stages)))
    assert (again.device_map, again.stages) == (made.device_map, made.stages)


@pytest.mark.parametrize("prefer", ["balanced", "speed", "context"])
def test_gpus_beyond_the_beam_are_still_placed_along_good_links(prefer: Preference) -> None:
    # Sixteen GPUs, no two alike: not all orders can be compared, and the answer still holds.
    footprint = prices(small([60] * 5), Workload(images=0, text_tokens=10, new_tokens=8))
    fleet = Fleet([(300 + number) * MIB for number in range(16)], lambda a, b: (a * 7 + b * 3 + a * b) % 11)
    found = choose(footprint, fleet, range(5, 17), 1_000, prefer)
    assert found is not None
    assert found.split.margin(footprint.needs(10), fleet.rooms) >= 0


def test_many_gpus_with_faulty_links_leave_some_out_rather_than_take_for_ever() -> None:
    fleet = Fleet([(400 + number) * MIB for number in range(12)], lambda a, b: None if (a + b) % 5 == 0 else 1)
    coarse = fleet.rounded()
    footprint = prices(small([30] * 5), Workload(images=0, text_tokens=10, new_tokens=8))
    found = choose(footprint, fleet, range(3, 13), 1_000)
    assert found is not None
    assert found.is_rounded
    assert any(room.capacity_bytes == -1 for room in coarse.rooms)
    assert all(fleet.ranks[a][b] is not None for a, b in itertools.pairwise(found.split.gpus))
    split = fastest_split(len(footprint.atoms), footprint.needs(10), fleet, len(found.split.gpus), width=1)
    assert not split.is_exact
    assert all(fleet.ranks[a][b] is not None for a, b in itertools.pairwise(split.gpus))


def test_a_free_gib_more_is_a_gib_more() -> None:
    there = machine([2])
    assert rooms_of(machine([3]), BARE)[0].capacity_bytes - rooms_of(there, BARE)[0].capacity_bytes == GIB
