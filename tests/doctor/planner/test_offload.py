"""The last layers in host memory: what the plan says of it."""

from __future__ import annotations

import msgspec
import pytest

from vlm_doctor.machine import Gpu, Host, Machine
from vlm_doctor.model import Unit
from vlm_doctor.placement import Plan
from vlm_doctor.planner import plan
from vlm_doctor.planner.memory import copied_bytes
from vlm_doctor.planner.offload import HOST_RESERVE_BYTES
from vlm_doctor.units import GIB
from vlm_doctor.workload import Policy, Training, Workload

from .profiles import BODY, glm41v_9b, machine, unit

OFFLOAD = Policy(offload=True)


def host(free_gib: float | None) -> Host:
    available_bytes = None if free_gib is None else round(free_gib * GIB)
    return Host(os="Linux", kernel="6", memory_total_bytes=128 * GIB, memory_available_bytes=available_bytes)


def with_gpus(there: Machine, **fields: object) -> Machine:
    gpus: tuple[Gpu, ...] = tuple(msgspec.structs.replace(gpu, **fields) for gpu in there.gpus)
    return msgspec.structs.replace(there, gpus=gpus)


def message(made: Plan) -> str:
    assert made.shortage is not None
    return made.shortage.message


def test_what_the_gpus_can_hold_is_not_offloaded() -> None:
    made = plan(glm41v_9b(), machine([24]), policy=OFFLOAD)
    assert made.offloaded is None
    assert made.device_map == {"": 0}


def test_the_last_layers_go_to_the_host_with_what_follows_them() -> None:
    profile = glm41v_9b()
    there = machine([14], host=host(32))
    made = plan(profile, there, policy=OFFLOAD)
    assert made.fits
    off = made.offloaded
    assert off is not None
    layers = [key for key in off.keys if ".layers." in key]
    first = 40 - len(layers)
    assert off.keys == (*(f"{BODY}.layers.{n}" for n in range(first, 40)), f"{BODY}.norm", "lm_head")
    assert list(made.device_map) == [unit.key for unit in profile.units]
    assert {key for key, device in made.device_map.items() if device == "cpu"} == set(off.keys)
    assert off.weights_bytes == sum(unit.stored_bytes for unit in profile.units if unit.key in off.keys)
    assert off.host_left_bytes == 32 * GIB - HOST_RESERVE_BYTES - off.weights_bytes
    assert off.reason.startswith(
        f"The GPUs do not suffice, so the last {len(layers)} layers and the head stay in host memory: "
        "with one part less in host memory a GPU would lack "
    )
    assert made.reasons[0] == "1 GPU takes as much of the model as fits; host memory has the rest."
    # One layer fewer in host memory does not fit.
    assert not plan(profile, there, policy=msgspec.structs.replace(OFFLOAD, pins=((off.keys[0], 0),))).fits


def test_the_first_gpu_pays_for_what_it_executes() -> None:
    workload = Workload(batch=4)
    made = plan(glm41v_9b(), machine([9, 9], host=host(64)), workload, OFFLOAD)
    first, second = made.stages
    assert made.offloaded is not None
    offloaded_layers = sum(".layers." in key for key in made.offloaded.keys)

    def size(stage: object, label: str) -> int:
        return sum(line.size_bytes for line in stage.ledger if line.label.startswith(label))  # type: ignore[attr-defined]

    def layers(keys: tuple[str, ...]) -> int:
        return sum(".layers." in key for key in keys)

    of_one = size(second, "KV cache") // layers(second.keys)
    assert size(first, "KV cache") == of_one * (layers(first.keys) + offloaded_layers)
    assert size(first, "copy of an offloaded module") == made.offloaded.copy_bytes > 0
    assert size(second, "copy of an offloaded module") == 0


