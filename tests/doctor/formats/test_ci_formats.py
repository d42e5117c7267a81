"""Formats for CI: what each must look like, and that text from outside stays text in all of them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_doctor.answer import check_report as judge
from vlm_doctor.answers import Change, Changes, GateAnswer
from vlm_doctor.changes import Saved, with_changes
from vlm_doctor.errors import UsageError
from vlm_doctor.findings import Diagnosis, Finding, Fix, Outcome
from vlm_doctor.formats import render
from vlm_doctor.machine import Machine
from vlm_doctor.report import Report
from vlm_doctor.sources import load_machine

MACHINES = Path(__file__).parents[2] / "machines"
CI = ["github", "junit", "sarif", "markdown"]

Golden = Callable[[str, str], None]


def report_of(name: str, *, strict: bool = False, ignore: tuple[str, ...] = ()) -> Report:
    return judge(load_machine(str(MACHINES / f"{name}.json")), strict=strict, ignore=ignore)


def saying(text: str) -> Report:
    """A report in which everything that can come from outside is ``text``."""
    finding = Finding(
        code="VLM501",
        severity="error",
        title=text,
        message=text,
        cause=text,
        evidence={"gpus[0].name": text},
        fix=Fix(text=text, commands=(text,), who="administrator"),
        gpus=(0,),
        demoted_by=text,
    )
    outcomes = (
        Outcome(code="VLM501", title=text, state="found", findings=(finding, finding.demoted(text))),
        Outcome(code="VLM502", title=text, state="unknown", reason=text),
        Outcome(code="VLM503", title=text, state="crashed", reason=text),
        Outcome(code="VLM504", title=text, state="skipped", reason=text),
    )
    return Report(
        version="0.1.0",
        machine=Machine(origin="recorded", description=text, collected_at=text),
        diagnosis=Diagnosis(outcomes=outcomes),
        changes=Changes(where=text, changes=(Change(kind="gpu", subject=text, before=text),)),
        exit_status=1,
    )


@pytest.mark.parametrize("style", CI)
def test_whole_text(style: str, check_report: Report, golden: Golden) -> None:
    golden(f"{style}/check_report.txt", render(check_report, style))


@pytest.mark.parametrize("style", CI)
def test_a_plan_is_refused(style: str, plan_report: Report) -> None:
    with pytest.raises(UsageError, match=f"--format {style} holds verdicts on a machine; for plan take --format json"):
        render(plan_report, style)


@pytest.mark.parametrize("style", CI)
def test_ascii_where_nothing_else_can_be_shown(style: str) -> None:
    assert render(saying("é → 日本"), style, is_unicode=False).isascii()


@pytest.mark.parametrize("style", CI)
def test_a_gate_is_the_headline(style: str) -> None:
    gate = GateAnswer(is_met=False, reason="Not met: 2 GPUs are wanted, 1 can be used (VLM702).")
    report = msgspec.structs.replace(report_of("2xl4-idle"), command="gate", gate=gate, exit_status=1)

    assert "2 GPUs are wanted" in render(report, style)


@pytest.mark.parametrize("style", CI)
def test_what_a_cause_also_explains_is_said(style: str) -> None:
    assert "Also explains: torch sees fewer GPUs (VLM206)" in render(report_of("cpu-torch"), style)


def compared(before: str, now: str) -> Report:
    then = report_of(before)
    saved = Saved(where="good.json", machine=then.machine, diagnosis=then.diagnosis, exit_status=then.exit_status)
    return with_changes(report_of(now), saved)


def test_sarif_says_which_results_are_new_and_which_are_gone() -> None:
    (run,) = json.loads(render(compared("small-shm", "cpu-torch"), "sarif"))["runs"]

    states = {result["ruleId"]: (result["baselineState"], result["level"]) for result in run["results"]}
    assert states == {
        "VLM303": ("new", "error"),
        "VLM401": ("unchanged", "note"),
        "VLM503": ("absent", "warning"),
    }
    assert [run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] for result in run["results"]] == list(states)
    gone = run["results"][-1]["message"]["text"]
    assert gone == "/dev/shm too small\nGone since 2026-11-22T12:00:00Z: it was a warning."
    jsonschema.validate(json.loads(render(compared("small-shm", "cpu-torch"), "sarif")), SARIF)


def test_a_finding_that_got_worse_is_updated() -> None:
    fine = report_of("rhel8-pair")
    assert fine.diagnosis is not None
    outcome = next(one for one in fine.diagnosis.outcomes if one.code == "VLM512")
    worse = Diagnosis(outcomes=(_as_error(outcome),))
    saved = Saved(where="a.json", machine=fine.machine, diagnosis=fine.diagnosis)
    report = with_changes(msgspec.structs.replace(fine, diagnosis=worse), saved)

    results = json.loads(render(report, "sarif"))["runs"][0]["results"]
    assert {result["ruleId"]: result["baselineState"] for result in results} == {"VLM512": "updated", "VLM401": "absent"}
    assert "Of another severity since 2026-11-22T12:00:00Z: it was an info." in render(report, "junit")


def _as_error(outcome: Outcome) -> Outcome:
    (finding,) = outcome.findings
    return msgspec.structs.replace(outcome, findings=(msgspec.structs.replace(finding, severity="error"),))


def test_junit_says_what_is_new_and_what_is_gone() -> None:
    root = suite(compared("small-shm", "cpu-torch"))

    properties = [(one.get("name"), one.get("value")) for one in root.findall("properties/property")]
    assert ("since", "2026-11-22T12:00:00Z") in properties
    assert ("changed", "torch without CUDA (VLM303): error (new)") in properties
    failure = root.find("testcase[@name='VLM303 torch without CUDA']/failure")
    assert failure is not None
    assert "New since 2026-11-22T12:00:00Z." in (failure.text or "")
    gone = root.find("testcase[@name='VLM503 /dev/shm too small']/system-out")
    assert gone is not None
    assert gone.text == "Gone since 2026-11-22T12:00:00Z: it was a warning."


@pytest.mark.parametrize("style", CI)
def test_nothing_is_new_where_nothing_is_compared(style: str) -> None:
    report = msgspec.structs.replace(report_of("cpu-torch"), changes=Changes(where="a.json"))

    assert not re.search("New since|Gone since|baselineState", render(report, style))


def test_github_marks_what_is_new() -> None:
    first = next(line for line in render(compared("2xl4-idle", "cpu-torch"), "github").splitlines() if "VLM303 " in line)

    assert "%0ANew since 2026-11-22T12%3A00%3A00Z.%0A" in first.replace(":", "%3A")


def test_of_a_gate_that_could_not_be_judged_the_test_case_is_an_error() -> None:
    gate = GateAnswer(is_met=False, reason="Not known.")
    report = msgspec.structs.replace(report_of("2xl4-idle"), command="gate", gate=gate, exit_status=3)
    met = msgspec.structs.replace(report, gate=GateAnswer(is_met=True, reason="Met."), exit_status=0)

    assert suite(report).find("testcase[@name='gate']/error") is not None
    case = suite(met).find("testcase[@name='gate']")
    assert case is not None
    assert len(case) == 0


# --- GitHub ---


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_can_become_a_workflow_command(text: str) -> None:
    lines = render(saying(text), "github").splitlines()

    assert [line.split(" ")[0] for line in lines[:-1]] == ["::notice", "::error", "::notice"]
    assert lines[-1] == "Not ready: 1 error."


def test_separators_of_a_title_are_escaped() -> None:
    first = render(saying("a: 50%, b::error::c"), "github").splitlines()[1]

    assert first.startswith("::error title=VLM501 a%3A 50%25%2C b%3A%3Aerror%3A%3Ac::a: 50%25, b::error::c%0ACause: a: ")


# --- JUnit ---


def suite(report: Report) -> ET.Element:
    root = ET.fromstring(render(report, "junit"))
    assert root.tag == "testsuites"
    found = root.find("testsuite")
    assert found is not None
    return found


ALLOWED = {
    # Of junit-10.xsd of Jenkins' xunit-plugin: element to attributes and children.
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname", "id", "package"},
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": ({"name", "classname", "time"}, {"skipped", "error", "failure", "system-out", "system-err"}),
    "failure": ({"type", "message"}, set()),
    "error": ({"type", "message"}, set()),
    "skipped": ({"type", "message"}, set()),
    "system-out": (set(), set()),
}


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_valid_test_suite(text: str) -> None:
    for element in ET.fromstring(render(saying(text), "junit")).iter():
        attributes, children = ALLOWED[element.tag]
        assert set(element.attrib) <= attributes
        assert {child.tag for child in element} <= children


def test_counts_are_those_of_the_cases() -> None:
    found = suite(saying("x"))

    assert {key: found.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "errors": "1",
        "skipped": "2",
    }
    assert re.fullmatch(r"\d+\.\d{3}", found.get("time", ""))


def test_a_warning_fails_a_case_only_with_strict() -> None:
    assert suite(report_of("2xa10-half-taken")).get("failures") == "0"
    assert suite(report_of("2xa10-half-taken", strict=True)).get("failures") == "1"
    assert suite(report_of("2xa10-half-taken", strict=True, ignore=("VLM5",))).get("failures") == "0"


# --- SARIF ---

TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
SARIF: dict[str, Any] = {
    # What SARIF 2.1.0 says of the parts that are written, closed as its schema closes them.
    "type": "object",
    "required": ["version", "runs"],
    "properties": {
        "$schema": {"format": "uri"},
        "version": {"const": "2.1.0"},
        "runs": {
            "items": {
                "required": ["tool"],
                "additionalProperties": False,
                "properties": {
                    "tool": {"required": ["driver"]},
                    "invocations": {
                        "items": {
                            "required": ["executionSuccessful"],
                            "properties": {
                                "exitCode": {"type": "integer"},
                                "toolExecutionNotifications": {
                                    "items": {
                                        "required": ["message"],
                                        "properties": {
                                            "level": {"enum": ["none", "note", "warning", "error"]},
                                            "message": TEXT,
                                        },
                                    }
                                },
                            },
                        }
                    },
                    "artifacts": {},
                    "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                    "results": {
                        "items": {
                            "required": ["message", "locations"],
                            "properties": {
                                "level": {"enum": ["none", "note", "warning", "error"]},
                                "ruleIndex": {"type": "integer", "minimum": 0},
                                "baselineState": {"enum": ["new", "unchanged", "updated", "absent"]},
                                "message": TEXT,
                                "suppressions": {"items": {"properties": {"kind": {"enum": ["inSource", "external"]}}}},
                            },
                        }
                    },
                },
            }
        },
    },
}


@pytest.mark.parametrize("machine", ["cpu-torch", "8xh100-fabric-down", "laptop-no-gpu", "nvml-crashed"])
def test_a_sarif_log_is_valid_and_its_rules_are_the_codes(machine: str) -> None:
    log = json.loads(render(report_of(machine), "sarif"))

    jsonschema.validate(log, SARIF)
    run = log["runs"][0]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(set(rules)) == len(rules)
    assert [rules[result["ruleIndex"]] for result in run["results"]] == [result["ruleId"] for result in run["results"]]
    assert all(result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in run["results"])


def test_a_sarif_result_of_gpus_names_them_and_is_the_same_next_time() -> None:
    first, second = (json.loads(render(report_of("8xh100-fabric-down"), "sarif"))["runs"][0]["results"] for _ in range(2))

    places = first[0]["locations"][0]["logicalLocations"]
    assert [place["fullyQualifiedName"] for place in places] == [f"gpus[{index}]" for index in range(8)]
    assert first[0]["partialFingerprints"] == second[0]["partialFingerprints"]


def test_what_was_demoted_is_suppressed_and_still_there() -> None:
    results = json.loads(render(report_of("cpu-torch", ignore=("VLM303",)), "sarif"))["runs"][0]["results"]

    (result,) = (result for result in results if result["ruleId"] == "VLM303")
    assert result["level"] == "note"
    assert result["suppressions"] == [{"kind": "external", "justification": "--ignore VLM303"}]


def test_a_code_without_page_is_still_a_rule() -> None:
    report = saying("x")
    odd = msgspec.structs.replace(report.diagnosis.outcomes[0].findings[0], code="VLM999") if report.diagnosis else None
    assert odd is not None
    other = Diagnosis(outcomes=(Outcome(code="VLM999", title="odd", state="found", findings=(odd,)),))
    log = json.loads(render(msgspec.structs.replace(report, diagnosis=other), "sarif"))

    assert log["runs"][0]["tool"]["driver"]["rules"][0]["help"]["text"] == "VLM999"


# --- Markdown ---


def test_markdown_from_outside_is_text() -> None:
    text = render(saying("<img src=x> [a](http://b) `rm` @someone | # *"), "markdown")

    outside = re.sub(r"(?s)(`{3,})console\n.*?\n\1\n", "", text)
    assert "<img" not in outside.replace("\\<", "")
    assert "@someone" not in outside
    assert "\\[a\\](http://b)" in outside


def test_a_fence_is_longer_than_any_in_it() -> None:
    assert "\n````console\n```\n````\n" in render(saying("```"), "markdown")


def test_nothing_changed_is_said() -> None:
    report = msgspec.structs.replace(report_of("2xl4-idle"), changes=Changes(where="good.json"))

    assert "Nothing has changed since good.json." in render(report, "markdown")


def test_what_has_to_be_said_of_a_run_is_said_in_every_format() -> None:
    notes = ("From p.toml: [tool.vlm-doctor]: ignore VLM503.", "Slow to read: host 3.0 s.")
    report = msgspec.structs.replace(report_of("small-shm"), notes=notes)
    assert render(report, "github").splitlines()[-2:] == list(notes)
    assert "\nFrom p.toml: \\[tool.vlm-doctor\\]: ignore VLM503.\n\nSlow to read: host 3.0 s.\n" in render(
        report, "markdown"
    )
    properties = ET.fromstring(render(report, "junit")).iter("property")
    assert [one.get("value") for one in properties if one.get("name") == "note"] == list(notes)
