from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_doctor.errors import UsageError
from vlm_doctor.machine import Link, LinkPath, Machine
from vlm_doctor.model import ModelProfile, TextShape
from vlm_doctor.placement import Plan
from vlm_doctor.planner import plan
from vlm_doctor.planner.budget import WORKSPACE_BYTES
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.fleet import Room
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.planner.search import MARGIN_STEP, longest_text_tokens
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Policy, Preference, Workload

from .brute_force import all_splits
from .examples import examples
from .profiles import BODY, glm41v_9b, gpu, machine, qwen25_vl_72b, unit, with_transformers

PREFERENCES: tuple[Preference, ...] = ("balanced", "speed", "context")
BARE = Policy(headroom_fraction=0, headroom_min_bytes=0, context_bytes=0)


def layers_of(made: Plan) -> list[int]:
    return [sum(".layers." in key for key in stage.keys) for stage in made.stages]


def test_a_model_that_fits_one_gpu_stays_on_it() -> None:
    made = plan(glm41v_9b(), machine([23.5, 23.5]))
    assert made.fits
    assert made.device_map == {"": 0}
    assert [stage.gpu for stage in made.stages] == [0]
    assert made.cuts == ()
    assert made.cuda_visible_devices == "0"
    assert made.prompt_tokens == 512 + 1296
    assert made.image_tokens == 1296
    assert made.reasons == (
        "One GPU is enough, and a model on one GPU answers fastest.",
        "None of the 2 GPUs that could be used takes a longer prompt than GPU 0.",
    )


def test_the_roomier_gpu_is_taken_and_named_by_its_uuid_on_a_real_machine() -> None:
    recorded = msgspec.structs.replace(machine([23.5, 40]), origin="recorded")
    made = plan(glm41v_9b(), recorded)
    assert [stage.gpu for stage in made.stages] == [1]
    assert made.cuda_visible_devices == "GPU-00000001-0000-0000-0000-000000000000"
    assert made.device_map == {"": 0}


def test_the_only_gpu_needs_no_comparison() -> None:
    assert plan(glm41v_9b(), machine([23.5])).reasons == ("One GPU is enough, and a model on one GPU answers fastest.",)


def test_a_partly_taken_gpu_gets_few_layers_where_auto_halves_the_model() -> None:
    taken = machine([12, 23.5], total_gib=24)
    made = plan(glm41v_9b(), taken, Workload(images=0, text_tokens=24_000), BARE)
    assert made.fits
    assert [stage.gpu for stage in made.stages] == [1, 0]
    assert made.cuda_visible_devices == "1,0"
    assert layers_of(made) == [32, 8]
    # Measured with such cards: 11,419 tokens for accelerate's map, 36,667 for the best contiguous one that begins on the
    # smaller card, 39,462 for this one (test_measured.py).
    assert made.longest_prompt_tokens == 37_435
    (cut,) = made.cuts
    assert (cut.before, cut.after, cut.link) == (f"{BODY}.layers.31", f"{BODY}.layers.32", "?")
    assert cut.reason == (
        "GPU 1 has 23.5 GiB free and takes the vision tower, the embedding and 32 layers: "
        "with one layer more a prompt of 37,435 tokens would not fit."
    )
    assert made.reasons == (
        "2 GPUs are needed: one GPU would lack 1.4 GiB.",
        "Vision tower, projector and token embedding stay on one GPU: image features are written into the embeddings.",
    )


def test_every_unit_has_one_key_and_stages_number_the_visible_devices() -> None:
    profile = qwen25_vl_72b()
    made = plan(profile, machine([23.5] * 8))
    assert made.fits
    assert list(made.device_map) == [unit.key for unit in profile.units]
    assert list(made.device_map.values()) == sorted(made.device_map.values())
    assert set(made.device_map.values()) == set(range(len(made.stages)))
    assert made.cuda_visible_devices == "0,1,2,3,4,5,6"
    assert sorted(made.max_memory) == list(range(7))
    assert made.reasons[1].startswith(
        "No choice of 7 among the 8 GPUs that could be used takes a longer prompt than GPUs 0,"
    )


def test_no_key_lies_inside_another() -> None:
    keys = list(plan(qwen25_vl_72b(), machine([23.5] * 8)).device_map)
    assert not [(a, b) for a, b in itertools.permutations(keys, 2) if b.startswith(f"{a}.")]


def test_max_memory_is_what_weights_may_take() -> None:
    made = plan(glm41v_9b(), machine([12, 16]))
    for position, stage in enumerate(made.stages):
        weights = sum(line.size_bytes for line in stage.ledger if line.kind == "weights")
        assert made.max_memory[position] == weights + stage.left_bytes


