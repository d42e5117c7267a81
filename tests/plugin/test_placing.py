"""From the plan's positions to this process's ordinals, and whether every weight is where it belongs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu.models.failures import LoadFailure
from pytest_vlmgpu.models.placing import (
    Placed,
    check_automatic,
    check_placement,
    device_map_for,
    offloaded_bytes,
    ordinals_in,
    stages_of,
)
from vlm_doctor.placement import Offload, Plan, Stage
from vlm_doctor.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAP = {"model.visual": 0, "model.language_model.layers.1": 0, "model.language_model.layers.10": 1, "lm_head": 1}


def _plan(*uuids: str, device_map: dict[str, int | str], offloaded: Offload | None = None) -> Plan:
    stages = tuple(
        Stage(gpu=index + 4, uuid=uuid, name="L4", keys=(), ledger=(), total_bytes=0) for index, uuid in enumerate(uuids)
    )
    return Plan(
        model="org/model",
        machine="8 x L4",
        fits=True,
        workload=Workload(),
        dtype="bfloat16",
        prompt_tokens=8,
        image_tokens=4,
        device_map=device_map,
        max_memory={},
        cuda_visible_devices=",".join(uuids),
        stages=stages,
        offloaded=offloaded,
    )


def _failure(parts: list[Placed], device_map: Mapping[str, int | str]) -> tuple[str, str]:
    with pytest.raises(LoadFailure) as caught:
        check_placement("org/model", parts, device_map)
    assert str(caught.value) == f"{caught.value.code}: {caught.value.message}"
    return caught.value.code, caught.value.message


def test_positions_become_the_ordinals_of_the_same_uuids() -> None:
    plan = _plan("GPU-b", "GPU-a", device_map={"model.visual": 0, "lm_head": 1})
    assert device_map_for(plan, {"GPU-a": 0, "GPU-c": 1, "GPU-b": 2}) == {"model.visual": 2, "lm_head": 0}


def test_one_gpu_takes_the_whole_model_under_one_key() -> None:
    plan = _plan("GPU-b", device_map={"model.visual": 0, "lm_head": 0})
    assert device_map_for(plan, {"GPU-a": 0, "GPU-b": 1}) == {"": 1}


@pytest.mark.parametrize(("ordinals", "seen"), [({"GPU-a": 0, "GPU-c": 1}, "GPU-a, GPU-c"), ({}, "none")])
def test_a_gpu_that_torch_does_not_see_is_named(ordinals: dict[str, int], seen: str) -> None:
    with pytest.raises(LoadFailure) as caught:
        device_map_for(_plan("GPU-b", device_map={"lm_head": 0}), ordinals)
    assert caught.value.code == "VLM712"
    assert caught.value.message == (
        f"torch does not see GPU 4 (GPU-b), where the plan puts part of org/model; it sees {seen}: check "
        "CUDA_VISIBLE_DEVICES of this process, or run vlm-doctor."
    )


def test_a_plan_that_leaves_layers_on_the_cpu_is_no_plan_for_a_test() -> None:
    off = Offload(
        keys=("lm_head",), weights_bytes=3 * 2**30, copy_bytes=1, host_left_bytes=None, reason="because", cost="slow"
    )
    with pytest.raises(LoadFailure) as caught:
        device_map_for(_plan("GPU-b", device_map={"model.visual": 0, "lm_head": "cpu"}, offloaded=off), {"GPU-b": 0})
    assert caught.value.code == "VLM714"
    assert caught.value.message == (
        "The plan leaves 3.0 GiB of org/model on the CPU (lm_head and what follows), and a test on GPUs must not run "
        "there: plan without offload, with more GPUs or a smaller workload."
    )


def test_the_longest_key_decides_where_a_tensor_belongs() -> None:
    parts = [
        Placed("model.visual.blocks.0.weight", "cuda:0"),
        Placed("model.language_model.layers.1.mlp.weight", "cuda:0"),
        Placed("model.language_model.layers.10.mlp.weight", "cuda:1"),
        Placed("lm_head", "cuda:1"),
    ]
    check_placement("org/model", parts, MAP)
    check_placement("org/model", [Placed("", "cuda:3"), Placed("any.weight", "cuda:3")], {"": 3})
    check_placement("org/model", [Placed("any.weight", "cpu")], {})


@pytest.mark.parametrize("device", ["cpu", "disk", "meta"])
def test_weights_that_fell_off_the_gpus_are_listed_and_counted(device: str) -> None:
    parts = [Placed(f"model.visual.{i}", device, 2**30) for i in range(5)] + [Placed("lm_head.weight", "cuda:0")]
    code, message = _failure(parts, MAP)
    assert code == "VLM714"
    assert message == (
        f"5 parts of org/model, 5.0 GiB, landed elsewhere than planned (model.visual.0 is on {device}, planned cuda:0; "
        f"model.visual.1 is on {device}, planned cuda:0; model.visual.2 is on {device}, planned cuda:0; and 2 more): a GPU "
        "had too little free memory for its part of the plan, or something moved the model after loading; run vlm-doctor "
        "to see who holds memory, then plan again."
    )


def test_a_weight_on_another_gpu_or_under_no_key_differs_from_the_plan() -> None:
    parts = [Placed("lm_head.weight", "cuda:0", 2**20), Placed("model.norm.weight", "cuda:1")]
    code, message = _failure(parts, MAP)
    assert code == "VLM716"
    assert message == (
        "2 parts of org/model, 1 MiB, landed elsewhere than planned (lm_head.weight is on cuda:0, planned cuda:1; "
        "model.norm.weight is on cuda:1, planned nowhere): give the plan's device_map to the loader unchanged, or plan "
        "again with the transformers version that loads the model."
    )


def test_a_module_without_weights_counts_too() -> None:
    assert _failure([Placed("", "cuda:1")], {"": 0}) == (
        "VLM716",
        "1 part of org/model landed elsewhere than planned (all is on cuda:1, planned cuda:0): give the plan's "
        "device_map to the loader unchanged, or plan again with the transformers version that loads the model.",
    )


def test_a_model_for_the_cpu_has_data_and_uses_no_gpu() -> None:
    assert _failure([Placed("lm_head.weight", "meta", 4)], {})[0] == "VLM714"
    assert _failure([Placed("lm_head.weight", "cuda:0", 4)], {})[0] == "VLM716"


def test_what_is_offloaded_on_purpose_keeps_its_place() -> None:
    off = Offload(keys=("lm_head",), weights_bytes=1, copy_bytes=1, host_left_bytes=None, reason="because", cost="slow")
    plan = _plan("GPU-b", device_map={"model.visual": 0, "lm_head": "cpu"}, offloaded=off)
    device_map = device_map_for(plan, {"GPU-a": 0, "GPU-b": 1}, may_offload=True)

    assert device_map == {"model.visual": 1, "lm_head": "cpu"}
    assert ordinals_in(device_map) == [1]
    assert ordinals_in({"": "cuda:0"}) == ordinals_in(None) == []
    # accelerate leaves tensors without data in modules whose weights it keeps apart.
    parts = [
        Placed("model.visual.weight", "cuda:1", 8),
        Placed("lm_head.weight", "meta", 2),
        Placed("lm_head.bias", "cpu", 1),
    ]
    check_placement("org/model", parts, device_map)
    assert offloaded_bytes(parts, device_map) == 3
    assert offloaded_bytes(parts, {}) == 0
    assert _failure([Placed("model.visual.weight", "cpu")], device_map)[0] == "VLM714"
    assert _failure([Placed("lm_head.weight", "cuda:1")], device_map)[0] == "VLM716"


def test_transformers_own_choice_is_held_to_the_gpus() -> None:
    on_gpus = [Placed("model.visual", "cuda:0"), Placed("lm_head", "cuda:3")]
    fallen = [Placed(f"model.layers.{number}", "cpu", 2**30) for number in range(4)] + [Placed("lm_head", "disk")]

    check_automatic("org/model", "auto", on_gpus, may_offload=False)
    check_automatic("org/model", "auto", [*on_gpus, *fallen], may_offload=True)
    with pytest.raises(LoadFailure) as caught:
        check_automatic("org/model", "balanced", [*on_gpus, *fallen], may_offload=False)

    assert caught.value.code == "VLM714"
    assert caught.value.message == (
        'device_map="balanced" has put 5 parts (4.0 GiB) of org/model off the GPUs (model.layers.0 is on cpu; '
        "model.layers.1 is on cpu; model.layers.2 is on cpu; and 2 more): run vlm-doctor to see who holds memory, let the "
        'planner place the model (device_map="doctor"), or allow it with --vlm-allow-offload.'
    )


def test_the_gpus_that_transformers_has_chosen(gpu: Callable[..., Any]) -> None:
    stages = stages_of({"model": 2, "lm_head": 0, "norm": 2, "tail": "cpu"}, {0: gpu(4), 2: gpu(5)})

    assert [(stage.gpu, stage.keys) for stage in stages] == [(5, ("model", "norm")), (4, ("lm_head",))]
    assert [stage.uuid for stage in stages] == [gpu(5).uuid, gpu(4).uuid]
    assert stages_of({"": "cpu"}, {0: gpu(4)}) == ()
