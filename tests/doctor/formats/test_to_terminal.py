"""The report for people: whole texts against golden files, and the properties that every text must have."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from vlm_doctor.answer import check_report as check_report_of
from vlm_doctor.findings import Diagnosis, Finding, Fix, Outcome
from vlm_doctor.formats import Look, render
from vlm_doctor.formats.machine_text import torch_line
from vlm_doctor.formats.to_terminal import head, tail
from vlm_doctor.machine import Driver, Gpu, Host, Libraries, Link, Machine, PciDevice, TorchView
from vlm_doctor.report import Report
from vlm_doctor.sources import load_machine
from vlm_doctor.workload import Workload

MACHINES = Path(__file__).parents[2] / "machines"

Golden = Callable[[str, str], None]
REPORTS = ["check_report", "plan_report", "misfit_report"]
PASTE = ("    ", "os.environ", "from ", "# ", "processor", "model", "vlm-doctor", "  vlm-doctor")
"""How lines begin that are to be pasted, which are never wrapped."""


def replace(record: Report, **changes: object) -> Report:
    return msgspec.structs.replace(record, **changes)


@pytest.fixture(params=REPORTS)
def report(request: pytest.FixtureRequest) -> Report:
    report: Report = request.getfixturevalue(request.param)
    return report


@pytest.mark.parametrize("name", REPORTS)
def test_whole_text(name: str, request: pytest.FixtureRequest, golden: Golden) -> None:
    golden(f"terminal/{name}.txt", render(request.getfixturevalue(name), "terminal"))


@pytest.mark.parametrize("name", REPORTS)
def test_whole_text_verbose_in_ascii(name: str, request: pytest.FixtureRequest, golden: Golden) -> None:
    text = render(request.getfixturevalue(name), "terminal", is_unicode=False, verbose=True)

    assert text.isascii()
    golden(f"terminal/{name}.verbose.txt", text)


def test_whole_text_in_color(check_report: Report, golden: Golden) -> None:
    golden("terminal/check_report.ansi", render(check_report, "terminal", color=True))


@pytest.mark.parametrize("width", [40, 80, 110])
def test_no_line_is_wider_than_asked_but_what_is_to_be_pasted(report: Report, width: int) -> None:
    lines = render(report, "terminal", width=width).splitlines()

    assert [line for line in lines if len(line) > width and not line.startswith(PASTE)] == []


def test_no_color_means_no_escape_sequence(report: Report) -> None:
    assert "\x1b" not in render(report, "terminal")


def test_numbers_stay_with_their_units(report: Report) -> None:
    for width in range(40, 111, 7):
        text = render(report, "terminal", width=width)
        assert not re.search(r"\d\n\s*[MG]iB(?!  )", text), text


def test_worst_finding_comes_first(check_report: Report) -> None:
    text = render(check_report, "terminal")

    assert text.index("✗ error") < text.index("! warning") < text.index("i info") < text.index("GPU  name")


def test_head_and_tail_are_the_whole_report(check_report: Report) -> None:
    look = Look()

    assert head(check_report, look) + tail(check_report, look) == render(check_report, "terminal")


def test_late_answer_of_torch_adds_its_line_and_new_findings_only(check_report: Report) -> None:
    waiting = TorchView(state="not_asked", message="still being asked")
    first = replace(check_report, machine=msgspec.structs.replace(check_report.machine, torch=waiting), plan=None)
    late = Finding(code="VLM206", severity="error", title="torch sees fewer GPUs", message="torch sees 1 of 2 GPUs.")
    outcomes = check_report.diagnosis.outcomes if check_report.diagnosis else ()
    final = replace(
        check_report,
        diagnosis=Diagnosis(
            outcomes=(*outcomes, Outcome(code="VLM206", title=late.title, state="found", findings=(late,)))
        ),
    )

    printed_first, printed_then = head(first, Look()), tail(final, Look(), earlier=first)

    assert "torch ? (still being asked)" in " ".join(printed_first.split())
    assert "torch     2.9.1 (CUDA 13.0) sees 2 GPUs, 1.4 s" in printed_then
    assert "VLM206" in printed_then
    assert "Not ready: 2 errors, 1 warning." in printed_then
    assert printed_then.count("VLM501") == 1, "only in what to do next"


def test_machine_without_gpu_is_told_how_to_plan_for_another(golden: Golden) -> None:
    machine = Machine(
        origin="live", description="no NVIDIA GPU", torch=TorchView(state="absent", message="torch is not installed")
    )
    checks = (Outcome(code="VLM101", title="No NVIDIA GPU", state="passed"),)
    report = Report(version="0.1.0", machine=machine, diagnosis=Diagnosis(outcomes=checks), exit_status=0, seconds=0.1)

    golden("terminal/no_gpu.txt", render(report, "terminal"))


def test_blindness_is_not_called_a_verdict(golden: Golden) -> None:
    machine = Machine(
        origin="live",
        description="1 NVIDIA GPU on the PCI bus, none answering",
        pci_devices=(PciDevice(bus_id="0000:01:00.0", device_id="2335", kernel_driver="nvidia"),),
        driver=Driver(nvml_state="timed_out", nvml_message="no answer in 5 s", kernel_module_version="580.95.05"),
    )
    report = Report(version="0.1.0", machine=machine, diagnosis=Diagnosis(outcomes=()), exit_status=3)

    golden("terminal/blind.txt", render(report, "terminal"))


HOSTILE = "\x1b[31mred\x1b[0m [bold red]markup[/] \u202eleft\u2066 \x07\x00\r\n:smile: \udc80 " + "x" * 5000


def test_hostile_text_is_shown_inert_and_short(check_report: Report) -> None:
    machine = check_report.machine
    gpus = tuple(msgspec.structs.replace(gpu, name=HOSTILE, error=HOSTILE) for gpu in machine.gpus)
    driver = Driver(nvml_state="error", nvml_message=HOSTILE, driver_version=HOSTILE)
    finding = Finding(
        code="VLM1\x1b",
        severity="error",
        title=HOSTILE,
        message=HOSTILE,
        cause=HOSTILE,
        fix=Fix(text=HOSTILE, commands=(HOSTILE,)),
    )
    outcome = Outcome(code="VLM999", title=HOSTILE, state="found", findings=(finding,))
    unknown = Outcome(code="VLM998", title=HOSTILE, state="unknown", reason=HOSTILE)
    report = replace(
        check_report,
        machine=msgspec.structs.replace(machine, gpus=gpus, driver=driver, description=HOSTILE),
        diagnosis=Diagnosis(outcomes=(outcome, unknown)),
        plan=None,
    )

    for is_unicode in (True, False):
        text = render(report, "terminal", is_unicode=is_unicode, verbose=True)

        assert [char for char in text if not char.isprintable() and char != "\n"] == []
        assert "\\x1b[31mred\\x1b[0m [bold red]markup[/]" in text
        assert len(text) < 40_000
        text.encode()


def test_a_plan_names_hostile_modules_inertly(plan_report: Report) -> None:
    plan = plan_report.plan
    assert plan is not None
    stage = msgspec.structs.replace(plan.stages[0], keys=("a.1", "a.2", "a.3", HOSTILE), name=HOSTILE)
    stages = (stage, plan.stages[1])
    report = replace(plan_report, plan=msgspec.structs.replace(plan, stages=stages, model=HOSTILE, machine=HOSTILE))

    text = render(report, "terminal")

    assert [char for char in text if not char.isprintable() and char != "\n"] == []
    assert "a.1-3" in text


@pytest.mark.parametrize("path", sorted(MACHINES.glob("*.json")), ids=lambda path: path.stem)
def test_every_recorded_machine_fits_80_columns(path: Path) -> None:
    report = check_report_of(load_machine(str(path)))

    for is_verbose in (False, True):
        text = render(report, "terminal", verbose=is_verbose)

        links = ("  http", "    ")
        assert [line for line in text.splitlines() if len(line) > 80 and not line.startswith(links)] == []


@pytest.mark.parametrize(
    ("torch", "line"),
    [
        (TorchView(state="not_asked"), "not asked"),
        (TorchView(state="not_asked", message="still being asked"), "still being asked"),
        (TorchView(state="absent", message="torch is not installed"), "not installed"),
        (TorchView(state="timed_out", message="20 s"), "did not answer in time: 20 s"),
        (TorchView(state="crashed", message="SIGSEGV"), "crashed: SIGSEGV"),
        (TorchView(state="failed"), "failed"),
        (TorchView(state="ok"), "? (CPU build) sees ? GPUs"),
        (
            TorchView(state="ok", version="2.9", cuda="13.0", device_count=1, seconds=1.26),
            "2.9 (CUDA 13.0) sees 1 GPU, 1.3 s",
        ),
        (
            TorchView(state="ok", version="2.9", device_count=0, seconds=1.0, is_cached=True),
            "2.9 (CPU build) sees 0 GPUs, remembered from an earlier run",
        ),
    ],
)
def test_what_torch_says(torch: TorchView, line: str) -> None:
    assert torch_line(torch) == line


def test_what_is_not_known_of_a_machine_is_left_out_or_a_question_mark(golden: Golden) -> None:
    machine = Machine(
        origin="recorded",
        description="hardly anything is known",
        gpus=tuple(Gpu(index=index, uuid="", name="?", mig_enabled=not index) for index in range(14)),
        links=(Link(a=0, b=1),),
        driver=Driver(driver_version="1"),
        host=Host(os="Linux", kernel="6"),
        libraries=Libraries(python="3.13.0", executable=""),
    )

    golden("terminal/hardly_known.txt", render(Report(version="0.1.0", machine=machine, exit_status=0), "terminal"))


def test_quantization_and_every_token_s_logits_are_named(plan_report: Report) -> None:
    plan = plan_report.plan
    assert plan is not None
    workload = Workload(images=0, quantization="nf4", logits="forward")
    plan = msgspec.structs.replace(plan, workload=workload, longest_prompt_tokens=None)

    text = render(replace(plan_report, plan=plan), "terminal")

    assert "4 bit (nf4), sdpa attention, logits of every token" in text
    assert "Prompt    512 text tokens, batch 1" in text
    assert "Longest prompt" not in text


def test_larger_images_than_the_processor_keeps_are_no_limit(plan_report: Report) -> None:
    plan = plan_report.plan
    assert plan is not None
    assert plan.limits is not None
    limits = msgspec.structs.replace(plan.limits, image_edge=3584)
    workload = msgspec.structs.replace(plan.workload, image_height=5000, image_width=None)
    changed = msgspec.structs.replace(plan, limits=limits, workload=workload)
    text = " ".join(render(replace(plan_report, plan=changed), "terminal").split())
    assert "or larger images, scaled down to 3,584 x 3,584 pixels too." in text


def test_no_image_is_no_way_to_grow(plan_report: Report) -> None:
    """Where the prompt has no image and none would fit."""
    plan = plan_report.plan
    assert plan is not None
    assert plan.limits is not None
    limits = msgspec.structs.replace(plan.limits, images=0, image_edge=None)

    text = render(replace(plan_report, plan=msgspec.structs.replace(plan, limits=limits)), "terminal")

    assert "30,000 new tokens, or batch 9." in " ".join(text.split())


def test_memory_that_others_hold_is_named_as_the_reason(misfit_report: Report) -> None:
    plan = misfit_report.plan
    assert plan is not None
    assert plan.shortage is not None
    shortage = msgspec.structs.replace(plan.shortage, is_permanent=False, levers=())

    text = render(replace(misfit_report, plan=msgspec.structs.replace(plan, shortage=shortage)), "terminal")

    assert text.startswith("Does not fit now, while other processes hold memory: 2.7 GiB missing.\n")
    assert "What would help" not in text


def test_notes_are_shown(check_report: Report, plan_report: Report) -> None:
    for report in (check_report, plan_report):
        assert "No suggestion: damaged." in render(replace(report, notes=("No suggestion: damaged.",)), "terminal")


def test_a_plan_that_does_not_fit_names_the_code_that_explains_it(misfit_report: Report) -> None:
    found = Finding(code="VLM601", severity="error", title="the model does not fit", message="It does not fit.")
    outcome = Outcome(code=found.code, title=found.title, state="found", findings=(found,))

    text = render(replace(misfit_report, diagnosis=Diagnosis(outcomes=(outcome,))), "terminal")

    assert re.match(r"Does not fit: 2\.7 GiB missing\. +VLM601\n", text)
    assert "This machine has errors" not in text


def test_names_in_commands_are_quoted(check_report: Report) -> None:
    plan = check_report.plan
    assert plan is not None

    text = render(replace(check_report, plan=msgspec.structs.replace(plan, model="a model; rm -rf /")), "terminal")

    assert "vlm-doctor plan 'a model; rm -rf /'" in text
