from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vlm_doctor.placement import Lever, Plan, Shortage
from vlm_doctor.planner import plan
from vlm_doctor.units import GIB
from vlm_doctor.workload import Policy, Workload

from .profiles import glm41v_9b, llava_13b, machine, qwen25_vl_72b


def shortage(made: Plan) -> Shortage:
    assert not made.fits
    assert made.shortage is not None
    return made.shortage


def lever(short: Shortage, beginning: str) -> Lever:
    (found,) = [lever for lever in short.levers if lever.change.startswith(beginning)]
    return found


def test_weights_that_exceed_all_gpus_are_a_proof() -> None:
    made = plan(qwen25_vl_72b(), machine([23.5] * 4))
    short = shortage(made)
    assert short.is_permanent
    assert short.message.startswith("Qwen/Qwen2.5-VL-72B-Instruct does not fit: even the best split over 4 GPUs lacks ")
    assert "Weights and KV cache alone take 137.4 GiB, and all 4 GPUs together can give " in short.message
    assert short.missing_bytes == -min(stage.left_bytes for stage in made.stages)
    assert made.reasons == ()
    assert made.cuts[0].reason.endswith(": the split that lacks least.")


def test_one_gpu_that_is_too_small_is_spoken_of_as_one() -> None:
    short = shortage(plan(glm41v_9b(), machine([16])))
    assert "even the best split over 1 GPU lacks " in short.message
    assert "and this GPU can give " in short.message


def test_a_part_that_fits_no_gpu_is_a_proof() -> None:
    short = shortage(plan(glm41v_9b(), machine([3.1] * 12), Workload(images=0)))
    assert "A part that cannot be cut needs 2.8 GiB, and the roomiest GPU can give " in short.message


def test_where_no_simple_bound_shows_it_the_search_is_the_proof() -> None:
    short = shortage(plan(glm41v_9b(), machine([11.4, 11.4]), Workload(images=0, text_tokens=6000)))
    assert short.message.endswith("All cuts and all orders of the GPUs were compared.")


@pytest.mark.parametrize(
    ("workload", "beginning"),
    [
        (Workload(images=0, text_tokens=60_000), "prompt of at most "),
        (Workload(images=0, new_tokens=200_000), "at most "),
        (Workload(batch=64), "batch of "),
        (Workload(images=60), ""),
        (Workload(image_height=12_000, image_width=6_000), "images of at most "),
        (Workload(images=0, text_tokens=9_000, attention="eager"), "use fused attention (sdpa) instead of eager"),
        (Workload(images=0, text_tokens=9_000, logits="forward"), "call generate instead of a plain forward"),
        (Workload(dtype="float32"), "load in bfloat16"),
    ],
)
def test_the_lever_that_is_pulled_makes_it_fit(workload: Workload, beginning: str) -> None:
    found = [lever for lever in shortage(plan(glm41v_9b(), machine([23.5]), workload)).levers if lever.fits]
    assert any(lever.change.startswith(beginning) for lever in found)


@pytest.mark.parametrize(
    ("field", "beginning", "number"),
    [("text_tokens", "prompt of at most ", 3), ("new_tokens", "at most ", 2), ("batch", "batch of ", 2), ("images", "", 0)],
)
def test_a_reduction_names_the_largest_that_fits(field: str, beginning: str, number: int) -> None:
    asked: dict[str, Any] = {
        "text_tokens": {"images": 0, "text_tokens": 60_000},
        "new_tokens": {"images": 0, "new_tokens": 200_000},
        "batch": {"batch": 64},
        "images": {"images": 60},
    }[field]
    workload = Workload(**asked)
    short = shortage(plan(glm41v_9b(), machine([23.5]), workload))
    if field == "images":
        beginning = next(lever.change for lever in short.levers if lever.change.endswith(" images in each prompt"))
    (word,) = [
        lever.change.split()[4 if field == "text_tokens" else number]
        for lever in short.levers
        if lever.change.startswith(beginning) and (field != "new_tokens" or lever.change.endswith("new tokens"))
    ]
    largest = int(word.replace(",", ""))
    for value, fits in ((largest, True), (largest + 1, False)):
        changed = msgspec.structs.replace(workload, **{field: value})
        assert plan(glm41v_9b(), machine([23.5]), changed).fits is fits


