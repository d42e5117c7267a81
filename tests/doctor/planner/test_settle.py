"""The split that is settled on, against every split there is, each held against the allocator."""

from __future__ import annotations

from functools import cache, partial
from itertools import combinations, permutations
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_doctor.machine import Machine
from vlm_doctor.model import ModelProfile
from vlm_doctor.planner import plan
from vlm_doctor.planner import settle as settling
from vlm_doctor.planner.budget import budgets
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.planner.order import Split
from vlm_doctor.planner.problem import Problem, ask
from vlm_doctor.planner.settle import takes
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.allocation_scripts import body_script
from vlm_doctor.sources.catalogue import catalogue
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Policy, Preference, Workload

from .examples import examples
from .profiles import glm41v_9b, machine

GLM = "zai-org/GLM-4.1V-9B-Thinking"
QWEN = load_profile("Qwen/Qwen2.5-VL-7B-Instruct", allow_network=False)


@cache
def profile_of(name: str) -> ModelProfile:
    return load_profile(name, allow_network=False)


def few_layers(count: int = 6) -> ModelProfile:
    """GLM-4.1V with the true dimensions of everything but fewer layers."""
    known = glm41v_9b(body_script=body_script("glm4v_text"))
    units = tuple(unit for unit in known.units if unit.layer is None or unit.layer < count)
    return msgspec.structs.replace(known, units=units, text=msgspec.structs.replace(known.text, layers=count))


def problem(profile: ModelProfile, made: Machine, *, text_tokens: int = 256, **policy: Any) -> Problem:
    rules = Policy(context_bytes=0, **policy)
    workload = Workload(images=0, text_tokens=text_tokens, new_tokens=8)
    return ask(profile, workload, rules, made, chain=chain(profile), found=budgets(made, rules))


def every_split(asked: Problem, count: int) -> list[Split]:
    atoms = len(asked.atoms)
    return [
        Split(order, (*cuts, atoms))
        for order in permutations(range(len(asked.budgets)), count)
        for cuts in combinations(range(1, atoms), count - 1)
    ]


def reach(asked: Problem, split: Split, step: int) -> int:
    """Most text tokens, in steps, up to which the split takes every prompt."""
    tokens = asked.workload.text_tokens
    if not takes(asked, split, tokens):
        return 0
    while takes(asked, split, tokens + step):
        tokens += step
    return tokens


