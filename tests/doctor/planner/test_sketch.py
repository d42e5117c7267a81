"""A plan at a glance: what it says must hold for the whole plan too."""

from __future__ import annotations

import pytest

from vlm_doctor.planner import plan, sketch
from vlm_doctor.planner.problem import Problem
from vlm_doctor.planner.replay import Held, Program
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.workload import Policy, Workload

NAMES = ("zai-org/GLM-4.1V-9B-Thinking", "llava-hf/llava-1.5-13b-hf", "zai-org/glm-4v-9b", "Qwen/Qwen2.5-VL-72B-Instruct")
SPECS = ("2xL4", "12GiB,23.5GiB", "16GiB,10GiB", "8xA100", "8GiB", "8x24GiB", "4x3090:nvlink=0-1,2-3")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_it_fits_where_the_plan_does_on_as_many_gpus(name: str, spec: str) -> None:
    profile, machine = load_profile(name, allow_network=False), load_machine(spec)
    whole, glance = plan(profile, machine), sketch(profile, machine, Workload(), Policy())
    assert (glance.fits, len(glance.stages)) == (whole.fits, len(whole.stages))
    assert glance.device_map.keys() == whole.device_map.keys()
    assert glance.shortage is None or whole.shortage is not None
    assert (glance.longest_prompt_tokens, glance.limits, glance.auto) == (None, None, None)


def test_it_asks_the_allocator_once_where_that_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    runs = Program.runs

    def counted(program: Program, held: Held, tokens: int, capacity_bytes: int) -> bool:
        asked.append(tokens)
        return runs(program, held, tokens, capacity_bytes)

    monkeypatch.setattr(Program, "runs", counted)
    sketch(load_profile(NAMES[0], allow_network=False), load_machine("2xL4"), Workload(), Policy())
    assert len(asked) == 1


def test_what_the_allocator_refuses_is_placed_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    profile, machine = load_profile(NAMES[0], allow_network=False), load_machine("12GiB,23.5GiB")
    placed = plan(profile, machine).device_map
    monkeypatch.setattr(Problem, "split_fits", lambda *_: False)
    assert sketch(profile, machine, Workload(), Policy()).device_map == placed
