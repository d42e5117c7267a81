"""Cards that would do."""

from __future__ import annotations

import pytest

from vlm_doctor.data.gpus import GPUS
from vlm_doctor.planner import plan, suggest_gpus
from vlm_doctor.sources import load_machine
from vlm_doctor.workload import DType, Policy, Workload

from .profiles import glm41v_9b, machine, qwen25_vl_72b
from .test_exact import small


@pytest.mark.parametrize("spec", sorted(GPUS))
def test_a_set_fits_and_one_card_less_does_not(spec: str) -> None:
    workload = Workload(dtype="float16")
    sets = suggest_gpus(glm41v_9b(), workload, Policy(), most=100)
    count = next((found.count for found in sets if found.spec.rpartition("x")[2] == spec), None)
    if count is None:
        # Another card with as much memory stands for it.
        assert any(found.total_bytes % GPUS[spec].memory_total_bytes == 0 for found in sets)
        return
    assert plan(glm41v_9b(), load_machine(f"{count}x{spec}"), workload).fits
    assert count == 1 or not plan(glm41v_9b(), load_machine(f"{count - 1}x{spec}"), workload).fits


def test_the_least_memory_comes_first_and_the_list_is_short() -> None:
    sets = suggest_gpus(qwen25_vl_72b(), Workload(), Policy())
    assert len(sets) == 5
    totals = [(found.total_bytes, found.count) for found in sets]
    assert totals == sorted(totals)
    assert len(set(totals)) == 5
    assert [found.total_bytes for found in sets] == [
        found.count * GPUS[found.spec.partition("x")[2]].memory_total_bytes for found in sets
    ]


@pytest.mark.parametrize(("dtype", "is_there"), [("bfloat16", False), ("float16", True)])
def test_cards_without_bfloat16_are_not_proposed_for_it(dtype: DType, is_there: bool) -> None:
    sets = suggest_gpus(glm41v_9b(), Workload(dtype=dtype), Policy(), most=100)
    assert any(found.name == "Tesla T4" for found in sets) == is_there


def test_flash_attention_needs_the_same_cards() -> None:
    sets = suggest_gpus(glm41v_9b(), Workload(dtype="float16", attention="flash"), Policy(), most=100)
    assert not any(found.name == "Tesla T4" for found in sets)


def test_what_is_said_about_this_machine_does_not_count_elsewhere() -> None:
    policy = Policy(gpus=(3,), exclude=(1,), pins=(("model.visual", 3),), max_memory=((3, 1),), offload=True)
    assert suggest_gpus(glm41v_9b(), Workload(), policy) == suggest_gpus(glm41v_9b(), Workload(), Policy())
    assert {found.count for found in suggest_gpus(glm41v_9b(), Workload(), Policy(min_gpus=3, max_gpus=3))} == {3}


def test_a_model_for_no_card_has_no_set() -> None:
    assert suggest_gpus(glm41v_9b(), Workload(batch=4_096, text_tokens=100_000), Policy()) == ()


def test_cards_that_hold_a_cut_tower_count() -> None:
    profile = small([10], block_mib=[9_000] * 4)
    sets = suggest_gpus(profile, Workload(images=0), Policy(), most=100)
    assert next(found for found in sets if found.name == "NVIDIA GeForce RTX 3060").count == 4


def test_a_misfit_comes_with_cards() -> None:
    made = plan(glm41v_9b(), machine([8]))
    assert made.gpu_sets == suggest_gpus(glm41v_9b(), Workload(), Policy())
    assert plan(glm41v_9b(), machine([80])).gpu_sets == ()
