from __future__ import annotations

from typing import Any

import pytest

from vlm_doctor.errors import UsageError
from vlm_doctor.planner import validate_policy, validate_workload
from vlm_doctor.workload import Policy, Training, Workload

from .profiles import glm41v_9b, machine


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_tokens": -1}, "text_tokens must be between 0 and 10,000,000, not -1."),
        ({"text_tokens": 10_000_001}, "text_tokens must be between 0 and 10,000,000, not 10,000,001."),
        ({"new_tokens": -5}, "new_tokens must be between 0 and 10,000,000, not -5."),
        ({"batch": 0}, "batch must be between 1 and 4,096, not 0."),
        ({"training": Training(lora_rank=0)}, "lora_rank must be between 1 and 65,536, not 0."),
        ({"images": -1}, "images must be between 0 and 4,096, not -1."),
        ({"image_height": 0}, "image_height must be between 1 and 65,536, not 0."),
        ({"image_width": 70_000}, "image_width must be between 1 and 65,536, not 70,000."),
        (
            {"text_tokens": 0, "images": 0},
            "The workload has neither text nor images: ask for at least 1 text token or 1 image.",
        ),
    ],
)
def test_a_workload_that_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        validate_workload(Workload(**fields))
    assert str(refused.value) == message


def test_quantizing_twice_is_refused() -> None:
    with pytest.raises(UsageError) as refused:
        validate_workload(Workload(quantization="nf4"), glm41v_9b(quantization="awq"))
    assert str(refused.value) == (
        "zai-org/GLM-4.1V-9B-Thinking is already quantized (awq): "
        "bitsandbytes cannot load it in nf4; leave the quantization out."
    )


@pytest.mark.parametrize("profile", [None, glm41v_9b()])
def test_a_usual_workload_passes(profile: Any) -> None:
    validate_workload(Workload(quantization="int8", image_height=336, training=Training()), profile)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"headroom_fraction": 1.0}, "headroom_fraction must be at least 0 and below 1, not 1.0."),
        ({"headroom_fraction": float("nan")}, "headroom_fraction must be at least 0 and below 1, not nan."),
        ({"headroom_min_bytes": -1}, "headroom_min_bytes must not be negative, not -1."),
        ({"context_bytes": -1}, "context_bytes must not be negative, not -1."),
        ({"min_gpus": 0}, "min_gpus must be at least 1, not 0."),
        ({"min_gpus": 3, "max_gpus": 2}, "max_gpus (2) must not be below min_gpus (3)."),
        ({"max_gpus": 0}, "max_gpus must be at least 1, not 0."),
        ({"gpus": (0, 5)}, "There is no GPU 5 on this machine: it has GPU 0, 1."),
        ({"gpus": ()}, "The list of GPUs to use is empty: name at least one, or leave it out."),
        ({"exclude": (4,)}, "There is no GPU 4 on this machine: it has GPU 0, 1."),
        ({"exclude": (1, 0)}, "Every GPU is excluded: exclude fewer of GPU 0, 1."),
        ({"exclude": (1,), "gpus": (1,)}, "Every GPU is excluded: exclude fewer of GPU 1."),
        ({"pins": (("lm_head", 3),)}, "There is no GPU 3 on this machine: it has GPU 0, 1."),
        ({"max_memory": ((2, 1),)}, "There is no GPU 2 on this machine: it has GPU 0, 1."),
        ({"max_memory": ((1, 0),)}, "max_memory of GPU 1 must be more than 0 bytes, not 0; leave it out with exclude."),
        ({"max_memory": ((1, 8), (1, 9))}, "max_memory names GPU 1 twice: give it one limit."),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        validate_policy(Policy(**fields), machine([8, 8]))
    assert str(refused.value) == message


def test_a_gpu_asked_of_a_machine_without_any_is_refused() -> None:
    with pytest.raises(UsageError, match="There is no GPU 0 on this machine: it has no GPU"):
        validate_policy(Policy(gpus=(0,)), machine([]))


def test_a_usual_policy_passes() -> None:
    validate_policy(Policy(gpus=(1,), max_gpus=1, context_bytes=0), machine([8, 8]))
