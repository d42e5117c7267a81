"""Pages of trials: each line says what is there, and nothing that is not."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_doctor import load_machine, load_profile, plan
from vlm_doctor.formats.page import Page
from vlm_doctor.formats.trial_text import write_trial
from vlm_doctor.placement import Plan
from vlm_doctor.trial import Attempt, Peak, SplitBlock
from vlm_doctor.trial_verdict import judged
from vlm_doctor.units import GIB
from vlm_doctor.workload import Policy, Workload

MACHINE = load_machine("2xL4")
RAN: dict[str, Any] = {
    "state": "ran",
    "reached": "second call",
    "load_seconds": 8.4,
    "call_seconds": 1.2,
    "prompt_tokens": 60,
    "new_tokens": 16,
    "is_finite": True,
    "is_repeatable": True,
}


def page(*attempts: Attempt, plan: Plan | None = None, verbose: bool = False) -> str:
    gpus = {"plan": [0, 1], "auto": [0, 1]}
    trial = judged(attempts, model="org/m", machine="2xL4", workload=Workload(), plan=plan, gpus=gpus)
    made = Page(width=100)
    write_trial(made, trial, plan, MACHINE, verbose=verbose)
    return made.render()


def test_a_trial_on_the_cpu() -> None:
    text = page(Attempt(route="cpu", **RAN, host_peak_bytes=2 * GIB, text="A cat.", notes=("So it is.",)))

    assert "Loaded by the CPU" in text
    assert "Most memory of the process on the host: 2.0 GiB." in text
    assert "Tensors: all on the CPU" in text
    assert "Logits: finite; the same tokens when asked again" in text
    assert "With the CPU: So it is." in text
    assert "A cat." not in text


def test_the_answer_is_shown_to_whoever_asks() -> None:
    assert "Answer: A cat." in page(Attempt(route="cpu", **RAN, text="A cat."), verbose=True)
    assert "Answer:" not in page(Attempt(route="cpu", **RAN), verbose=True)


def test_what_is_wrong_with_the_model_is_counted() -> None:
    wrong = {**RAN, "is_finite": False, "is_repeatable": False}
    text = page(Attempt(route="cpu", **wrong, missing=("a",), missing_count=2, astray=("b",), astray_count=3))

    assert text.startswith("Failed: tensors are elsewhere than planned, the answer of the trial means nothing.")
    assert "Tensors: 3 elsewhere than planned" in text
    assert "Weights: 2 missing" in text
    assert "Logits: NaN or infinity; other tokens when asked again" in text


def test_a_process_that_said_nothing() -> None:
    text = page(Attempt(route="cpu", state="crashed", message="SIGKILL"))

    assert "With      not known: it did not come so far" in text
    assert "Tensors:" not in text
    assert "Most memory" not in text


@pytest.mark.parametrize("offload", [False, True])
def test_planned_stands_beside_measured(offload: bool) -> None:
    spec = "24GiB,24GiB" if not offload else "12GiB,4GiB"
    made = plan(load_profile("zai-org/GLM-4.1V-9B-Thinking"), load_machine(spec), Workload(), Policy(offload=offload))
    assert made.fits
    peak = Peak(device="cuda:0", allocated_bytes=GIB, reserved_bytes=2 * GIB, free_bytes=3 * GIB)
    text = page(Attempt(route="plan", **RAN, peaks=(peak,), held_bytes={"cuda:0": GIB}), plan=made)

    assert ("and the CPU" in text) is offload
    assert "tensors plan" in text
    row = next(line for line in text.splitlines() if line.startswith("  GPU 0")).split("  ")
    assert [cell.strip() for cell in row if cell.strip()][1] == "1.0 GiB"
    assert "2.0 GiB" in text


def test_auto_beside_it_without_a_plan_that_fits() -> None:
    made = plan(load_profile("zai-org/GLM-4.1V-9B-Thinking"), load_machine("4GiB"))
    cut = (SplitBlock(key="model.layers.3", devices=("cuda:0", "meta")),)
    held = {"cuda:0": GIB, "meta": 2 * GIB}
    text = page(
        Attempt(route="auto", **{**RAN, "is_finite": False}, cut_blocks=cut, cut_count=1, held_bytes=held), plan=made
    )

    assert text.startswith("Nothing was loaded by plan, since none fits.")
    assert "model.layers.3 (cuda:0, meta)" in text
    assert "off the GPUs" in text
    assert "2.0 GiB" in text
    assert "yes, 16 tokens in 1.2 s, not finite" in text


def test_auto_that_did_not_load() -> None:
    failed = Attempt(route="auto", state="raised", reached="imports", traceback="Traceback:\nValueError: no.")
    text = page(Attempt(route="cpu", **RAN), failed, verbose=True)

    assert "no: it failed while the weights were loaded: ValueError: no." in " ".join(text.split())
    assert 'Traceback with device_map="auto"' in text
