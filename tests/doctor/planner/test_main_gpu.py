"""A model that begins on another GPU than the main one, to which accelerate moves what it is called with."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import msgspec
import pytest

from vlm_doctor import ModelProfile, Plan, Policy, Training, Workload, load_profile, plan
from vlm_doctor.planner.budget import budgets
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.planner.map_devices import MOST_IN_ORDER, main_number
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.planner.order import Split
from vlm_doctor.planner.problem import Problem, ask
from vlm_doctor.planner.replay import Held
from vlm_doctor.planner.traced import Regimes
from vlm_doctor.planner.traced_footprint import TracedFootprint
from vlm_doctor.planner.traced_replay import TracedProgram
from vlm_doctor.units import GIB, MIB

from .profiles import glm41v_9b, machine
from .traces import small_trace, traces_of

LARGE = Workload(images=2, image_height=2240, image_width=2240, text_tokens=64, new_tokens=2)
PIXELS = 2 * (2240 // 14) ** 2 * 6 * 14**2 * 2
FORWARD = Workload(images=0, text_tokens=1000, logits="forward")
LOGITS = 1000 * 151_552 * 2
ATOMS = len(chain(glm41v_9b()).atoms)


def prices(workload: Workload) -> Footprint:
    profile = glm41v_9b()
    return Footprint(profile, workload, image_load(profile, workload), chain(profile).atoms)


def traced_prices(*, returned_bytes: int = 151_552 * 2) -> TracedFootprint:
    profile = glm41v_9b()
    runs = [
        small_trace(tokens, layers=40, more=0, has_tower=False, returned_bytes=returned_bytes) for tokens in (65, 577, 1089)
    ]
    return TracedFootprint(
        profile, FORWARD, image_load(profile, FORWARD), chain(profile).atoms, traces=traces_of(runs), is_bare=True
    )


def question(profile: ModelProfile, free_gib: list[float], workload: Workload, **policy: Any) -> Problem:
    made, rules = machine(free_gib), Policy(keeps_numbers=True, **policy)
    return ask(profile, workload, rules, made, chain=chain(profile), found=budgets(made, rules))


@pytest.mark.parametrize(("run", "is_main"), [((0, 9), False), ((9, 20), True), ((9, ATOMS), True)])
def test_pixels_are_there_once_more(run: tuple[int, int], is_main: bool) -> None:
    asked = prices(LARGE)
    usual, away = (asked.detail(*run, 64, is_main=main) for main in (None, is_main))
    assert away.total_bytes - usual.total_bytes == PIXELS
    assert away.fragmentation_bytes == usual.fragmentation_bytes
    price = asked.needs(64)
    assert (price(*run, is_main), price(*run)) == (away.total_bytes, usual.total_bytes)
    assert price(*run, not is_main) == price(*run)


@pytest.mark.parametrize("asked", [prices(FORWARD), traced_prices()], ids=["formulas", "traced"])
def test_logits_come_back_to_where_the_caller_may_have_the_prompt(asked: Footprint) -> None:
    """Beside the keys and values of the layers there; where the head is, they are already."""
    usual, away = (asked.detail(9, 12, 1000, is_main=main) for main in (None, True))
    assert away.moment == "the logits come back"
    assert usual.moment != away.moment
    assert away.activations_bytes + away.kv_cache_bytes == pytest.approx(LOGITS + usual.kv_cache_bytes, rel=0.02)
    price = asked.needs(1000)
    assert (price(9, 12, True), price(9, 12)) == (away.total_bytes, usual.total_bytes)
    assert price(9, ATOMS, True) == price(9, ATOMS)


def with_loading(asked: Footprint, loading: int) -> Footprint:
    asked._loading = [loading] * len(asked.atoms)
    return asked


def a_footprint(*, is_traced: bool, is_bare: bool = False) -> Footprint:
    profile, workload = glm41v_9b(), msgspec.structs.replace(LARGE, new_tokens=1)
    parts, images = chain(profile).atoms, image_load(profile, LARGE)
    if not is_traced:
        return Footprint(profile, workload, images, parts, is_bare=is_bare)
    runs = [small_trace(tokens, layers=40, more=0) for tokens in (13001, 13513, 14025)]
    return TracedFootprint(profile, workload, images, parts, traces=traces_of(runs), is_bare=is_bare)


@pytest.mark.parametrize("is_traced", [False, True])
def test_pixels_and_what_is_wasted_count_beside_each_other_where_loading_takes_nearly_as_much(is_traced: bool) -> None:
    """Loading takes more than the work, and less than the work with what the allocator wastes and the pixels."""
    run, weights = (9, 12), a_footprint(is_traced=is_traced).weights_of(9, 12)
    live, used = (
        with_loading(a_footprint(is_traced=is_traced, is_bare=is_bare), 0).needs(64)(*run) - weights
        for is_bare in (True, False)
    )
    assert live + 64 * MIB <= used
    for loading, expected in ((live + 32 * MIB, used + PIXELS), (used + 2 * PIXELS, used + 2 * PIXELS)):
        asked = with_loading(a_footprint(is_traced=is_traced), loading)
        assert asked.needs(64)(*run, True) - weights == expected
        assert asked.needs(64)(*run) - weights == max(used, loading)
        assert asked.detail(*run, 64, is_main=True).total_bytes - weights == expected


STEP = msgspec.structs.replace(LARGE, training=Training(gradient_checkpointing=False))


def test_of_a_training_step_pixels_and_logits_are_on_the_main_gpu_too() -> None:
    asked = prices(msgspec.structs.replace(STEP, text_tokens=4000))
    tokens = 4000 + image_load(asked.profile, STEP).tokens
    usual, away = (asked.detail(9, 12, 4000, is_main=is_main) for is_main in (None, True))
    assert away.moment == "the logits come back" != usual.moment
    live = away.training_bytes + away.activations_bytes
    assert live > tokens * 151_552 * 2 + PIXELS
    begins = asked.needs(4000)
    assert begins(0, 9, False) - begins(0, 9) == PIXELS
    assert begins(9, ATOMS, True) - begins(9, ATOMS) == PIXELS
    assert begins(9, 12, True) - begins(9, 12) <= sum(asked.copied(4000))


def test_a_plan_of_a_training_step_and_the_judge_of_its_map_say_the_same() -> None:
    profile, there = glm41v_9b(), machine([60, 60])
    pinned = Policy(pins=(("model.visual", 1), ("lm_head", 0)), min_gpus=2, keeps_numbers=True)
    made = plan(profile, there, STEP, pinned)
    assert [stage.gpu for stage in made.stages] == [1, 0]
    judged = check_map({key: stage.gpu for stage in made.stages for key in stage.keys}, profile, there, STEP)
    needed = {use.gpu: use.need_bytes for use in judged.devices}
    for stage in made.stages:
        kinds = ("weights", "kv_cache", "activations", "training", "fragmentation")
        assert needed[stage.gpu] == sum(line.size_bytes for line in stage.ledger if line.kind in kinds)


@pytest.mark.parametrize(("free_gib", "is_enough"), [([0.5, 24, 26, 36], True), ([0.5, 24, 24, 36], False)])
def test_logits_of_a_training_step_come_back_to_the_main_gpu(free_gib: list[float], is_enough: bool) -> None:
    workload = msgspec.structs.replace(STEP, images=0, text_tokens=4000)
    asked = question(glm41v_9b(), free_gib, workload, pins=(("model.visual", 2), ("lm_head", 3)), min_gpus=3)
    assert asked.choose_among(asked.counts) is not None
    assert (asked.choose() is not None) == asked.fits() == is_enough


def test_the_allocator_is_asked_for_logits_that_come_back() -> None:
    runs = [small_trace(tokens, layers=3, more=0, has_tower=False, returned_bytes=300_000) for tokens in (65, 577, 1089)]
    program = TracedProgram(Regimes(traces_of(runs), None), ("full", "full", "full"))
    held = Held(kinds=("full",), weights_bytes=0, is_first=False, has_head=False)
    usual, away = (program.peaks(msgspec.structs.replace(held, gets_logits=is_main), 1000)[0] for is_main in (False, True))
    assert away == pytest.approx(300_000_000, rel=0.01)
    assert usual < away


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_plan_and_the_judge_of_its_map_say_the_same(attention: Any) -> None:
    """Both where the allocator is asked (GLM-4.1V has no script here, so by formulas) and where formulas alone tell."""
    workload = msgspec.structs.replace(LARGE, attention="sdpa" if attention == "sdpa" else "eager", images=1)
    profile, there = glm41v_9b(), machine([40, 40])
    pinned = Policy(pins=(("model.visual", 1), ("lm_head", 0)), min_gpus=2, keeps_numbers=True)
    made = plan(profile, there, workload, pinned)
    assert [stage.gpu for stage in made.stages] == [1, 0]
    gpus = {key: stage.gpu for stage in made.stages for key in stage.keys}
    judged = check_map(gpus, profile, there, workload)
    needed = {use.gpu: use.need_bytes for use in judged.devices}
    for stage in made.stages:
        counted = sum(
            line.size_bytes for line in stage.ledger if line.kind in ("weights", "kv_cache", "activations", "fragmentation")
        )
        assert needed[stage.gpu] == pytest.approx(counted, abs=32 * MIB)


def longest(free_gib: list[float], pins: dict[str, int], *, keeps_numbers: bool = True) -> Plan:
    asked = msgspec.structs.replace(LARGE, images=8, image_height=1120, image_width=1120)
    rules = Policy(pins=tuple(pins.items()), min_gpus=2, keeps_numbers=keeps_numbers)
    return plan(glm41v_9b(), machine(free_gib), asked, rules)


def test_a_model_that_begins_on_gpu_1_is_promised_no_more_than_one_that_begins_on_gpu_0() -> None:
    """The same room in the same order; what differs is the numbers, and with them where pixels are."""
    first, other = (
        longest([16, 14], {"model.visual": 0, "lm_head": 1}),
        longest([14, 16], {"model.visual": 1, "lm_head": 0}),
    )
    for made in (first, other):
        assert made.fits
        assert all(line.size_bytes >= 0 for stage in made.stages for line in stage.ledger if line.kind == "left")
    assert first.longest_prompt_tokens is not None
    assert other.longest_prompt_tokens is not None
    assert first.limits is not None
    assert other.limits is not None
    assert 0.8 * first.longest_prompt_tokens < other.longest_prompt_tokens < first.longest_prompt_tokens
    assert other.limits.images is not None
    assert first.limits.images is not None
    assert other.limits.images <= first.limits.images


def test_under_its_own_variable_a_plan_begins_on_device_0_whatever_number_the_machine_gives_it() -> None:
    first, other = (
        longest([16, 14], {"model.visual": 0, "lm_head": 1}, keeps_numbers=False),
        longest([14, 16], {"model.visual": 1, "lm_head": 0}, keeps_numbers=False),
    )
    assert [stage.gpu for stage in other.stages] == [1, 0]
    assert other.cuda_visible_devices == "1,0"
    assert (other.device_map, other.limits) == (first.device_map, first.limits)
    assert other.longest_prompt_tokens == first.longest_prompt_tokens


def of_two(gpus: tuple[int, ...] | None, **fields: Any) -> list[bool | None]:
    """Whether each GPU of a split over GPU 1 and GPU 8 is the main one."""
    made, rules = machine([20] * 12, **fields), Policy(keeps_numbers=True, gpus=gpus)
    parts, found = chain(glm41v_9b()), budgets(made, rules)
    asked = ask(glm41v_9b(), LARGE, rules, made, chain=parts, found=found)
    positions = [[budget.gpu.index for budget in found.usable].index(gpu) for gpu in (1, 8)]
    split = Split(tuple(positions), (20, ATOMS))
    return [asked.is_main(split, stage) for stage in (0, 1)]


@pytest.mark.parametrize(
    ("gpus", "visible", "is_first"),
    [
        (None, None, False),
        ((1, 8), None, True),
        ((8, 1), None, False),
        (None, "1,8", True),
        (None, "8,1", False),
    ],
)
def test_the_main_gpu_is_told_by_the_numbers_of_the_process(
    gpus: tuple[int, ...] | None, visible: str | None, is_first: bool
) -> None:
    """Of 1 and 8, 8 is the first of a set; both begin anew where the process sees these two alone."""
    fields = {} if visible is None else {"environment": {"CUDA_VISIBLE_DEVICES": visible}}
    assert of_two(gpus, **fields) == ([None, None] if is_first else [False, True])


def test_few_numbers_are_in_order_in_a_set() -> None:
    for count in (2, 3, 5):
        assert all(main_number(numbers) == min(numbers) for numbers in permutations(range(MOST_IN_ORDER + 1), count))
    assert main_number((1, MOST_IN_ORDER + 1)) > 1


def test_on_many_gpus_the_highest_number_may_be_the_main_one() -> None:
    asked = question(glm41v_9b(), [20] * 9, FORWARD)
    few = question(glm41v_9b(), [20] * 8, FORWARD)
    left = [[room.capacity_bytes for room in one._less_room.rooms] for one in (asked, few)]
    assert len({*left[0]}) == 1
    assert left[1][-1] - left[1][0] == LOGITS


def test_a_gpu_that_a_lever_adds_has_a_number_behind_the_others() -> None:
    asked = question(glm41v_9b(), [20, 20], LARGE)
    another = msgspec.structs.replace(asked.budgets[0], gpu=msgspec.structs.replace(asked.budgets[0].gpu, index=-1))
    more = msgspec.structs.replace(asked, budgets=(*asked.budgets, another, another))
    assert [more.is_main(Split((2, 1), (20, ATOMS)), stage) for stage in (0, 1)] == [False, True]
    assert [more.is_main(Split((2, 3), (20, ATOMS)), stage) for stage in (0, 1)] == [None, None]


def test_a_corrected_map_is_for_the_numbers_of_the_map() -> None:
    """Number 0 is GPU 1, where the model does not begin: it has the pixels as well."""
    asked = msgspec.structs.replace(LARGE, images=8, image_height=1120, image_width=1120)
    pins = (("model.visual", 0), ("lm_head", 1))
    usual, turned = (
        check_map({"": 0}, glm41v_9b(), machine([16, 14]), asked, Policy(gpus=gpus, pins=pins, min_gpus=2)).best
        for gpus in ((0, 1), (1, 0))
    )
    assert usual is not None
    assert turned is not None
    assert [stage.gpu for stage in usual.stages] == [stage.gpu for stage in turned.stages] == [0, 1]
    assert usual.longest_prompt_tokens is not None
    assert turned.longest_prompt_tokens is not None
    assert turned.longest_prompt_tokens < usual.longest_prompt_tokens


@pytest.mark.parametrize(("free_gib", "gpus"), [([6, 10], [1]), ([10, 6], [0, 1]), ([3, 3], [])])
def test_what_is_offloaded_is_computed_on_the_main_gpu_where_a_plan_begins(free_gib: list[float], gpus: list[int]) -> None:
    """The planner's own map is free of errors: what is in host memory works in the first stage, as accelerate has it."""
    profile, there, asked = glm41v_9b(), machine(free_gib), Workload(text_tokens=2000)
    rules = Policy(offload=True, pins=(("model.visual", free_gib.index(max(free_gib))),))
    checked = check_map({"": 0}, profile, there, asked, rules)
    assert checked.best is not None
    assert (checked.best.fits, [stage.gpu for stage in checked.best.stages] if gpus else []) == (bool(gpus), gpus)
    if gpus:
        assert checked.best.offloaded is not None
        assert checked.corrected is not None
        again = check_map(checked.corrected, profile, there, asked)
        assert not [found for found in again.findings if found.severity == "error"]
        assert len(plan(profile, there, asked, rules).stages) == 2


