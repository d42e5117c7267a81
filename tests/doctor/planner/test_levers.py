from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vlm_doctor.placement import Lever, Plan, Shortage
from vlm_doctor.planner import plan
from vlm_doctor.units import GIB
from vlm_doctor.workload import Optimizer, Policy, Training, Workload

from .profiles import glm41v_9b, llava_13b, machine, qwen25_vl_72b

EXPAND = "let torch's allocator expand segments (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)"


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
        EXPAND,
    ]
    assert [lever.change for lever in short.levers if not lever.fits] == [EXPAND]
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
    three = machine([24, 24, 24])
    gpus = tuple(msgspec.structs.replace(gpu, error="reset" if gpu.index == 1 else "GPU is lost") for gpu in three.gpus)
    message = shortage(plan(glm41v_9b(), msgspec.structs.replace(three, gpus=gpus))).message
    assert "(GPUs 0, 2: fails when asked (GPU is lost); GPU 1: fails when asked (reset))" in message
    none = shortage(plan(glm41v_9b(), machine([])))
    assert none.is_permanent
    assert none.message == "No GPU can be used, and zai-org/GLM-4.1V-9B-Thinking needs 19.7 GiB."


def test_a_fault_of_one_gpu_is_no_permanent_fact_of_the_machine() -> None:
    there = machine([16, 16])
    lost = msgspec.structs.replace(there, gpus=(there.gpus[0], msgspec.structs.replace(there.gpus[1], error="GPU is lost")))
    assert not shortage(plan(glm41v_9b(), lost)).is_permanent
    assert shortage(plan(glm41v_9b(), machine([16]))).is_permanent


def test_an_allocator_that_expands_already_is_not_offered() -> None:
    for allocator in ("native", "expandable"):
        short = shortage(plan(glm41v_9b(), machine([16]), Workload(allocator=allocator)))
        offered = [lever for lever in short.levers if "expandable_segments" in lever.change]
        assert not (offered and allocator == "expandable")


def test_the_most_absurd_workload_still_gets_an_answer() -> None:
    absurd = Workload(text_tokens=10_000_000, new_tokens=10_000_000, batch=4096, images=4096, attention="eager")
    short = shortage(plan(glm41v_9b(), machine([24, 24]), absurd))
    assert short.missing_bytes > 2**60
    assert short.is_permanent


def test_more_gpus_asked_for_than_there_are() -> None:
    short = shortage(plan(glm41v_9b(), machine([24, 24]), policy=Policy(min_gpus=3)))
    assert short.message == "At least 3 GPUs are asked for, and 2 can be used."
    assert short.missing_bytes == 0  # memory is not what is missing


def test_more_gpus_asked_for_than_the_model_has_parts() -> None:
    text = msgspec.structs.replace(llava_13b().text, layers=1)
    units = tuple(unit for unit in llava_13b().units if unit.layer in (None, 0))
    tiny = llava_13b(units=units, text=text)
    short = shortage(plan(tiny, machine([24] * 4), policy=Policy(min_gpus=4)))
    assert short.message == "At least 4 GPUs are asked for, and llava-hf/llava-1.5-13b-hf can be cut into 3 parts at most."


def test_a_bound_on_the_work_is_a_proof_where_weights_alone_are_none() -> None:
    workload = Workload(images=0, text_tokens=20_000)
    short = shortage(plan(glm41v_9b(), machine([12.5, 12.5, 12.5]), workload, Policy(max_gpus=2)))
    assert "Weights and KV cache take 19.9 GiB, the work on them at least " in short.message
    assert " on 2 GPUs, and the roomiest 2 can give " in short.message
    short = shortage(plan(glm41v_9b(), machine([22]), workload))
    assert " on 1 GPU, and this GPU can give " in short.message
    short = shortage(plan(glm41v_9b(), machine([12.5, 12.5]), workload))
    assert " on 2 GPUs, and all 2 GPUs together can give " in short.message


