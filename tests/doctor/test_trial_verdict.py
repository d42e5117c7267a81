"""What is said of a trial, from what its processes told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vlm_doctor import load_machine, load_profile, plan
from vlm_doctor.placement import Plan
from vlm_doctor.trial import Attempt, Peak, SplitBlock, Trial
from vlm_doctor.trial_verdict import TITLES, TOLERANCE_BYTES, judged
from vlm_doctor.units import GIB
from vlm_doctor.workload import Policy, Workload

MODEL = "zai-org/GLM-4.1V-9B-Thinking"
RAN: dict[str, Any] = {
    "state": "ran",
    "reached": "second call",
    "load_seconds": 8.41,
    "call_seconds": 1.2,
    "prompt_tokens": 1300,
    "new_tokens": 16,
    "is_finite": True,
    "is_repeatable": True,
}
OUT_OF_MEMORY = (
    'Traceback (most recent call last):\n  File "/x/modeling_glm4v.py", line 9, in forward\n    y = self.mlp(x)\n'
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 22.00 GiB of "
    "which 1.00 GiB is free. Including non-PyTorch memory, this process has 21.00 GiB memory in use. Of the allocated "
    "memory 20.00 GiB is allocated by PyTorch, and 50.00 MiB is reserved by PyTorch but unallocated.\n"
)


@pytest.fixture(scope="module")
def planned() -> Plan:
    made: Plan = plan(load_profile(MODEL), load_machine("2xL4"), Workload(), Policy(min_gpus=2))
    return made


def judge(*attempts: Attempt, plan: Plan | None = None) -> Trial:
    gpus = {"plan": [0, 1], "auto": [0, 1]}
    return judged(attempts, model="org/m", machine="here", workload=Workload(), plan=plan, gpus=gpus)


def attempt(route: Any = "cpu", **fields: Any) -> Attempt:
    return Attempt(route=route, **{**RAN, **fields})


def failed(**fields: Any) -> Attempt:
    return Attempt(route="cpu", **fields)


def test_a_good_one_is_one_sentence() -> None:
    trial = judge(attempt())

    assert (trial.is_good, trial.findings) == (True, ())
    assert trial.sentence == "Loaded in 8.4 s, then 16 tokens in 1.2 s from a prompt of 1,300."


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"state": "crashed", "reached": "imports", "message": "SIGKILL"},
            "It crashed while the weights were loaded: the process was killed (SIGKILL), which is what the kernel does "
            "when the host or the container runs out of memory.",
        ),
        (
            {"state": "crashed", "reached": "prompt", "message": "SIGSEGV: Fatal Python error: Segmentation fault"},
            "It crashed in the first call: the process crashed inside a library (SIGSEGV); its last words: Fatal Python "
            "error: Segmentation fault.",
        ),
        (
            {"state": "crashed", "message": "SIGFPE"},
            "It crashed while torch and transformers were imported: the process was ended by SIGFPE.",
        ),
        (
            {"state": "crashed", "reached": "weights", "message": "exit status 3: bye."},
            "It crashed while the prompt was made: exit status 3: bye.",
        ),
        ({"state": "crashed", "reached": "call"}, "It crashed in the second call: for an unknown reason."),
        (
            {"state": "timed_out", "reached": "imports", "message": "no answer within 900 s"},
            "It was stopped while the weights were loaded: no answer within 900 s.",
        ),
        (
            {"state": "raised", "reached": "prompt", "traceback": "Traceback ...\n  x\nNovelError: what\n is this?\n"},
            "It failed in the first call: NovelError: what.",
        ),
        ({"state": "raised", "message": "SystemExit"}, "It failed while torch and transformers were imported: SystemExit."),
        ({"state": "raised"}, "It failed while torch and transformers were imported: unknown."),
        (
            {"state": "raised", "traceback": f"ValueError: {'x' * 1000}"},
            f"It failed while torch and transformers were imported: ValueError: {'x' * 288} ....",
        ),
    ],
)
def test_each_end_is_one_clear_sentence(fields: dict[str, Any], sentence: str) -> None:
    trial = judge(failed(**fields))

    assert (trial.is_good, trial.sentence) == (False, sentence)
    (finding,) = trial.findings
    assert (finding.code, finding.severity, finding.message) == ("VLM640", "error", sentence)
    assert finding.fix is not None


def test_a_known_error_has_its_cause_and_its_advice() -> None:
    text = "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cuda:1!"
    trial = judge(failed(state="raised", reached="prompt", traceback=f"Traceback (most recent call last):\n{text}\n"))

    (finding,) = trial.findings
    assert finding.message == f"It failed in the first call: {text}"
    assert finding.cause is not None
    assert "different devices" in finding.cause
    assert finding.fix is not None
    assert finding.fix.commands[0] == "vlm-doctor check-map MAP --model org/m"


def test_out_of_memory_is_told_with_its_figures(planned: Plan) -> None:
    peak = Peak(device="cuda:1", allocated_bytes=20 * GIB, reserved_bytes=21 * GIB, free_bytes=GIB)
    trial = judge(
        Attempt(route="plan", state="raised", reached="prompt", traceback=OUT_OF_MEMORY, peaks=(peak,)),
        plan=planned,
    )

    error = trial.attempts[0].error
    assert error is not None
    assert error.cause is not None
    assert error.cause.code == "VLM010"
    assert error.facts["tried to allocate"] == "2.0 GiB"


def test_predictions_stand_beside_what_was_measured(planned: Plan) -> None:
    stage = planned.stages[1]
    assert stage.reserved_bytes is not None
    peaks = (
        Peak(device="cuda:1", allocated_bytes=1, reserved_bytes=stage.reserved_bytes, free_bytes=0),
        Peak(device="cuda:7", allocated_bytes=1, reserved_bytes=2, free_bytes=3),
    )
    ours, auto = judge(attempt("plan", peaks=peaks), attempt("auto", peaks=peaks), plan=planned).attempts

    assert (ours.peaks[0].gpu, ours.peaks[0].planned_allocated_bytes) == (1, stage.peak_bytes)
    assert ours.peaks[0].planned_reserved_bytes == stage.reserved_bytes
    assert (ours.peaks[1].gpu, ours.peaks[1].planned_allocated_bytes) == (None, None)
    assert (auto.peaks[0].gpu, auto.peaks[0].planned_allocated_bytes) == (1, None)


@pytest.mark.parametrize("tells_segments", [True, False])
def test_a_peak_above_the_plan_is_a_warning(planned: Plan, tells_segments: bool) -> None:
    stage = planned.stages[0]
    if not tells_segments:
        stages = (msgspec.structs.replace(stage, reserved_bytes=None), planned.stages[1])
        planned = msgspec.structs.replace(planned, stages=stages)
    said = stage.reserved_bytes if tells_segments else stage.peak_bytes
    assert said is not None
    slack = max(TOLERANCE_BYTES, int(0.02 * said))

    def tried(size: int) -> Trial:
        peak = Peak(device="cuda:0", allocated_bytes=size, reserved_bytes=size, free_bytes=0)
        return judge(attempt("plan", peaks=(peak,)), plan=planned)

    assert tried(said + slack).findings == ()
    trial = tried(said + slack + 1)
    assert [(finding.code, finding.severity) for finding in trial.findings] == [("VLM642", "warning")]
    assert trial.is_good


def test_tensors_elsewhere_are_an_error() -> None:
    few = judge(attempt(astray=("a is on cpu, planned cuda:0",), astray_count=1))
    many = judge(attempt(astray=("a is on cpu, planned cuda:0",), astray_count=9))

    assert not few.is_good
    assert few.sentence == "1 tensor is elsewhere than planned: a is on cpu, planned cuda:0."
    assert many.sentence.endswith("a is on cpu, planned cuda:0; and 8 more.")
    assert few.findings[0].code == "VLM641"


@pytest.mark.parametrize(
    ("fields", "is_good", "begins"),
    [
        ({"missing": ("a.weight",), "missing_count": 1}, False, "The checkpoint lacks 1 of the model's weights"),
        ({"missing": ("a.weight",), "missing_count": 3}, False, "The checkpoint lacks 3 of the model's weights"),
        ({"is_finite": False}, False, "The logits hold NaN or infinity"),
        ({"is_repeatable": False}, True, "The same call, asked again, gave other tokens"),
    ],
)
def test_an_answer_that_means_nothing(fields: dict[str, Any], is_good: bool, begins: str) -> None:
    trial = judge(attempt(**fields))

    assert trial.is_good is is_good
    assert [finding.code for finding in trial.findings] == ["VLM643"]
    assert trial.findings[0].message.startswith(begins)


def test_nothing_is_loaded_by_a_plan_that_does_not_fit() -> None:
    misfit = plan(load_profile(MODEL), load_machine("4GiB"))
    trial = judge(attempt("auto"), plan=misfit)

    assert misfit.shortage is not None
    assert not trial.is_good
    assert trial.sentence == f"Nothing was loaded by plan, since none fits. {misfit.shortage.message}"
    assert trial.attempts[0].sentence.startswith("Loaded in")
    assert judge().sentence == "Nothing was loaded by plan, since none fits. The plan does not fit."


def test_what_an_attempt_tells() -> None:
    one = attempt(held_bytes={"cuda:0": 5, "cpu": 2, "meta": 1}, cut_blocks=(SplitBlock(key="a", devices=("x", "y")),))

    assert (one.is_loaded, one.offloaded_bytes) == (True, 3)
    assert not failed(state="raised", reached="imports").is_loaded


def test_every_title_is_a_pattern() -> None:
    assert all(not title.endswith(".") for title in TITLES.values())