def test_a_split_that_does_not_begin_on_the_main_gpu_takes_nothing_with_layers_in_host_memory() -> None:
    asked = question(glm41v_9b(), [40, 40], Workload(images=0)).with_offloaded(10)
    ends = (16, len(asked.atoms))
    assert asked.split_fits(Split((0, 1), ends))
    assert not asked.split_fits(Split((1, 0), ends))


def test_where_the_search_left_no_room_for_it_another_split_is_found_or_none() -> None:
    """Memory on the edge: with the numbers exchanged the same cards hold less."""
    profile, edge = glm41v_9b(), []
    for size in range(14 * 64, 14 * 64 + 20):
        asked = question(profile, [size / 64, size / 64], LARGE, pins=(("model.visual", 1), ("lm_head", 0)), min_gpus=2)
        by_search = asked.choose_among(asked.counts)
        chosen = asked.choose()
        edge.append((by_search is not None, chosen is not None))
        if chosen is not None:
            assert asked.split_fits(chosen.split)
            assert by_search is not None
            assert chosen.text_tokens <= by_search.text_tokens
    assert (True, False) in edge
    assert (False, True) not in edge
    assert (edge[0], edge[-1]) == ((False, False), (True, True))


@pytest.mark.parametrize(
    ("free_gib", "gpus", "end"), [([13.0, 16.0], (1, 0), 21), ([13.5, 15.25], (0, 1), 15), ([13.0, 15.25], None, 0)]
)
def test_the_other_split_may_begin_elsewhere(free_gib: list[float], gpus: tuple[int, ...] | None, end: int) -> None:
    asked = question(glm41v_9b(), free_gib, LARGE, min_gpus=2)
    assert asked.choose_among(asked.counts) is not None
    assert asked.fits() == (gpus is not None)
    choice = asked.choose()
    assert (choice and (choice.split.gpus, choice.split.ends[0])) == (gpus and (gpus, end))
    made = plan(glm41v_9b(), machine(free_gib), LARGE, asked.policy)
    assert made.fits == asked.fits()
    if made.shortage is not None:
        assert "lacks 86 MiB on GPU 1" in made.shortage.message
        assert made.shortage.is_permanent
        assert (asked.margin_bytes() or 0) < 0