def test_what_the_user_forbids_is_offered_to_be_allowed() -> None:
    policy = Policy(exclude=(1, 2), max_memory=((0, 12 * GIB), (3, 40 * GIB)), pins=(("lm_head", 3),))
    there = machine([24, 24, 3, 7])
    short = shortage(plan(glm41v_9b(), there, policy=policy))
    assert [lever.change for lever in short.levers if lever.fits][:2] == [
        "use GPU 1 too (drop it from --exclude)",
        "allow more than 12.0 GiB on GPU 0 (drop --max-memory 0=...)",
    ]
    assert [lever.change for lever in short.levers if not lever.fits] == [
        "drop --pin lm_head=3",
        "use GPU 2 too (drop it from --exclude)",
        EXPAND,
    ]
    assert plan(glm41v_9b(), there, policy=msgspec.structs.replace(policy, max_memory=())).fits
    assert plan(glm41v_9b(), there, policy=msgspec.structs.replace(policy, exclude=(2,))).fits


def test_a_machine_whose_every_gpu_is_forbidden_or_lost_offers_the_forbidden() -> None:
    there = machine([24, 24, 2])
    lost = (msgspec.structs.replace(there.gpus[0], error="GPU is lost"), *there.gpus[1:])
    short = shortage(plan(glm41v_9b(), msgspec.structs.replace(there, gpus=lost), policy=Policy(exclude=(1, 2))))
    # GPU 2 is too small on its own, so only GPU 1 is worth a word.
    assert [lever.change for lever in short.levers] == ["use GPU 1 too (drop it from --exclude)"]
    short = shortage(
        plan(glm41v_9b(), machine([24, 24]), Workload(allocator="expandable"), Policy(min_gpus=3, exclude=(1,)))
    )
    assert short.levers == ()


def test_host_memory_is_offered_last_of_what_the_machine_has() -> None:
    short = shortage(plan(glm41v_9b(), machine([18, 1]), Workload(images=0, text_tokens=600)))
    found = lever(short, "allow the last layers in host memory, much slower (--offload)")
    assert found.fits
    assert found.saves_bytes >= short.missing_bytes - 2**20
    assert not [
        lever
        for lever in shortage(plan(glm41v_9b(), machine([2]))).levers
        if lever.change.startswith("allow the last layers in host memory")
    ]


def test_levers_count_on_host_memory_where_it_is_allowed() -> None:
    # On the CPU or not, the first GPU keeps tower, embedding and the cache of all layers: a cap stands in the way.
    policy = Policy(offload=True, max_memory=((0, 3 * GIB),))
    short = shortage(plan(glm41v_9b(), machine([16]), Workload(images=0, text_tokens=600), policy))
    assert lever(short, "allow more than 3.0 GiB on GPU 0").fits
    assert not lever(short, "load in 8 bit (int8)").fits


@pytest.mark.parametrize(
    ("training", "batch", "least_gib"),
    [
        (Training(), 1, {"an optimizer with 8-bit states (adamw_8bit)": 0.01}),
        (Training(optimizer="sgd"), 1, {}),
        (
            Training(method="full", gradient_checkpointing=False),
            4,
            {
                "gradient checkpointing": 30,
                "train LoRA adapters of rank 16 instead of all weights": 5,
                "an optimizer with 8-bit states (adamw_8bit)": 15,
                "batch of 2": 30,
            },
        ),
    ],
)
def test_a_training_step_that_fits_lists_what_each_lever_saves(
    training: Training, batch: int, least_gib: dict[str, float]
) -> None:
    workload = Workload(images=0, text_tokens=2048, training=training, batch=batch)
    made = plan(glm41v_9b(), machine([200]), workload)
    assert made.fits
    saved = {lever.change: lever.saves_bytes / GIB for lever in made.levers if "expandable_segments" not in lever.change}
    assert list(saved) == list(least_gib)
    assert all(saved[change] >= least for change, least in least_gib.items()), saved
    assert plan(glm41v_9b(), machine([200]), msgspec.structs.replace(workload, training=None)).levers == ()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_training_step_that_does_not_fit_lists_them_too(optimizer: Optimizer) -> None:
    training = Training(method="full", optimizer=optimizer, gradient_checkpointing=False)
    short = shortage(plan(glm41v_9b(), machine([30]), Workload(images=0, text_tokens=8192, training=training)))
    assert lever(short, "gradient checkpointing").saves_bytes > GIB
    assert bool([lever for lever in short.levers if "8-bit" in lever.change]) == (optimizer == "adamw")
