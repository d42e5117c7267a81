"""A report as SARIF 2.1.0, for code scanning and other collectors of results.

Source: OASIS, Static Analysis Results Interchange Format 2.1.0. Rules are the codes of the findings, with their pages as
help. Places are the GPUs of a file that stands for the machine: a machine has no source code to point at.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from ..codes import all_codes, explain
from ..findings import Diagnosis, Finding, Outcome, Severity
from ..report import Report
from .headline import advice, headline, refuse_other_reports, since
from .inert import inert
from .look import Look

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
_MACHINE = "vlm-doctor/machine.json"
"""Code scanning refuses results without a file; this one is what ``vlm-doctor collect --output`` would write."""


def render(report: Report, look: Look) -> str:  # noqa: ARG001 - every format takes a look; JSON is ASCII here
    """Write a log with one run."""
    refuse_other_reports(report, "sarif")
    diagnosis = report.diagnosis
    findings = diagnosis.findings if diagnosis is not None else ()
    outcomes = diagnosis.outcomes if diagnosis is not None else ()
    news = report.changes.news(findings) if report.changes is not None else {}
    before = (report.changes.findings_before if report.changes is not None else None) or {}
    gone = [code for code, state in news.items() if state == "absent"]
    codes = list(dict.fromkeys([*(finding.code for finding in findings), *gone]))
    results = [_result(finding, codes.index(finding.code), diagnosis) for finding in findings]
    results += [_absent(code, codes.index(code), before[code], report) for code in gone]
    if news:
        # All results have a state, or none: SARIF 2.1.0, 3.27.24.
        results = [{**result, "baselineState": news[result["ruleId"]]} for result in results]
    invocation: dict[str, Any] = {
        "executionSuccessful": report.exit_status in (0, 1),
        "exitCode": report.exit_status,
        "exitCodeDescription": headline(report),
        "toolExecutionNotifications": [
            _notification(outcome) for outcome in outcomes if outcome.state in ("unknown", "crashed")
        ],
    }
    log = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "vlm-doctor",
                        "version": report.version,
                        "rules": [_rule(code) for code in codes],
                    }
                },
                "invocations": [invocation],
                "artifacts": [{"location": {"uri": _MACHINE}, "description": {"text": inert(report.machine.description)}}],
                "results": results,
                "columnKind": "unicodeCodePoints",
            }
        ],
    }
    return json.dumps(log, indent=2) + "\n"


def _rule(code: str) -> dict[str, Any]:
    title = all_codes().get(code, code)
    page = explain(code) if code in all_codes() else title
    return {
        "id": code,
        "name": "".join(word.capitalize() for word in re.findall(r"[A-Za-z0-9]+", title)) or code,
        "shortDescription": {"text": title},
        "fullDescription": {"text": title},
        "help": {"text": page, "markdown": page},
    }


def _absent(code: str, rule_index: int, severity: Severity, report: Report) -> dict[str, Any]:
    """A finding of the saved report that is gone."""
    text = "\n".join([all_codes().get(code, inert(code)), *since(report, code)])
    return {
        "ruleId": code,
        "ruleIndex": rule_index,
        "level": _LEVELS[severity],
        "message": {"text": text},
        "locations": [_location(["machine"])],
    }


def _location(places: list[str]) -> dict[str, Any]:
    return {
        "physicalLocation": {"artifactLocation": {"uri": _MACHINE, "index": 0}},
        "logicalLocations": [{"fullyQualifiedName": place, "kind": "resource"} for place in places],
    }


def _result(finding: Finding, rule_index: int, diagnosis: Diagnosis | None) -> dict[str, Any]:
    text = "\n".join([inert(finding.message), *advice(finding, diagnosis)])
    places = [f"gpus[{index}]" for index in finding.gpus] or ["machine"]
    # The same trouble of the same GPUs is the same result in the next run, whatever its numbers are by then.
    print_ = hashlib.sha256(f"{finding.code} {places}".encode()).hexdigest()[:32]
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": rule_index,
        "level": _LEVELS[finding.severity],
        "message": {"text": text},
        "locations": [_location(places)],
        "partialFingerprints": {"vlmDoctorFinding/v1": print_},
        "properties": {"evidence": {path: inert(value) for path, value in finding.evidence.items()}},
    }
    if finding.demoted_from is not None:
        result["suppressions"] = [{"kind": "external", "justification": inert(finding.demoted_by or "")}]
    return result


def _notification(outcome: Outcome) -> dict[str, Any]:
    return {
        "level": "error" if outcome.state == "crashed" else "note",
        "message": {"text": inert(f"{outcome.code} {outcome.title}: {outcome.state}: {outcome.reason or ''}")},
        "descriptor": {"id": outcome.code},
    }