def test_the_ledger_names_the_parts() -> None:
    taken = machine([30], total_gib=40)
    (stage,) = plan(glm41v_9b(), taken, Workload(batch=2, new_tokens=88)).stages
    assert [(line.kind, line.label) for line in stage.ledger] == [
        ("driver", "driver and firmware"),
        ("others", "other processes"),
        ("context", "CUDA context and libraries"),
        ("workspace", "cuBLAS workspace"),
        ("weights", "weights: vision tower"),
        ("weights", "weights: embedding"),
        ("weights", "weights: 40 layers"),
        ("weights", "weights: final norm"),
        ("weights", "weights: head"),
        ("kv_cache", "KV cache of 1,896 tokens x 2"),
        ("activations", "activations, largest while a layer reads the prompt"),
        ("fragmentation", "allocator fragmentation"),
        ("headroom", "headroom"),
        ("left", "left"),
    ]
    assert stage.peak_bytes == sum(
        line.size_bytes for line in stage.ledger if line.kind in ("workspace", "weights", "kv_cache", "activations")
    )


@pytest.mark.parametrize(
    ("profile", "workload", "source"),
    [
        (glm41v_9b(), Workload(), "safetensors headers, loaded in bfloat16"),
        (glm41v_9b(), Workload(quantization="nf4"), "safetensors headers, loaded in nf4"),
        (glm41v_9b(quantization="awq"), Workload(), "safetensors headers"),
    ],
)
def test_the_ledger_says_how_weights_are_loaded(profile: ModelProfile, workload: Workload, source: str) -> None:
    made = plan(profile, machine([60]), workload)
    assert {line.source for line in made.stages[0].ledger if line.kind == "weights"} == {source}
    assert made.needs_quantization == (profile.quantization or workload.quantization)


def test_spreading_is_asked_for_by_the_policy() -> None:
    made = plan(glm41v_9b(), machine([80, 80, 80]), policy=Policy(min_gpus=3))
    assert len(made.stages) == 3
    assert made.reasons[0] == "3 GPUs because the policy asks for at least 3."
    assert made.reasons[1].startswith("Vision tower, projector and token embedding stay on one GPU")


def test_context_takes_more_gpus_for_a_longer_prompt_and_speed_the_fewest() -> None:
    there = machine(
        [30, 30, 30], links=[Link(a=0, b=1, path="PIX"), Link(a=0, b=2, path="SYS"), Link(a=1, b=2, path="SYS")]
    )
    made = {prefer: plan(glm41v_9b(), there, policy=Policy(prefer=prefer)) for prefer in PREFERENCES}
    assert [len(made[prefer].stages) for prefer in PREFERENCES] == [1, 1, 3]
    longest = [made[prefer].longest_prompt_tokens or 0 for prefer in PREFERENCES]
    assert longest[0] == longest[1] < longest[2]
    assert made["context"].reasons[0] == (
        "3 GPUs because the policy prefers context: 2 GPUs would do, but not for so long a prompt."
    )


def test_speed_takes_the_faster_links_where_balanced_takes_the_longer_prompt() -> None:
    links = [Link(a=0, b=1, nvlinks=4), Link(a=0, b=2, path="PHB"), Link(a=1, b=2, path="PHB")]
    there = machine([14, 14, 18], links=links)
    balanced = plan(glm41v_9b(), there)
    fast = plan(glm41v_9b(), there, policy=Policy(prefer="speed"))
    assert balanced.cuts[0].link == "PHB"
    assert fast.cuts[0].link == "NV4"
    assert (fast.longest_prompt_tokens or 0) < (balanced.longest_prompt_tokens or 0)
    assert "No choice of 2 among the 3 GPUs that could be used has faster links than GPUs 0 and 1." in fast.reasons


def test_reasons_name_the_gpus_left_out() -> None:
    broken = machine([24, 24, 24])
    gpus = (*broken.gpus[:2], msgspec.structs.replace(broken.gpus[2], mig_enabled=True))
    made = plan(glm41v_9b(), msgspec.structs.replace(broken, gpus=gpus), policy=Policy(gpus=(1, 2)))
    assert made.reasons[-1] == "GPU 2 is left out: MIG is enabled, and a slice cannot be joined with other GPUs."
    assert [stage.gpu for stage in made.stages] == [1]


def test_the_split_runs_along_the_fastest_links() -> None:
    links = [Link(a=a, b=b, path="SYS") for a, b in itertools.combinations(range(4), 2) if (a, b) != (1, 3)]
    links.append(Link(a=1, b=3, nvlinks=4))
    made = plan(glm41v_9b(), machine([14] * 4, links=links))
    assert [stage.gpu for stage in made.stages] == [1, 3]
    assert made.cuts[0].link == "NV4"
    assert made.cuda_visible_devices == "1,3"


def test_margins_of_the_other_stages_are_evened_out() -> None:
    made = plan(glm41v_9b(), machine([10, 40, 40]), policy=Policy(min_gpus=3))
    left = sorted(stage.left_bytes for stage in made.stages)
    assert left[2] - left[1] < GIB


