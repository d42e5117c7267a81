"""Exit status, verdict and next step."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from vlm_doctor.findings import Diagnosis, Finding, Fix, Outcome, Severity
from vlm_doctor.machine import Driver, Gpu, Machine, PciDevice
from vlm_doctor.placement import Plan
from vlm_doctor.report import Report
from vlm_doctor.verdict import Step, could_not_look, exit_status, focus, next_step, summary, verdict
from vlm_doctor.workload import Workload

HEALTHY = Machine(
    origin="recorded",
    description="2 x NVIDIA L4",
    gpus=tuple(Gpu(index=index, uuid=f"GPU-{index}", name="NVIDIA L4") for index in range(2)),
)
BLIND = Machine(
    origin="recorded",
    description="1 NVIDIA GPU on the PCI bus, none answering",
    pci_devices=(PciDevice(bus_id="0000:01:00.0", device_id="2335"),),
    driver=Driver(nvml_state="crashed"),
)
EMPTY = Machine(origin="recorded", description="no NVIDIA GPU")


def finding(code: str, severity: Severity, *, gpus: tuple[int, ...] = (), fix: Fix | None = None) -> Finding:
    return Finding(code=code, severity=severity, title="", message="", gpus=gpus, fix=fix)


def diagnosis(*findings: Finding) -> Diagnosis:
    return Diagnosis(
        outcomes=tuple(Outcome(code=each.code, title="", state="found", findings=(each,)) for each in findings)
    )


def plan(*, fits: bool) -> Plan:
    return Plan(
        model="m", machine="m", fits=fits, workload=Workload(), dtype="bfloat16", prompt_tokens=0, image_tokens=0,
        device_map={}, max_memory={}, cuda_visible_devices="", stages=(),
    )  # fmt: skip


def report(machine: Machine, *findings: Finding) -> Report:
    return Report(version="0", machine=machine, diagnosis=diagnosis(*findings), exit_status=0)


ERROR, WARNING, INFO = finding("VLM501", "error"), finding("VLM503", "warning"), finding("VLM401", "info")


@pytest.mark.parametrize(
    ("found", "strict", "status"),
    [
        ((), False, 0),
        ((INFO,), True, 0),
        ((WARNING,), False, 0),
        ((WARNING,), True, 1),
        ((ERROR,), False, 1),
        ((ERROR, WARNING), True, 1),
    ],
)
def test_errors_decide_and_warnings_only_when_strict(found: tuple[Finding, ...], strict: bool, status: int) -> None:
    assert exit_status(HEALTHY, diagnosis(*found), strict=strict) == status


def test_a_plan_that_does_not_fit_is_a_problem() -> None:
    assert exit_status(HEALTHY, diagnosis(), plan(fits=False)) == 1
    assert exit_status(HEALTHY, diagnosis(), plan(fits=True)) == 0
    assert exit_status(HEALTHY, None, plan(fits=True)) == 0


@pytest.mark.parametrize("state", ["no_binding", "error", "crashed", "timed_out"])
def test_gpus_that_nobody_could_ask_are_neither_good_nor_bad(
    state: Literal["no_binding", "error", "crashed", "timed_out"],
) -> None:
    by_bus = msgspec.structs.replace(BLIND, driver=Driver(nvml_state=state))
    by_file = Machine(origin="live", description="", driver=Driver(nvml_state=state, device_files=("/dev/nvidia0",)))

    for machine in (by_bus, by_file):
        assert exit_status(machine, diagnosis(finding("VLM105", "error"))) == 3
        assert exit_status(machine, None, plan(fits=False)) == 3


def test_a_cause_that_was_found_is_no_blindness() -> None:
    assert exit_status(BLIND, diagnosis(finding("VLM105", "error"), finding("VLM104", "error"))) == 1
    assert exit_status(BLIND, diagnosis(finding("VLM105", "error"), finding("VLM310", "error"))) == 1
    assert exit_status(BLIND, diagnosis(finding("VLM503", "warning"), finding("VLM601", "error"))) == 3


def test_an_error_of_nvml_whose_cause_is_known_is_no_blindness() -> None:
    known = msgspec.structs.replace(finding("VLM105", "error"), cause="The host took the GPUs from this container.")
    assert exit_status(BLIND, diagnosis(known)) == 1
    assert exit_status(BLIND, diagnosis(known.demoted("--ignore VLM105"))) == 3


@pytest.mark.parametrize(
    "machine",
    [
        HEALTHY,
        EMPTY,
        msgspec.structs.replace(BLIND, driver=Driver(nvml_state="no_library")),
        msgspec.structs.replace(EMPTY, driver=Driver(nvml_state="crashed")),
    ],
)
def test_where_there_is_something_to_see_or_nothing_to_expect_the_doctor_could_look(machine: Machine) -> None:
    assert not could_not_look(machine)


def test_focus_demotes_what_is_about_other_gpus_only() -> None:
    found = diagnosis(
        finding("VLM108", "error", gpus=(0,)), finding("VLM111", "error", gpus=(0, 1)), finding("VLM306", "error")
    )

    focused = focus(found, (1,))

    assert [(each.code, each.severity) for each in focused.findings] == [
        ("VLM111", "error"),
        ("VLM306", "error"),
        ("VLM108", "info"),
    ]
    assert [outcome.state for outcome in focused.outcomes] == ["found", "found", "found"]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ((), "no errors, no warnings"),
        ((INFO,), "no errors, no warnings"),
        ((WARNING, WARNING), "2 warnings"),
        ((ERROR, ERROR, WARNING), "2 errors, 1 warning"),
    ],
)
def test_summary_counts(found: tuple[Finding, ...], text: str) -> None:
    assert summary(diagnosis(*found)) == text


ONE = msgspec.structs.replace(HEALTHY, gpus=HEALTHY.gpus[:1])
ONE_OF_TWO = msgspec.structs.replace(
    HEALTHY, gpus=(HEALTHY.gpus[0], msgspec.structs.replace(HEALTHY.gpus[1], error="lost"))
)


@pytest.mark.parametrize(
    ("machine", "found", "text"),
    [
        (HEALTHY, (), "Ready: 2 GPUs, no errors, no warnings."),
        (ONE, (INFO,), "Ready: 1 GPU, no errors, no warnings."),
        (ONE_OF_TWO, (WARNING,), "Usable: 1 GPU, 1 warning."),
        (HEALTHY, (ERROR, WARNING), "Not ready: 1 error, 1 warning."),
        (EMPTY, (), "No NVIDIA GPU here: nothing to run on, nothing to repair."),
        (EMPTY, (ERROR,), "Not ready: 1 error."),
        (BLIND, (), "Could not look: there are NVIDIA GPUs, but the driver library (NVML) does not answer."),
    ],
)
def test_verdict_in_one_sentence(machine: Machine, found: tuple[Finding, ...], text: str) -> None:
    assert verdict(report(machine, *found)) == text


def test_without_diagnosis_there_is_no_verdict() -> None:
    undiagnosed = Report(version="0", machine=HEALTHY, exit_status=0)

    assert verdict(undiagnosed) == "Not examined."
    assert next_step(undiagnosed) is None


YOURS = Fix(text="Stop it.", commands=("kill 1",))
THEIRS = Fix(text="Reset the GPU.", who="administrator")


def test_next_step_is_the_worst_that_you_can_repair_yourself() -> None:
    found = (
        finding("VLM111", "error", fix=THEIRS),
        finding("VLM501", "error", fix=YOURS),
        finding("VLM503", "warning", fix=YOURS),
    )

    assert next_step(report(HEALTHY, *found)) == Step(text="Stop it. (VLM501)", commands=("kill 1",), verify="vlm-doctor")


def test_next_step_may_need_the_administrator() -> None:
    step = next_step(report(HEALTHY, finding("VLM111", "error", fix=THEIRS), finding("VLM503", "warning", fix=YOURS)))

    assert step == Step(text="Ask your administrator: Reset the GPU. (VLM111)", verify="vlm-doctor")


def test_what_is_fine_or_has_no_fix_needs_no_step() -> None:
    assert next_step(report(HEALTHY, finding("VLM401", "info", fix=YOURS), ERROR)) is None


def test_the_verdict_counts_hidden_gpus_apart() -> None:
    hidden = msgspec.structs.replace(HEALTHY, environment={"CUDA_VISIBLE_DEVICES": "1"})
    assert verdict(report(hidden)) == "Ready: 1 of 2 GPUs visible, no errors, no warnings."
    assert verdict(report(hidden, WARNING)) == "Usable: 1 of 2 GPUs visible, 1 warning."
    assert verdict(report(HEALTHY)) == "Ready: 2 GPUs, no errors, no warnings."
