"""The plugin's own planner: that of vlm-doctor, asked for the process that tests run in."""

from __future__ import annotations

from pytest_vlmgpu.models.ladder import make_planner
from pytest_vlmgpu.requirements import VlmSpec
from vlm_doctor import Policy, Workload, load_machine, load_profile, plan

MODEL = "zai-org/GLM-4.1V-9B-Thinking"


def test_what_a_model_is_given_goes_to_its_first_stage_whatever_number_that_has_in_the_session() -> None:
    """The loader sees to that (``first_stage.py``), so that a plan pays for no copies to another GPU."""
    machine = load_machine("14GiB+16GiB")
    workload = Workload(images=8, image_height=1120, image_width=1120, text_tokens=64)
    policy = Policy(pins=(("model.visual", 1), ("lm_head", 0)))

    here = make_planner(workload, policy)(VlmSpec(MODEL, min_gpus=2), machine, (0, 1))
    assert here is not None
    alone = plan(load_profile(MODEL), machine, workload, Policy(pins=policy.pins, min_gpus=2))

    assert [stage.gpu for stage in here.stages] == [1, 0]
    assert (here.stages, here.longest_prompt_tokens) == (alone.stages, alone.longest_prompt_tokens)