@pytest.mark.parametrize(("free_gib", "is_enough"), [([0.5, 11.34, 9.18, 6.51], False), ([0.5, 13, 9.5, 8.5], True)])
def test_logits_come_back_to_the_main_gpu_whatever_its_number(free_gib: list[float], is_enough: bool) -> None:
    """GPU 0 takes part in nothing here: GPU 1, in the middle of the model, is the main one."""
    workload = msgspec.structs.replace(FORWARD, text_tokens=4000)
    asked = question(glm41v_9b(), free_gib, workload, pins=(("model.visual", 2), ("lm_head", 3)), min_gpus=3)
    assert asked.choose_among(asked.counts) is not None
    choice = asked.choose()
    assert (choice is not None) == asked.fits() == is_enough
    assert choice is None or [asked.is_main(choice.split, stage) for stage in (0, 1, 2)] == [False, True, False]


def test_the_main_gpu_is_the_lowest_of_the_map_not_of_the_machine() -> None:
    asked = question(glm41v_9b(), [0.5, 16, 16], LARGE, pins=(("model.visual", 2), ("lm_head", 1)))
    choice = asked.choose()
    assert choice is not None
    assert [asked.budgets[gpu].gpu.index for gpu in choice.split.gpus] == [2, 1]
    assert [asked.is_main(choice.split, stage) for stage in (0, 1)] == [False, True]
    usual = question(glm41v_9b(), [0.5, 16, 16], LARGE, pins=(("model.visual", 1), ("lm_head", 2))).choose()
    assert usual is not None
    assert [asked.is_main(usual.split, stage) for stage in (0, 1)] == [None, None]
    assert asked.need(choice.split, 0).total_bytes < 16 * GIB