def test_a_copy_is_of_a_module_and_not_of_the_whole_layer() -> None:
    profile = glm41v_9b()
    dense = Unit(key="l", role="layer", parameters={"BF16": 900}, stored_bytes=1800, largest_tensor_elements=300)
    assert copied_bytes(dense, profile, Workload()) == 900
    assert copied_bytes(dense, profile, Workload(dtype="float32")) == 1800
    head = Unit(key="h", role="head", parameters={"BF16": 900}, stored_bytes=1800, largest_tensor_elements=900)
    assert copied_bytes(head, profile, Workload()) == 1800
    unknown = msgspec.structs.replace(dense, largest_tensor_elements=0)
    assert copied_bytes(unknown, profile, Workload()) == 1800


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "."),
        ({"pcie_generation_max": 4, "pcie_width_max": 16}, ", which takes at least 0."),
        ({"pcie_generation": 3, "pcie_width": 8}, ", which takes at least 1."),
        ({"pcie_generation": 9, "pcie_width": 8}, "."),
    ],
)
def test_the_cost_is_told_in_seconds_where_the_bus_is_known(fields: dict[str, object], sentence: str) -> None:
    made = plan(glm41v_9b(), with_gpus(machine([12], host=host(64)), **fields), policy=OFFLOAD)
    assert made.offloaded is not None
    beginning = f"Every new token copies {made.offloaded.weights_bytes / GIB:.1f} GiB from host memory to GPU 0"
    assert made.offloaded.cost.startswith(beginning + sentence)


@pytest.mark.parametrize("there", [machine([14]), machine([14], host=host(None))])
def test_unknown_host_memory_is_not_counted_as_none(there: Machine) -> None:
    made = plan(glm41v_9b(), there, policy=OFFLOAD)
    assert made.offloaded is not None
    assert made.offloaded.host_left_bytes is None
    assert (
        "How much host memory is available is not known, so whether the offloaded layers fit there is not either."
        in made.notes
    )


def test_a_host_that_is_too_small_is_no_way_out() -> None:
    made = plan(glm41v_9b(), machine([14], host=host(4)), policy=OFFLOAD)
    assert message(made).endswith("Nor does it fit with any number of the last layers in host memory.")


def test_a_first_gpu_that_cannot_hold_the_cache_is_no_way_out() -> None:
    made = plan(glm41v_9b(), machine([8], host=host(64)), Workload(images=0, text_tokens=200_000), OFFLOAD)
    assert not made.fits
    assert made.offloaded is None


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (plan(glm41v_9b(quantization="awq"), machine([6]), policy=OFFLOAD), "loaded quantized (awq), and such layers"),
        (
            plan(glm41v_9b(), machine([3]), Workload(quantization="nf4"), OFFLOAD),
            "loaded quantized (nf4), and transformers refuses",
        ),
        (
            plan(glm41v_9b(), machine([6]), Workload(training=Training()), OFFLOAD),
            "weights in host memory cannot be trained",
        ),
        (
            plan(glm41v_9b(), with_gpus(machine([0], host=host(12)), has_unified_memory=True), policy=OFFLOAD),
            "the GPU uses the host's memory already",
        ),
        (
            plan(glm41v_9b(), machine([6]), policy=Policy(offload=True, pins=(("lm_head", 0),))),
            "no part at the end is free to go",
        ),
    ],
)
def test_where_it_cannot_be_done_the_answer_says_why(made: Plan, why: str) -> None:
    assert not made.fits
    assert " Offloading is no way out: " in message(made)
    assert why in message(made)


def test_vision_and_embedding_never_leave_the_gpus() -> None:
    tied = glm41v_9b(tied=((f"{BODY}.embed_tokens", "lm_head"),))
    made = plan(tied, machine([8], host=host(64)), policy=OFFLOAD)
    assert made.offloaded is not None
    assert made.device_map["model.visual"] == made.device_map["lm_head"] == 0
    assert made.offloaded.keys[-1] == f"{BODY}.norm"
    tiny = plan(glm41v_9b(), machine([4], host=host(64)), policy=OFFLOAD)
    assert not tiny.fits


def test_a_single_layer_and_a_lone_head_are_called_so() -> None:
    units = (unit("embed", "embedding", GIB), unit("layers.0", "layer", GIB // 2, layer=0), unit("head", "head", GIB))
    small = glm41v_9b(units=units, vision=None, image=None)
    workload = Workload(images=0, text_tokens=1, new_tokens=1)
    head = plan(small, machine([5.5], host=host(64)), workload, OFFLOAD).offloaded
    assert head is not None
    assert head.reason.startswith("The GPUs do not suffice, so the head stays in host memory")
    both = plan(small, machine([4.5], host=host(64)), workload, OFFLOAD).offloaded
    assert both is not None
    assert both.reason.startswith("The GPUs do not suffice, so the last layer and the head stay in host memory")
