"""A report as JUnit XML: one test case a check, for the test views of CI servers.

Form: ``junit-10.xsd`` of Jenkins' xunit-plugin, which is also what pytest writes. Only what stops a job is a failure;
unknown is neither passed nor failed, and a check that crashed is an error of the doctor.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from ..findings import Outcome
from ..report import Report
from .headline import advice, headline, refuse_other_reports, since
from .inert import inert
from .look import Look

_MOST_CHANGES = 200
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold. Source: XML 1.0, production 2."""


def render(report: Report, look: Look) -> str:  # noqa: ARG001 - every format takes a look; XML escapes what is not ASCII
    """Write a test suite."""
    refuse_other_reports(report, "junit")
    cases = [_case(outcome, report) for outcome in (report.diagnosis.outcomes if report.diagnosis is not None else ())]
    if report.gate is not None:
        cases.append(_gate_case(report))
    suite = ET.Element(
        "testsuite",
        name="vlm-doctor",
        tests=str(len(cases)),
        failures=str(_count(cases, "failure")),
        errors=str(_count(cases, "error")),
        skipped=str(_count(cases, "skipped")),
        time=f"{report.seconds or 0.0:.3f}",
        timestamp=_safe(report.machine.collected_at or ""),
    )
    properties = ET.SubElement(suite, "properties")
    facts = {
        "machine": report.machine.description,
        "verdict": headline(report),
        "exit_status": str(report.exit_status),
        "version": report.version,
    }
    changed: list[tuple[str, str]] = []
    if report.changes is not None:
        changed = [("since", report.changes.since), *(("changed", change.text) for change in report.changes.changes)]
    noted = [("note", note) for note in report.notes]
    for name, value in (*facts.items(), *changed[:_MOST_CHANGES], *noted):
        ET.SubElement(properties, "property", name=name, value=_safe(inert(value)))
    suite.extend(cases)
    root = ET.Element("testsuites", name="vlm-doctor")
    root.append(suite)
    ET.indent(root)
    # ASCII with character references: right in whichever encoding it is written.
    text: str = ET.tostring(root, encoding="us-ascii").decode()
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _case(outcome: Outcome, report: Report) -> ET.Element:
    case = ET.Element("testcase", classname="vlm_doctor", name=_safe(f"{outcome.code} {outcome.title}"), time="0")
    if outcome.state == "crashed":
        ET.SubElement(case, "error", type="crashed", message=_safe(outcome.reason or ""))
    elif outcome.state in ("skipped", "unknown"):
        reason = outcome.reason or "no reason recorded"
        ET.SubElement(case, "skipped", type=outcome.state, message=_safe(f"{outcome.state}: {reason}"))
    # The exit status says whether warnings count: --strict is part of it.
    decisive = ("error", "warning") if _is_strict(report) else ("error",)
    news = since(report, outcome.code)
    for finding in outcome.findings:
        text = "\n".join([inert(finding.message), *news, *advice(finding, report.diagnosis)])
        if finding.severity in decisive:
            ET.SubElement(case, "failure", type=finding.severity, message=_safe(finding.message)).text = _safe(text)
    quiet = [finding for finding in outcome.findings if finding.severity not in decisive]
    lines = [f"{one.severity}: {inert(one.message)}" for one in quiet]
    lines += [line for one in quiet for line in advice(one)]
    # A failure says it itself.
    lines += news if len(quiet) == len(outcome.findings) else []
    if lines:
        ET.SubElement(case, "system-out").text = _safe("\n".join(lines))
    return case


def _is_strict(report: Report) -> bool:
    has_errors = report.diagnosis is not None and report.diagnosis.count("error") > 0
    return report.exit_status == 1 and not has_errors and report.gate is None


def _gate_case(report: Report) -> ET.Element:
    case = ET.Element("testcase", classname="vlm_doctor", name="gate", time="0")
    if report.exit_status == 1:
        ET.SubElement(case, "failure", type="gate", message=_safe(headline(report))).text = _safe(headline(report))
    elif report.exit_status:
        ET.SubElement(case, "error", type="could_not_look", message=_safe(headline(report)))
    return case


def _count(cases: list[ET.Element], name: str) -> int:
    return sum(case.find(name) is not None for case in cases)


def _safe(text: str) -> str:
    return _NOT_XML.sub("?", text)
