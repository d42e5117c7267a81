"""The frame around checks: needs, causes, ignoring, and the border where a defect becomes a result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.checks import CHECKS, RETIRED, diagnose
from vlm_doctor.checks._check import NO_GPU_CAUSES, Check, Facts, examine, found, plain, shown, skipped, unknown
from vlm_doctor.machine import Gap, Machine, TorchView

HEADINGS = ["What it checks", "Why it matters", "Example", "What to do", "When it is fine", "Sources"]


def check(run: Callable[[Facts], Any], **fields: Any) -> Check:
    return Check(code="VLM999", title="test", run=run, **fields)


def nothing(facts: Facts) -> tuple[()]:
    return ()


def test_codes_are_unique_well_formed_and_in_order() -> None:
    codes = [one.code for one in CHECKS]

    assert codes == sorted(set(codes))
    assert all(re.fullmatch(r"VLM[1-6][0-9]{2}", code) for code in codes)
    assert not set(codes) & set(RETIRED)


def test_causes_are_codes_and_never_go_in_circles() -> None:
    by_code = {one.code: one for one in CHECKS}

    def causes(code: str, above: tuple[str, ...]) -> None:
        assert code not in above, f"{' <- '.join(above)} <- {code}"
        hiding = NO_GPU_CAUSES if by_code[code].needs_gpus else ()
        for cause in (*by_code[code].explained_by, *hiding):
            causes(cause, (*above, code))

    for one in CHECKS:
        causes(one.code, ())


@pytest.mark.parametrize("one", CHECKS, ids=lambda one: one.code)
def test_every_page_has_the_fixed_headings_and_an_example_of_its_code(one: Check) -> None:
    assert re.findall(r"^## (.+)$", one.page, re.MULTILINE) == HEADINGS
    assert one.page.startswith(f"# {one.code}: {one.title}\n\n")
    example = one.page.split("## Example\n")[1].split("\n")[0]
    assert re.fullmatch(rf"`(error|warning|info) {one.code} .+`", example)


def test_a_page_without_docstrings_says_why() -> None:
    def bare(facts: Facts) -> tuple[()]:
        return ()

    assert check(bare).page == "# VLM999: test\n\nPython runs without docstrings (-OO).\n"


def test_a_check_that_raises_is_crashed_and_the_others_go_on(load: Callable[..., Machine]) -> None:
    def broken(facts: Facts) -> tuple[()]:
        raise KeyError("x\x1b[31m\ny")

    outcome = examine(check(broken), Facts.of(load("2xl4-idle")))

    assert (outcome.state, outcome.reason) == ("crashed", "KeyError: 'x\\x1b[31m\\ny'")


def test_a_finding_gets_code_and_title_of_its_check(load: Callable[..., Machine]) -> None:
    def one(facts: Facts) -> Any:
        return (found("info", "Something.", evidence={"origin": "live"}, gpus=facts.working),)

    outcome = examine(check(one), Facts.of(load("2xl4-idle")))

    assert [(f.code, f.title, f.gpus) for f in outcome.findings] == [("VLM999", "test", (0, 1))]


@pytest.mark.parametrize(
    ("need", "state", "reason"),
    [
        ("host", "unknown", "host is not known"),
        ("host.shm_total_bytes", "unknown", "host.shm_total_bytes is not known"),
        ("libraries", "unknown", "libraries: PermissionError"),
        ("libraries.python", "unknown", "libraries: PermissionError"),
        ("gpus[].compute_mode", "unknown", "gpus[0].compute_mode: NVML: Not Supported"),
        ("torch", "unknown", "torch: still being asked"),
        ("gpus", "passed", None),
        ("pci_devices", "passed", None),
    ],
)
def test_a_gap_in_what_is_needed_makes_it_unknown(
    need: str, state: str, reason: str | None, load: Callable[..., Machine]
) -> None:
    gaps = (Gap(path="libraries", reason="PermissionError"), Gap(path="gpus[0].compute_mode", reason="NVML: Not Supported"))
    machine = load("2xl4-idle", host=None, libraries=None, gaps=gaps)
    machine = replace(
        machine,
        gpus=tuple(replace(gpu, compute_mode=None) for gpu in machine.gpus),
        torch=TorchView(state="not_asked", message="still being asked"),
    )

    outcome = examine(check(nothing, needs=(need,)), Facts.of(machine))

    assert (outcome.state, outcome.reason) == (state, reason)


def test_one_gpu_unread_is_unknown_unless_another_has_a_finding(load: Callable[..., Machine]) -> None:
    machine = load("2xl4-idle", gpu=(1, {"compute_mode": None}))

    silent = examine(check(nothing, needs=("gpus[].compute_mode",)), Facts.of(machine))
    loud = examine(
        check(lambda facts: (found("info", "Something.", evidence={}),), needs=("gpus[].compute_mode",)), Facts.of(machine)
    )

    assert (silent.state, silent.reason) == ("unknown", "gpus[1].compute_mode is not known")
    assert loud.state == "found"


def test_what_a_made_up_machine_does_not_say_is_skipped(load: Callable[..., Machine]) -> None:
    facts = Facts.of(load("2xl4-idle", origin="synthetic", host=None, pci_devices=(), torch=TorchView(state="not_asked")))

    for one in (
        check(nothing, needs=("host",)),
        check(nothing, needs=("pci_devices",)),
        check(nothing, needs=("torch",)),
        check(lambda facts: unknown("something")),
    ):
        assert examine(one, facts).reason == "a made-up machine does not say"
    assert examine(check(lambda facts: skipped("a reason")), facts).reason == "a reason"


def test_torch_that_was_not_asked_without_a_reason(load: Callable[..., Machine]) -> None:
    facts = Facts.of(load("2xl4-idle", torch=TorchView(state="not_asked")))

    assert examine(check(nothing, needs=("torch",)), facts).reason == "torch: was not asked"


def test_no_working_gpu_skips_what_needs_one(load: Callable[..., Machine]) -> None:
    for need in ("gpus", "gpus[].compute_mode"):
        outcome = examine(check(nothing, needs=(need,)), Facts.of(load("laptop-no-gpu")))
        assert (outcome.state, outcome.reason) == ("skipped", "no GPU")


def test_ignored_codes_are_demoted_never_hidden(load: Callable[..., Machine]) -> None:
    machine = load("masked")

    for ignore in (["VLM201"], ["vlm2"], ["VLM"]):
        diagnosis = diagnose(machine, ignore=ignore)
        assert [(f.severity, f.code) for f in diagnosis.findings] == [("info", "VLM201")]
    assert diagnose(machine, ignore=["", "VLM5"]).count("error") == 1


@pytest.mark.parametrize(
    ("value", "path", "text"),
    [
        (None, "host.container", "unknown"),
        (True, "torch.is_available", "true"),
        (12 * 2**30, "gpus[0].memory_free_bytes", "12.0 GiB"),
        ((9, 0), "gpus[0].compute_capability", "9.0"),
        (("a", "b"), "driver.device_files", "a, b"),
        (("x" * 200, "y" * 200), "driver.device_files", "x" * 200 + ", " + "y" * 98),
        (18, "driver.nvml_error_code", "18"),
    ],
)
def test_evidence_is_written_for_people(value: object, path: str, text: str) -> None:
    assert shown(value, path) == text


def test_free_text_is_one_short_printable_line() -> None:
    assert plain("a\n b\x1b[31m\0c") == "a b?[31m?c"
    assert plain("x" * 10_000_000) == "x" * 297 + "..."
