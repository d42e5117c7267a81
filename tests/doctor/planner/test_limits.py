"""The inverse questions: each limit is the last that fits, and the next does not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_doctor.machine import Machine
from vlm_doctor.model import ModelProfile
from vlm_doctor.placement import Limits
from vlm_doctor.planner import plan
from vlm_doctor.planner.validate import MAX_BATCH, MAX_TOKENS
from vlm_doctor.workload import Policy, Training, Workload

from .examples import examples
from .profiles import glm41v_9b, llava_13b, machine

ONE_GPU = Policy(max_gpus=1)


def limits(profile: ModelProfile, there: Machine, workload: Workload, policy: Policy = ONE_GPU) -> Limits:
    made = plan(profile, there, workload, policy)
    assert made.limits is not None
    return made.limits


def fits(profile: ModelProfile, there: Machine, workload: Workload, **fields: Any) -> bool:
    # On one GPU there is but one placement, so that a plan tells what it can take.
    return plan(profile, there, msgspec.structs.replace(workload, **fields), ONE_GPU).fits


@given(st.integers(21, 40), st.integers(0, 2), st.integers(1, 3), st.integers(1, 4_000))
@settings(max_examples=examples(10), deadline=None)
def test_each_limit_is_the_last_that_fits(free_gib: int, images: int, batch: int, text_tokens: int) -> None:
    profile, there = glm41v_9b(), machine([free_gib])
    workload = Workload(images=images, batch=batch, text_tokens=text_tokens, image_height=504)
    if not fits(profile, there, workload):
        assert plan(profile, there, workload, ONE_GPU).limits is None
        return
    found = limits(profile, there, workload)
    assert found.images is not None
    assert found.new_tokens is not None
    for field, most in (("new_tokens", found.new_tokens), ("batch", found.batch), ("images", found.images)):
        assert fits(profile, there, workload, **{field: most})
        assert not fits(profile, there, workload, **{field: most + 1})
    tokens = plan(profile, there, workload, ONE_GPU).image_tokens
    assert fits(profile, there, workload, text_tokens=found.prompt_tokens - tokens)
    assert not fits(profile, there, workload, text_tokens=found.prompt_tokens - tokens + 1)
    assert (found.image_edge is None) == (images == 0)
    if found.image_edge is not None:
        assert found.image_edge % 28 == 0
        assert fits(profile, there, workload, image_height=found.image_edge, image_width=found.image_edge)
        larger = found.image_edge + 28
        assert not fits(profile, there, workload, image_height=larger, image_width=larger)


def test_positions_of_the_model_bound_what_memory_would_allow() -> None:
    text = msgspec.structs.replace(glm41v_9b().text, max_positions=4_096)
    found = limits(glm41v_9b(text=text), machine([80]), Workload(text_tokens=100))
    assert found.new_tokens == 4_096 - 1_296 - 100
    assert found.prompt_tokens == 4_096 - 256
    assert found.images == 2


def test_a_workload_beyond_the_positions_is_its_own_limit() -> None:
    text = msgspec.structs.replace(glm41v_9b().text, max_positions=1_024)
    found = limits(glm41v_9b(text=text), machine([80]), Workload())
    assert (found.new_tokens, found.batch, found.images, found.image_edge) == (256, 1, 1, 448)


def test_no_size_of_an_image_may_have_positions() -> None:
    text = msgspec.structs.replace(glm41v_9b().text, max_positions=700)
    assert limits(glm41v_9b(text=text), machine([80]), Workload(text_tokens=600)).image_edge is None


def test_the_processor_bounds_images() -> None:
    usual = glm41v_9b().image
    assert usual is not None
    rule = msgspec.structs.replace(usual, max_pixels=1_000_000)
    assert limits(glm41v_9b(image=rule), machine([80]), Workload()).image_edge == 980


def test_models_that_make_one_size_of_every_image_have_no_edge() -> None:
    found = limits(llava_13b(), machine([80]), Workload())
    assert found.image_edge is None
    assert found.images is not None
    assert found.images > 1


def test_a_model_without_images_has_no_limit_on_them() -> None:
    found = limits(glm41v_9b(vision=None, image=None), machine([80]), Workload(images=0))
    assert (found.images, found.image_edge) == (None, None)


@pytest.mark.parametrize(("field", "most"), [("batch", MAX_BATCH), ("new_tokens", MAX_TOKENS)])
def test_limits_end_where_workloads_do(field: str, most: int) -> None:
    found = limits(glm41v_9b(), machine([100_000]), Workload(images=0, text_tokens=1))
    assert getattr(found, field) == most


@pytest.mark.parametrize("fields", [{"logits": "forward"}, {"training": Training()}])
def test_a_call_that_makes_no_answer_has_the_same_limits_whatever_its_new_tokens(fields: dict[str, Any]) -> None:
    text = msgspec.structs.replace(glm41v_9b().text, max_positions=4_096)
    asked = Workload(images=0, text_tokens=100, new_tokens=3_000, **fields)
    found = limits(glm41v_9b(text=text), machine([80]), asked)
    assert (found.new_tokens, found.prompt_tokens) == (None, 4_096)
    assert found == limits(glm41v_9b(text=text), machine([80]), msgspec.structs.replace(asked, new_tokens=0))