def test_image_size_keeps_its_shape() -> None:
    workload = Workload(image_height=12_000, image_width=6_000)
    short = shortage(plan(glm41v_9b(), machine([23.5]), workload))
    edge = int(lever(short, "images of at most ").change.split()[4].replace(",", ""))
    assert plan(glm41v_9b(), machine([23.5]), Workload(image_height=edge, image_width=edge // 2)).fits
    wider = edge + 56
    assert not plan(glm41v_9b(), machine([23.5]), Workload(image_height=wider, image_width=wider // 2)).fits


def test_smaller_weights_come_after_smaller_work_and_before_more_machine() -> None:
    short = shortage(plan(glm41v_9b(), machine([18, 1]), Workload(images=0, text_tokens=600)))
    changes = [lever.change for lever in short.levers]
    assert changes == [
        "load in 8 bit (int8)",
        "load in 4 bit (nf4)",
        "allow the last layers in host memory, much slower (--offload)",
        "one more GPU like GPU 0 (NVIDIA Test), empty",
    ]
    assert all(lever.fits for lever in short.levers)
    saved = [lever.saves_bytes for lever in short.levers]
    assert saved[0] < saved[1]
    assert 6 * GIB < saved[0] < 9 * GIB


def test_levers_that_do_not_suffice_come_last() -> None:
    levers = shortage(plan(qwen25_vl_72b(), machine([23.5] * 3))).levers
    fits = [lever.fits for lever in levers]
    assert fits == sorted(fits, reverse=True)
    assert False in fits


def test_what_is_quantized_is_not_quantized_again() -> None:
    awq = shortage(plan(glm41v_9b(quantization="awq"), machine([16])))
    assert not [lever for lever in awq.levers if "bit" in lever.change]
    nf4 = shortage(plan(glm41v_9b(), machine([5]), Workload(quantization="nf4", dtype="float32")))
    assert not [lever for lever in nf4.levers if lever.change.startswith("load in")]
    int8 = shortage(plan(glm41v_9b(), machine([9.5]), Workload(quantization="int8", images=0)))
    assert lever(int8, "load in 4 bit").saves_bytes > 0


def test_other_processes_are_named_with_what_they_hold_and_the_shortage_is_not_permanent() -> None:
    short = shortage(plan(glm41v_9b(), machine([14], total_gib=24)))
    assert not short.is_permanent
    waiting = lever(short, "wait until other processes give back what they hold (9.8 GiB on GPU 0)")
    assert waiting.fits


def test_a_limit_on_gpus_is_offered_to_be_lifted() -> None:
    short = shortage(plan(glm41v_9b(), machine([16, 16]), policy=Policy(max_gpus=1)))
    assert lever(short, "allow all 2 GPUs").fits
    assert not [lever for lever in short.levers if lever.change.startswith("one more GPU")]


def test_as_many_more_gpus_as_it_takes_are_named() -> None:
    short = shortage(plan(qwen25_vl_72b(), machine([22, 22])))

    needed = lever(short, "5 more GPUs like GPU 0 (NVIDIA Test), empty")

    assert needed.fits
    assert plan(qwen25_vl_72b(), machine([22] * 7)).fits
    assert not plan(qwen25_vl_72b(), machine([22] * 6)).fits


def test_where_no_number_of_gpus_helps_one_more_is_judged() -> None:
    short = shortage(plan(qwen25_vl_72b(), machine([3])))

    assert not lever(short, "one more GPU like GPU 0").fits


def test_a_limit_on_gpus_that_binds_nothing_is_lifted_with_the_next_gpu() -> None:
    short = shortage(plan(glm41v_9b(), machine([16]), policy=Policy(max_gpus=1)))
    assert lever(short, "one more GPU like GPU 0").fits


def test_a_machine_without_usable_gpus_says_why() -> None:
    lost = machine([24])
    lost = msgspec.structs.replace(lost, gpus=(msgspec.structs.replace(lost.gpus[0], error="GPU is lost"),))
    made = plan(glm41v_9b(), lost)
    short = shortage(made)
    assert not made.stages
    assert not made.cuts
    assert not made.reasons
    assert not short.is_permanent
    assert short.levers == ()
    assert short.message == (
        "No GPU can be used (GPU 0: fails when asked (GPU is lost)), and zai-org/GLM-4.1V-9B-Thinking needs 19.7 GiB."
    )
    none = shortage(plan(glm41v_9b(), machine([])))
    assert none.is_permanent
    assert none.message == "No GPU can be used, and zai-org/GLM-4.1V-9B-Thinking needs 19.7 GiB."


def test_a_fault_of_one_gpu_is_no_permanent_fact_of_the_machine() -> None:
    there = machine([16, 16])
    lost = msgspec.structs.replace(there, gpus=(there.gpus[0], msgspec.structs.replace(there.gpus[1], error="GPU is lost")))
    assert not shortage(plan(glm41v_9b(), lost)).is_permanent
    assert shortage(plan(glm41v_9b(), machine([16]))).is_permanent


def test_the_most_absurd_workload_still_gets_an_answer() -> None:
    absurd = Workload(text_tokens=10_000_000, new_tokens=10_000_000, batch=4096, images=4096, attention="eager")
    short = shortage(plan(glm41v_9b(), machine([24, 24]), absurd))
    assert short.missing_bytes > 2**60
    assert short.is_permanent


def test_more_gpus_asked_for_than_there_are() -> None:
    short = shortage(plan(glm41v_9b(), machine([24, 24]), policy=Policy(min_gpus=3)))
    assert short.message == "At least 3 GPUs are asked for, and 2 can be used."


def test_more_gpus_asked_for_than_the_model_has_parts() -> None:
    text = msgspec.structs.replace(llava_13b().text, layers=1)
    units = tuple(unit for unit in llava_13b().units if unit.layer in (None, 0))
    tiny = llava_13b(units=units, text=text)
    short = shortage(plan(tiny, machine([24] * 4), policy=Policy(min_gpus=4)))
    assert short.message == "At least 4 GPUs are asked for, and llava-hf/llava-1.5-13b-hf can be cut into 3 parts at most."