def test_a_cut_that_costs_no_tokens_is_explained_by_its_margin() -> None:
    short = msgspec.structs.replace(glm41v_9b().text, max_positions=4096)
    made = plan(glm41v_9b(text=short), machine([80, 80]), policy=Policy(min_gpus=2))
    assert made.cuts[0].reason.endswith(": so the tighter of the two GPUs keeps the most.")
    assert made.longest_prompt_tokens == 4096 - 256
    assert made.notes[-1] == "The longest prompt is set by the model's 4,096 positions, not by memory."


def test_a_cut_beyond_which_nothing_fits_says_so() -> None:
    made = plan(glm41v_9b(), machine([11.4, 11.4]), Workload(images=0, text_tokens=7_000), BARE)
    assert made.fits
    assert made.cuts[0].reason.endswith(": one layer more would not fit.")


def test_a_prompt_beyond_the_models_positions_is_pointed_out() -> None:
    short = msgspec.structs.replace(glm41v_9b().text, max_positions=1024)
    made = plan(glm41v_9b(text=short), machine([80]))
    assert made.notes[-1] == "Prompt and answer take 2,064 tokens, more than the 1,024 positions of the model."


def test_positions_that_memory_does_not_reach_are_not_mentioned() -> None:
    long = msgspec.structs.replace(glm41v_9b().text, max_positions=9_000_000)
    assert not any("positions" in note for note in plan(glm41v_9b(text=long), machine([80])).notes)


def test_what_was_assumed_is_noted() -> None:
    made = plan(glm41v_9b(quantization="awq", notes=("from the catalogue",)), machine([80]), Workload(dtype="float16"))
    assert made.notes == (
        "from the catalogue",
        "Images of 1008 x 1008 pixels (height x width): 1,296 tokens each.",
        "Activations: 4 x intermediate + 3.07 x hidden elements a token (counted, and measured on an H200); "
        "18.2 x hidden elements a patch (counted, and measured on an H200).",
        "transformers 5.23: the machine does not say which it has, and older ones need more or less.",
        "The checkpoint is quantized (awq): those weights keep their type.",
    )


def test_the_release_that_is_assumed_is_noted_where_none_is_known() -> None:
    known = plan(glm41v_9b(), with_transformers(machine([80]), "5.17.0"))
    own = plan(glm41v_9b(is_remote_code=True), machine([80]))
    assert not any("transformers 5.23" in note for note in (*known.notes, *own.notes))


def test_a_head_on_the_first_gpu_is_part_of_what_it_takes() -> None:
    tied = glm41v_9b(tied=((f"{BODY}.embed_tokens", "lm_head"),))
    made = plan(tied, machine([14, 14]))
    assert "takes the vision tower, the embedding, " in made.cuts[0].reason
    assert " and the head: " in made.cuts[0].reason
    assert made.reasons[-1] == f"Tied weights share a GPU: {BODY}.embed_tokens, lm_head."


def test_a_first_stage_without_tower_or_embedding_is_still_named() -> None:
    units = (unit("projector", "projector", GIB), unit("layers.0", "layer", GIB, layer=0))
    made = plan(glm41v_9b(units=units), machine([8, 8]), policy=Policy(min_gpus=2))
    assert made.cuts[0].reason.startswith("GPU 0 has 8.0 GiB free and takes what comes before the layers: ")


def test_many_different_gpus_are_planned_and_the_plan_says_what_was_not_compared() -> None:
    paths: tuple[LinkPath, ...] = ("PIX", "PHB", "NODE", "SYS")
    links = [Link(a=a, b=b, path=paths[(a * 7 + b * 3) % 4]) for a, b in itertools.combinations(range(16), 2)]
    made = plan(qwen25_vl_72b(), machine([20 + number / 10 for number in range(16)], links=links))
    assert made.fits
    assert made.notes[-2:] == (
        "So many GPUs differ in free memory that it was rounded down to make the search quick.",
        "Not every order of the GPUs was compared for the fastest links; memory was searched exactly.",
    )


def test_nonsense_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(UsageError, match="batch must be"):
        plan(glm41v_9b(), machine([24]), Workload(batch=0))
    with pytest.raises(UsageError, match="There is no GPU 3"):
        plan(glm41v_9b(), machine([24]), policy=Policy(gpus=(3,)))


def test_the_same_question_has_the_same_answer() -> None:
    assert plan(qwen25_vl_72b(), machine([23.5] * 8)) == plan(qwen25_vl_72b(), machine([23.5] * 8))


SMALL_TEXT = TextShape(layers=5, hidden=512, intermediate=2048, heads=8, kv_heads=2, head_dim=64, vocabulary=20_000)