# Below 4 GiB these few layers reach less than half of what a perfect allocator would: there the choice is not as good.
@given(st.lists(st.floats(4.0, 6.5), min_size=2, max_size=2), st.sampled_from(["balanced", "context"]))
@settings(max_examples=examples(12), deadline=None, derandomize=True)
def test_the_settled_split_runs_and_goes_about_as_far_as_any(free_gib: list[float], prefer: Preference) -> None:
    asked = problem(few_layers(), machine(free_gib), prefer=prefer, min_gpus=2)
    choice = asked.choose()
    bare = asked.bare.choose()
    splits = [split for split in every_split(asked, 2) if takes(asked, split, 256)]
    if choice is None:
        assert not splits
        return
    assert bare is not None
    step = max(1, bare.text_tokens // 40)
    own = reach(asked, choice.split, step)
    # A length is tried each 1.25 % of the longest that a perfect allocator could do, and gaps beside it are looked for:
    # what goes further in long steps has a gap where steps are short.
    most = own + max(2 * step, 0.06 * own)
    further = [split for split in splits if reach(asked, split, step) > most]
    assert all(reach(asked, split, max(1, step // 16)) <= most for split in further)
    assert choice.text_tokens <= bare.text_tokens
    assert takes(asked, choice.split, choice.text_tokens)


def test_where_a_perfect_allocator_would_do_and_torch_would_not_nothing_fits() -> None:
    """Free memory between what lives at once and what torch's segments take."""
    profile = few_layers()
    answers = []
    for free_mib in range(7_000, 7_600, 50):
        asked = problem(profile, machine([free_mib / 1024]), text_tokens=3_000)
        answers.append((asked.bare.choose() is not None, asked.choose() is not None))
    assert (True, False) in answers
    assert (False, True) not in answers
    assert answers[0] == (False, False)
    assert answers[-1] == (True, True)


@pytest.mark.parametrize("free_gib", [[5.0, 4.2], [6.0, 5.5]])
def test_speed_keeps_the_order_of_gpus_that_the_links_decided_and_balance_goes_as_far_as_any(free_gib: list[float]) -> None:
    answers = {}
    for prefer in ("speed", "balanced"):
        asked = problem(few_layers(), machine(free_gib), prefer=prefer, min_gpus=2)
        choice, fastest = asked.choose(), asked.bare.choose()
        assert choice is not None
        assert fastest is not None
        assert takes(asked, choice.split, choice.text_tokens)
        answers[prefer] = choice
        if prefer == "speed":
            assert choice.split.gpus == fastest.split.gpus
    assert answers["balanced"].text_tokens >= answers["speed"].text_tokens


@pytest.mark.parametrize("free_gib", [[2.4, 2.4, 2.4, 3.3], [2.4, 2.4, 0.9, 3.3, 2.4]])
def test_beyond_three_stages_the_borders_are_moved_by_one(free_gib: list[float]) -> None:
    made = machine(free_gib)
    asked = problem(few_layers(5), made, min_gpus=len(free_gib))
    choice = asked.choose()
    assert choice is not None
    assert len(choice.split.gpus) == len(free_gib)
    assert takes(asked, choice.split, choice.text_tokens)


def test_the_need_of_a_stage_is_the_least_memory_in_which_it_runs() -> None:
    asked = problem(few_layers(), machine([8.0]), text_tokens=3_000)
    choice = asked.choose()
    assert choice is not None
    need = asked.need(choice.split, 0)
    assert asked.replay is not None
    run = choice.split.runs[0]
    assert need.fragmentation_bytes > 0
    assert asked.replay.runs(run, 0, 3_000, need.total_bytes)
    assert need.total_bytes <= asked.fleet.rooms[0].capacity_bytes
    # A need has no gap below it that the halving could have stepped over by much.
    assert not any(asked.replay.runs(run, 0, 3_000, need.total_bytes - less * MIB) for less in range(32, 320, 32))


def test_what_is_reserved_is_bounded_by_the_memory_there_is() -> None:
    asked = problem(few_layers(), machine([8.0]), text_tokens=3_000)
    choice = asked.choose()
    assert choice is not None
    assert asked.replay is not None
    run = choice.split.runs[0]
    ample = asked.need(choice.split, 0)
    assert ample.reserved_bytes is not None
    assert ample.total_bytes < ample.reserved_bytes

    tight = asked.replay.need(run, 0, ample.total_bytes)

    assert tight.reserved_bytes is not None
    assert tight.reserved_bytes <= ample.total_bytes
    assert tight.total_bytes <= ample.total_bytes


def test_pixels_are_on_the_first_gpu_of_torch_too_wherever_the_model_begins() -> None:
    """Accelerate's hook takes them there, and the tower's own takes them from there."""
    images = Workload(images=1, image_height=2240, image_width=2240, text_tokens=64, new_tokens=2)
    pixels = (2240 // 14) ** 2 * 6 * 14**2 * 2

    def least(position: int, run: tuple[int, int], *, is_main: bool | None) -> int:
        rules = Policy(context_bytes=0)
        made = machine([24.0, 24.0])
        asked = ask(QWEN, images, rules, made, chain=chain(QWEN), found=budgets(made, rules))
        assert asked.replay is not None
        takes = partial(asked.replay.runs, run, position, 64, is_main=is_main)
        return next(size for size in range(4 * GIB, 24 * GIB, 8 * MIB) if takes(size))

    atoms = len(chain(QWEN).atoms)
    for position, run in ((1, (0, 9)), (0, (9, atoms))):
        more = least(position, run, is_main=position == 0) - least(position, run, is_main=None)
        assert 0.8 * pixels < more < 1.5 * pixels
    assert least(1, (9, atoms), is_main=False) == least(1, (9, atoms), is_main=None)


@pytest.mark.parametrize("is_main", [None, True, False])
@pytest.mark.parametrize("run", [(0, 15), (15, 30), (27, 29)])
def test_a_stage_runs_in_what_it_is_said_to_need_wherever_the_model_begins(
    run: tuple[int, int], is_main: bool | None
) -> None:
    """Many pixels on a GPU whose own work leaves little that they could take the place of."""
    images = Workload(images=8, image_height=1120, image_width=1120, text_tokens=64, batch=4)
    made = machine([40.0, 40.0])
    asked = ask(QWEN, images, Policy(), made, chain=chain(QWEN), found=budgets(made, Policy()))
    assert asked.replay is not None
    need = asked.replay.need(run, 0, 38 * GIB, is_main=is_main)
    assert asked.replay.runs(run, 0, 64, need.total_bytes, is_main=is_main)
    # What it takes is not less than what it needs.
    assert need.reserved_bytes is not None
    assert need.total_bytes - settling.SLACK_BYTES <= need.reserved_bytes
    tight = asked.replay.need(run, 0, need.total_bytes, is_main=is_main)
    assert tight.reserved_bytes is not None
    assert need.total_bytes - 2 * settling.SLACK_BYTES <= tight.reserved_bytes <= need.total_bytes


MACHINES = (("80GiB", 0), ("2x24GiB", 1), ("4x80GiB", 2))


@pytest.mark.parametrize(("spec", "images"), MACHINES)
@pytest.mark.parametrize("name", list(catalogue()))
def test_every_model_of_the_catalogue_is_planned(name: str, spec: str, images: int) -> None:
    made = plan(profile_of(name), load_machine(spec), Workload(images=images, text_tokens=64))
    assert made.fits == (made.shortage is None)
    assert made.fits or all(stage.total_bytes <= 24 * GIB for stage in made.stages) or "72B" in name


@pytest.mark.parametrize(("gap", "longest"), [((), 1000), ((998,), 996), ((998, 996, 994, 992), 990)])
def test_few_lengths_above_what_is_wanted_are_all_tried(
    monkeypatch: pytest.MonkeyPatch, gap: tuple[int, ...], longest: int
) -> None:
    """A prompt that is hardly longer than what is wanted: there are fewer lengths between them than are usually tried."""
    monkeypatch.setattr(settling, "takes_anyway", lambda _problem, _split, tokens: tokens not in gap)
    problem: Any = None
    assert settling._without_gaps(problem, problem, 1000, 990) == longest


def test_a_stage_that_runs_in_less_than_it_takes_to_load_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with joined experts, which exist twice while they are loaded."""
    loading = 3 * GIB
    monkeypatch.setattr(Footprint, "loading_of", lambda *_: loading)
    roomy = problem(few_layers(), machine([40]))
    choice = roomy.choose()
    assert choice is not None
    need = roomy.need(choice.split, 0)
    assert need.moment == "the weights are loaded"
    assert need.kv_cache_bytes + need.activations_bytes == loading
    assert need.reserved_bytes is not None
    assert need.reserved_bytes >= need.weights_bytes + loading
    least = (need.weights_bytes + loading) / GIB
    assert problem(few_layers(), machine([least + 0.1]), headroom_fraction=0.0, headroom_min_bytes=0).choose() is not None
    assert problem(few_layers(), machine([least - 0.1]), headroom_fraction=0.0, headroom_min_bytes=0).choose() is None