def test_logits_come_back_to_a_main_gpu_that_has_blocks_of_the_tower_alone() -> None:
    """The plan says of it what the judge of its map says."""
    profile = load_profile("llava-1.5-7b", allow_network=False)
    workload = Workload(images=1, text_tokens=8000, logits="forward")
    rules, made = Policy(min_gpus=3), machine([3, 16, 16])
    parts = chain(profile, breaks_tower=True)
    asked = ask(profile, workload, rules, made, chain=parts, found=budgets(made, rules))
    choice = asked.choose()
    assert choice is not None
    assert choice.split.gpus == (0, 1, 2)
    assert [any(atom.has_embedding for atom in parts.atoms[first:end]) for first, end in choice.split.runs] == [0, 1, 0]
    assert [asked.is_main(choice.split, stage) for stage in (0, 1, 2)] == [True, False, False]
    logits = (8000 + 576) * 32_064 * 2
    needed = asked.need(choice.split, 0)
    assert needed.moment == "the logits come back"
    assert logits < needed.total_bytes < logits + 256 * MIB
    scarce = machine([1.3, 16, 16])
    tight = ask(profile, workload, rules, scarce, chain=parts, found=budgets(scarce, rules))
    assert tight.choose_among(tight.counts) is not None
    assert (tight.choose(), tight.fits()) == (None, False)