def small(layer_mib: list[int], *, tied: bool) -> ModelProfile:
    """A small model whose layers differ in size."""
    units = [
        unit("tower", "vision", 40 * MIB),
        unit("embed", "embedding", 10 * MIB),
        *(unit(f"layers.{n}", "layer", size * MIB // 2, layer=n) for n, size in enumerate(layer_mib)),
        unit("norm", "norm", 512),
        unit("head", "head", 30 * MIB),
    ]
    return glm41v_9b(
        name="small",
        units=tuple(units),
        text=SMALL_TEXT,
        vision=None,
        image=None,
        tied=(("embed", "head"),) if tied else (),
    )


questions = st.tuples(
    st.lists(st.integers(8, 200), min_size=2, max_size=5),
    st.lists(st.integers(0, 1200), min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 3_000),
)


def asked(question: tuple[list[int], list[int], bool, int, int]) -> tuple[ModelProfile, Machine, Workload, Policy]:
    layer_mib, free_mib, tied, min_gpus, text_tokens = question
    policy = Policy(context_bytes=0, headroom_fraction=0, headroom_min_bytes=8 * MIB, min_gpus=min_gpus)
    workload = Workload(images=0, text_tokens=text_tokens, new_tokens=8)
    return small(layer_mib, tied=tied), machine([size / 1024 for size in free_mib]), workload, policy


@given(questions)
@settings(max_examples=examples(70), deadline=None)
def test_plans_are_as_good_as_brute_force(question: tuple[list[int], list[int], bool, int, int]) -> None:
    profile, there, workload, policy = asked(question)
    made = plan(profile, there, workload, policy)
    atoms = chain(profile).atoms
    prices = Footprint(profile, workload, image_load(profile, workload), atoms)
    need = prices.needs(workload.text_tokens)
    capacities = [Room(round(size / 1024 * GIB) - WORKSPACE_BYTES - 8 * MIB) for size in question[1]]
    for count in range(policy.min_gpus, len(capacities) + 1):
        fitting = [split for split in all_splits(len(atoms), len(capacities), count) if split.margin(need, capacities) >= 0]
        if fitting:
            break
    else:
        assert not made.fits
        assert made.shortage is not None
        # Where there are too few GPUs, it is not memory that is missing.
        assert made.shortage.missing_bytes > 0 or made.shortage.message.startswith("At least ")
        return
    assert made.fits
    assert len(made.stages) == count
    longest = {split: longest_text_tokens(prices, capacities, split, 10_000_000) or 0 for split in fitting}
    assert made.longest_prompt_tokens == max(longest.values())
    best = max(split.margin(need, capacities) for split in fitting if longest[split] == max(longest.values()))
    assert min(stage.left_bytes for stage in made.stages) > best - MARGIN_STEP


@given(questions)
@settings(max_examples=examples(70), deadline=None)
def test_every_plan_is_contiguous_complete_and_adds_up(question: tuple[list[int], list[int], bool, int, int]) -> None:
    profile, there, workload, policy = asked(question)
    made = plan(profile, there, workload, policy)
    chained = [unit.key for atom in chain(profile).atoms for unit in atom.units]
    if made.stages:
        assert [key for stage in made.stages for key in stage.keys] == chained
    assert len({stage.gpu for stage in made.stages}) == len(made.stages)
    for stage in made.stages:
        assert sum(line.size_bytes for line in stage.ledger) == stage.total_bytes
        assert all(line.size_bytes > 0 for line in stage.ledger if line.kind not in ("left", "kv_cache", "activations"))
    if made.fits:
        assert all(stage.left_bytes >= 0 for stage in made.stages)
        assert made.shortage is None
        assert made.longest_prompt_tokens is not None
        assert made.longest_prompt_tokens >= made.prompt_tokens
    else:
        assert made.device_map == {}
        assert made.max_memory == {}
        assert made.longest_prompt_tokens is None


@given(questions, st.integers(0, 2), st.integers(1, 500))
@settings(max_examples=examples(50), deadline=None)
def test_more_free_memory_never_fits_less(
    question: tuple[list[int], list[int], bool, int, int], which: int, more_mib: int
) -> None:
    layer_mib, free_mib, tied, min_gpus, text_tokens = question
    before = plan(*asked(question))
    richer = [size + more_mib * (number == which) for number, size in enumerate(free_mib)]
    after = plan(*asked((layer_mib, richer, tied, min_gpus, text_tokens)))
    assert after.fits >= before.fits
    if before.fits:
        assert len(after.stages) <= len(before.stages)


def test_a_gpu_without_known_memory_is_not_counted_on() -> None:
    there = machine([8])
    blind = msgspec.structs.replace(there, gpus=(gpu(0, None, 80 * GIB), gpu(1, 40 * GIB, 48 * GIB)))
    assert [stage.gpu for stage in plan(glm41v_9b(), blind).stages] == [1]
